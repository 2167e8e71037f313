"""Remake the recorded results: train every seed of an environment, keep what came out.

    python benchmark/run.py CartPole-v1                   # train its seeds, one after the other
    python benchmark/run.py BipedalWalker-v3 --at-once 3  # side by side
    python benchmark/run.py                               # tables and curves of all records

For each seed, `benchmark/<name>/seed<seed>.json` is the run's result.json. `agent.pt` (to evaluate,
not to resume), `training.png` and `agent.gif` are those of the seed whose mean return is the
median, of two the better one. (`sb3.json` is of benchmark/sb3.py.)
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

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
        "--num-steps 200 --num-minibatches 16 --learning-rate 1e-3 --gamma 0.95 "
        "--gae-lambda 0.95 --ent-coef 0",
    ),
    "MountainCarContinuous-v0": (
        range(1, 4),
        "ppo_continuous.py --env-id MountainCarContinuous-v0 --total-timesteps 500000 "
        "--num-steps 256 --num-minibatches 32 --learning-rate 1e-3 --gamma 0.999 "
        "--gae-lambda 0.98 --ent-coef 0 --log-std-init 1.1",
    ),
    "LunarLanderContinuous": (
        range(1, 4),
        "ppo_continuous.py --env-id LunarLander-v3 --env-kwargs continuous=True "
        "--total-timesteps 4000000 --num-minibatches 32 --update-epochs 6 --learning-rate 1e-3 "
        "--gamma 0.999 --gae-lambda 0.98 --ent-coef 0",
    ),
    "BipedalWalker-v3": (range(1, 4), "ppo_continuous.py"),
    "BipedalWalkerHardcore-v3": (
        range(1, 2),
        "ppo_continuous.py --env-id BipedalWalkerHardcore-v3 --total-timesteps 16000000 "
        "--num-envs 64 --num-steps 256 --learning-rate 3e-4 --gamma 0.995 --gae-lambda 0.9 "
        "--ent-coef 0.005 --target-kl 0.02",
    ),
    "CarRacing-v3": (range(1, 3), "ppo_carracing_cnn.py"),
    "LunarLander-v3-multienv": (range(1, 4), "ppo_multienv.py"),
}

# What others have published: CleanRL, the rl-zoo, the best known of any kind.
PUBLISHED = {
    "CartPole-v1": ("490 (500k)", "500.0 (100k)", "500"),
    "Acrobot-v1": ("-86.4", "-73.5 (1M)", ""),
    "MountainCar-v0": ("-200", "-110.4 (1M)", ""),
    "LunarLander-v3": ("", "242 (1M)", ""),
    "Pendulum-v1": ("-1142", "-172 (100k)", "-151"),
    "MountainCarContinuous-v0": ("", "88.3 (20k)", "96.7"),
    "LunarLanderContinuous": ("", "271 (1M)", "284"),
    "BipedalWalker-v3": ("172", "288 (5M)", "335; 313 by PPO"),
    "BipedalWalkerHardcore-v3": ("", "122 (100M)", "235"),
    "CarRacing-v3": ("", "about 430", "914 (another version), 897.7"),
}


def train(name, at_once):
    """Run the row's command with each of its seeds; record results and the median's checkpoint."""
    seeds, command = ROWS[name]
    folder = ROOT / "benchmark" / name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(at_once) as pool:
        run_dirs = list(pool.map(lambda seed: train_seed(command, seed, scratch), seeds))
        results = []
        for seed, run_dir in zip(seeds, run_dirs, strict=True):
            result = json.loads((run_dir / "result.json").read_text())
            if name == "CarRacing-v3":
                result |= evaluate_stock(run_dir, result["threshold"])
            (folder / f"seed{seed}.json").write_text(json.dumps(result) + "\n")
            results.append((result["eval_mean"], seed, run_dir))
        _, _, median = sorted(results)[len(results) // 2]
        keep(median, folder)


def train_seed(command, seed, scratch):
    """Run the command; the run's folder."""
    script, *flags = command.split()
    line = [sys.executable, ROOT / script, *flags, "--seed", str(seed)]
    output = subprocess.run(line, cwd=scratch, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{command} --seed {seed}", output, sep="\n", flush=True)
    return Path(scratch, re.search("run folder (.*)", output)[1])


def evaluate_stock(run_dir, threshold):
    """The evaluation on Gymnasium's own CarRacing, which is what is recorded."""
    sys.path.insert(0, str(ROOT))
    import ppo_carracing_cnn

    agent, args = ppo_carracing_cnn.load_agent(run_dir / "agent.pt", "cpu")
    args = replace(args, stock_renderer=True)
    returns = ppo_carracing_cnn.evaluate(agent, args, args.eval_episodes, args.seed, "cpu")
    mean, std = returns.mean().item(), returns.std().item()
    print(f"on Gymnasium's own CarRacing {mean:.1f} ± {std:.1f}", flush=True)
    outcome = {"eval_returns": returns.tolist(), "eval_mean": mean, "eval_std": std}
    return outcome | {"solved": mean >= threshold}


def keep(run_dir, folder):
    """Keep a run's plot, its GIF, and of its checkpoint what evaluation needs."""
    for file in ("training.png", "agent.gif"):
        shutil.copy(run_dir / file, folder / file)
    checkpoint = torch.load(run_dir / "agent.pt", weights_only=True)
    checkpoint["progress"] |= {"episodes": [], "iterations": []}
    torch.save(checkpoint | {"optimizer": None}, folder / "agent.pt")


def records():
    """The results of every row all of whose seeds are recorded, by its name."""
    rows = {}
    for name, (seeds, _) in ROWS.items():
        files = [ROOT / "benchmark" / name / f"seed{seed}.json" for seed in seeds]
        if all(file.exists() for file in files):
            rows[name] = [json.loads(file.read_text()) for file in files]
    return rows


def comparison():
    """Print ours beside Stable-Baselines3's, trained here too, and what others have published."""
    print(
        "| environment | ours | Stable-Baselines3, rl-zoo's recipe | published: rl-zoo | CleanRL | "
        "best known of any kind | threshold |"
    )
    print("|" + " --- |" * 7)
    for name, results in records().items():
        folder = ROOT / "benchmark" / name.removesuffix("-multienv")
        file = folder / "sb3.json"
        theirs = outcome(json.loads(file.read_text())) if file.exists() else ""
        cleanrl, zoo, best = PUBLISHED.get(folder.name, ("", "", ""))
        threshold = "" if results[0]["threshold"] is None else f"{results[0]['threshold']:g}"
        columns = [name, outcome(results), theirs, zoo, cleanrl, best, threshold]
        print("| " + " | ".join(columns) + " |")


def outcome(results):
    """The mean of the seeds' means, their deviation, the steps, the median seconds of learning."""
    means = [result["eval_mean"] for result in results]
    seconds = np.median([result["learning_seconds"] for result in results])
    args = results[0].get("args", {})
    steps = args.get("total_timesteps", float(f"{results[0]['global_step']:.2g}"))
    steps = EngFormatter(places=0, sep="")(steps)
    seeds = f"± {np.std(means, ddof=1):.1f} ({len(means)} seeds" if len(means) > 1 else "(1 seed"
    return f"{np.mean(means):.1f} {seeds}, {steps}, {seconds:.0f} s)"


def table():
    """Print a row for every environment that has records."""
    print("| environment | mean ± std of each seed | steps | learning | all | command |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, results in records().items():
        means = ", ".join(f"{r['eval_mean']:.1f} ± {r['eval_std']:.1f}" for r in results)
        learning, wall = (
            f"{min(r[key] for r in results):.0f} to {max(r[key] for r in results):.0f} s"
            for key in ("learning_seconds", "wall_seconds")
        )
        step = f"{results[0]['global_step']:,}"
        print(f"| {name} | {means} | {step} | {learning} | {wall} | `python {ROWS[name][1]}` |")


def draw_curves(path):
    """Draw training's return over steps and over seconds: mean and range over the seeds."""
    rows = {name: results for name, results in records().items() if "curve" in results[0]}
    lines = math.ceil(len(rows) / 2)
    figure = Figure(figsize=(18, 3 * lines), layout="constrained")
    grid = figure.subplots(lines, 4, squeeze=False).reshape(-1, 2)
    for axes, (name, results) in zip(grid, rows.items(), strict=False):
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            curves = []
            for result in results:
                x, y = (np.array(result["curve"][n], float) for n in (key, "episodic_return"))
                curves.append((x[~np.isnan(y)], y[~np.isnan(y)]))  # nan: no episode has ended yet
            first = max(x[0] for x, _ in curves)
            last = min(x[-1] for x, _ in curves)
            grid_x = np.linspace(first, last, 300)  # where all seeds have returns
            returns = np.stack([np.interp(grid_x, x, y) for x, y in curves])
            axis.fill_between(grid_x, returns.min(0), returns.max(0), alpha=0.3)
            axis.plot(grid_x, returns.mean(0))
            if results[0]["threshold"] is not None:
                axis.axhline(results[0]["threshold"], color="black", linestyle="--")
            axis.set(title=f"{name}, seeds: {len(results)}", xlabel=key)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.grid(alpha=0.3)
        axes[0].set(xlabel="environment steps", ylabel="return, last 100 episodes")
        axes[1].set(xlabel="seconds of learning")
    for axis in grid[len(rows) :].flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=", ".join(ROWS))
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="seeds side by side")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for row in args.rows:
        train(row, args.at_once)
    comparison()
    print()
    table()
    draw_curves(ROOT / "benchmark" / "curves.png")
