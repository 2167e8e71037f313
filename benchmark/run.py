"""Remake the recorded results: train every seed of an environment, keep what came out.

    python benchmark/run.py CartPole-v1        # train its seeds, one after the other
    python benchmark/run.py                    # print the table of all that is recorded

For each seed, `benchmark/<name>/seed<seed>.json` is the run's result.json. `agent.pt` (to evaluate,
not to resume), `training.png` and `agent.gif` are those of the seed whose mean return is the
median, of two the better one.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

# name of the row: seeds, command
ROWS = {
    "CartPole-v1": (range(1, 6), "ppo_discrete.py"),
    "CartPole-v1-kl-penalty": (range(1, 6), "ppo_discrete.py --surrogate kl-penalty"),
    "Acrobot-v1": (
        range(1, 4),
        "ppo_discrete.py --env-id Acrobot-v1 --norm-obs --total-timesteps 1000000 --num-steps 64 "
        "--num-minibatches 8 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01",
    ),
    "MountainCar-v0": (
        range(1, 4),
        "ppo_discrete.py --env-id MountainCar-v0 --norm-obs --total-timesteps 1000000 "
        "--num-steps 128 --num-minibatches 16 --update-epochs 10 --learning-rate 1e-3 "
        "--gamma 0.99 --gae-lambda 0.98",
    ),
    "LunarLander-v3": (
        range(1, 4),
        "ppo_discrete.py --env-id LunarLander-v3 --norm-obs --total-timesteps 2000000 "
        "--num-steps 512 --num-minibatches 32 --update-epochs 6 --learning-rate 1e-3 "
        "--gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01",
    ),
    "Pendulum-v1": (
        range(1, 4),
        "ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 500000 --num-envs 16 "
        "--num-steps 200 --num-minibatches 16 --learning-rate 1e-3 --gamma 0.95",
    ),
    "MountainCarContinuous-v0": (
        range(1, 4),
        "ppo_continuous.py --env-id MountainCarContinuous-v0 --total-timesteps 500000 "
        "--num-steps 256 --num-minibatches 32 --learning-rate 1e-3 --gamma 0.999 "
        "--gae-lambda 0.98 --log-std-init 1.1",
    ),
    "CarRacing-v3": (range(1, 3), "ppo_carracing_cnn.py"),
}


def train(name):
    """Run the row's command with each of its seeds; record results and the median's checkpoint."""
    seeds, command = ROWS[name]
    script, *flags = command.split()
    folder = ROOT / "benchmark" / name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for seed in seeds:
            print(f"{command} --seed {seed}", flush=True)
            line = [sys.executable, ROOT / script, *flags, "--seed", str(seed)]
            output = subprocess.run(
                line, cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
            )
            print(output.stdout, flush=True)
            run_dir = Path(scratch, re.search("run folder (.*)", output.stdout)[1])
            result = json.loads((run_dir / "result.json").read_text())
            (folder / f"seed{seed}.json").write_text(json.dumps(result) + "\n")
            results.append((result["eval_mean"], seed, run_dir))
        _, _, median = sorted(results)[len(results) // 2]
        keep(median, folder)


def keep(run_dir, folder):
    """Keep a run's plot, its GIF, and its checkpoint without the state of the optimiser."""
    for file in ("training.png", "agent.gif"):
        shutil.copy(run_dir / file, folder / file)
    checkpoint = torch.load(run_dir / "agent.pt", weights_only=True)
    torch.save(checkpoint | {"optimizer": None}, folder / "agent.pt")


def table():
    """Print a row for every environment that has records."""
    print("| environment | mean ± std of each seed | steps | learning | all | command |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (seeds, command) in ROWS.items():
        files = [ROOT / "benchmark" / name / f"seed{seed}.json" for seed in seeds]
        if not all(file.exists() for file in files):
            continue
        results = [json.loads(file.read_text()) for file in files]
        means = ", ".join(f"{r['eval_mean']:.1f} ± {r['eval_std']:.1f}" for r in results)
        learning, wall = (
            f"{min(r[key] for r in results):.0f} to {max(r[key] for r in results):.0f} s"
            for key in ("learning_seconds", "wall_seconds")
        )
        step = f"{results[0]['global_step']:,}"
        print(f"| {name} | {means} | {step} | {learning} | {wall} | `python {command}` |")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not set(sys.argv[1:]) <= set(ROWS):
        sys.exit(f"usage: python benchmark/run.py [{' | '.join(ROWS)}]...")
    for row in sys.argv[1:]:
        train(row)
    table()
