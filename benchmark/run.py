"""Remake the recorded results; print the tables and draw the curves of all records.

    python benchmark/run.py CartPole-v1                   # train all seeds, replace their records
    python benchmark/run.py HalfCheetah-v5 --seeds 1 2    # or these; the others stay
    python benchmark/run.py BipedalWalker-v3 --at-once 2  # two seeds side by side
    python benchmark/run.py CarRacing-v3 --seeds 1 --resume runs/<run>/agent.pt  # a stopped run
    python benchmark/run.py                               # tables and curves, without training

A run takes, on one core: classic control half a minute or less at 100k steps and one to two minutes
at 1M, LunarLander two minutes, a MuJoCo task three to ten minutes, BipedalWalker a quarter of an
hour, CarRacing one and a half to three hours. `python benchmark/sb3.py ROW` does the same for
Stable-Baselines3.

`benchmark/<row>/seed<seed>.json` holds what a run's result.json does, with a thinned curve and the
commit. As soon as all seeds are there, `agent.pt` is the checkpoint of the one whose mean return is
the median, without optimizer state: it can be evaluated, not resumed.
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
from PIL import Image, ImageSequence

ROOT = Path(__file__).parents[1]
FIVE, THREE = (1, 2, 3, 4, 5), (1, 2, 3)
NAMES = {".pt": "agent.pt", ".gif": "agent.gif", ".png": "training.png"}
WITH_PICTURES = ("CartPole-v1", "LunarLander-v3", "BipedalWalker-v3", "CarRacing-v3")

# name of the row: seeds, command. The steps are those of the rl-zoo's recipe for the task.
CLASSIC = {
    "CartPole-v1": (FIVE, "ppo_discrete.py"),
    "CartPole-v1-kl-penalty": (FIVE, "ppo_discrete.py --surrogate kl-penalty"),
    "Acrobot-v1": (
        FIVE,
        "ppo_discrete.py --env-id Acrobot-v1 --norm-obs --total-timesteps 1000000 --num-steps 64 "
        "--num-minibatches 8 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01",
    ),
    "MountainCar-v0": (
        FIVE,
        "ppo_discrete.py --env-id MountainCar-v0 --norm-obs --total-timesteps 1000000 "
        "--num-steps 128 --num-minibatches 16 --update-epochs 10 --learning-rate 1e-3 "
        "--gamma 0.99 --gae-lambda 0.98",
    ),
    "Pendulum-v1": (
        FIVE,
        "ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 100000 --num-envs 4 "
        "--num-steps 400 --num-minibatches 16 --update-epochs 20 --learning-rate 1e-3 "
        "--gamma 0.95 --gae-lambda 0.95 --ent-coef 0 --no-bound-mean",
    ),
    "MountainCarContinuous-v0": (
        FIVE,
        "ppo_continuous.py --env-id MountainCarContinuous-v0 --total-timesteps 20000 --num-envs 4 "
        "--num-steps 250 --num-minibatches 16 --update-epochs 5 --learning-rate 5e-4 "
        "--gamma 0.9999 --gae-lambda 0.9 --clip-coef 0.1 --ent-coef 0.01 --log-std-init 2",
    ),
}
BOX2D = {
    "LunarLander-v3": (
        FIVE,
        "ppo_discrete.py --env-id LunarLander-v3 --norm-obs --total-timesteps 1000000 "
        "--num-steps 256 --num-minibatches 16 --update-epochs 6 --learning-rate 1e-3 "
        "--gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01 --hidden-size 128",
    ),
    "LunarLander-v3-multienv": (FIVE, "ppo_multienv.py"),
    "LunarLanderContinuous-v3": (
        FIVE,
        "ppo_continuous.py --env-id LunarLanderContinuous-v3 --total-timesteps 1000000 "
        "--num-steps 256 --num-minibatches 16 --update-epochs 6 --learning-rate 1e-3 --gamma 0.999 "
        "--gae-lambda 0.98 --ent-coef 0 --log-std-init -0.5 --no-bound-mean",
    ),
    "BipedalWalker-v3": (THREE, "ppo_continuous.py"),
}
# One set of flags for all tasks of MuJoCo.
MUJOCO_FLAGS = (
    "--total-timesteps 1000000 --num-envs 64 --num-steps 32 --num-minibatches 32 "
    "--learning-rate 3e-4 --gae-lambda 0.95 --ent-coef 0 --log-std-init -0.5 --no-bound-mean"
)
TASKS = (
    "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "Humanoid-v5",
    "Reacher-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5",
)  # fmt: skip
MUJOCO = {task: (FIVE, f"ppo_continuous.py --env-id {task} {MUJOCO_FLAGS}") for task in TASKS}
# Recipes of their own, for tasks on which the common one falls short: longer rollouts.
OWN = {
    "Hopper-v5-own": (
        FIVE,
        "ppo_continuous.py --env-id Hopper-v5 --total-timesteps 1000000 --num-envs 8 "
        "--num-steps 256 --num-minibatches 32 --learning-rate 3e-4 --gae-lambda 0.95 --ent-coef 0",
    ),
    "Swimmer-v5-own": (
        FIVE,
        "ppo_continuous.py --env-id Swimmer-v5 --total-timesteps 1000000 --num-envs 4 "
        "--num-steps 1000 --num-minibatches 16 --ent-coef 0 --no-bound-mean --learning-rate 6e-4 "
        "--gamma 0.9999 --gae-lambda 0.98",
    ),
}
CARRACING = {"CarRacing-v3": (THREE, "ppo_carracing_cnn.py")}
ROWS = CLASSIC | BOX2D | CARRACING | MUJOCO | OWN

# Best published PPO after 1M steps, of versions v2 to v4, and SLM-Lab's on v5 after 4M to 10M.
# (Tianshou; HalfCheetah rl-zoo; Walker2d ikostrikov; Swimmer rl-zoo with a gamma of its own.)
PUBLISHED = {
    "HalfCheetah-v5": ("5,819", "6,241"), "Hopper-v5": ("2,609", "1,654"),
    "Walker2d-v5": ("4,000", "4,379"), "Ant-v5": ("3,258 (v3: no contact cost)", "2,138"),
    "Swimmer-v5": ("120; 282 with gamma 0.9999", "282 (gamma tuned)"),
    "Humanoid-v5": ("787", "2,661"), "Reacher-v5": ("-4.1", "-5.0"),
    "InvertedPendulum-v5": ("1,000", "950"), "InvertedDoublePendulum-v5": ("9,231", "8,384"),
}  # fmt: skip


def train(name, seeds, at_once, resume=None):
    """Run the row's command with these seeds; record results and the median's checkpoint."""
    folder = ROOT / "benchmark" / name
    folder.mkdir(exist_ok=True)
    scratch = tempfile.mkdtemp()
    print(
        f"run folders are in {scratch}/runs, and stay there if a run fails or is stopped",
        flush=True,
    )
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda seed: train_seed(name, seed, scratch, resume), seeds))
    shutil.rmtree(scratch)
    means = {result["args"]["seed"]: result["eval_mean"] for result in records(name)}
    if len(means) == len(ROWS[name][0]):
        median = sorted(means, key=means.get)[len(means) // 2]
        for file in (file for file in folder.glob("seed*") if file.suffix in NAMES):
            if file.stem == f"seed{median}":
                shutil.copy(file, folder / NAMES[file.suffix])
            if file.suffix != ".pt" or name not in CARRACING:  # of which all seeds are kept
                file.unlink()
        if torch.load(folder / "agent.pt", weights_only=True)["args"]["seed"] != median:
            print(f"agent.pt is not of the median seed, {median}: train that one again, too")


def train_seed(name, seed, scratch, resume):
    """Run the command with one seed, or the rest of a stopped run, and record it."""
    folder, command = ROOT / "benchmark" / name, ROWS[name][1]
    script, *flags = command.split()
    line = [sys.executable, ROOT / script, *flags, "--seed", str(seed)]
    line += ["--resume", str(resume.resolve())] if resume else []
    git = ["git", "log", "-1", "--format=%h", "--", script]  # the commit that last changed it
    commit = subprocess.run(git, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", script], cwd=ROOT).returncode:
        commit = f"{commit.strip()}, changed"
    output = subprocess.run(line, cwd=scratch, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{command} --seed {seed}", output, sep="\n", flush=True)
    run_dir = Path(scratch, re.search("run folder (.*)", output)[1])
    result = json.loads((run_dir / "result.json").read_text())
    if name in CARRACING:
        result |= evaluate_stock(run_dir, result["threshold"])
    result["curve"] = thin(result["curve"])
    result["args"]["resume"] = None  # a path on one machine; `resumes` counts
    result |= {"commit": commit.strip(), "run_dir": run_dir.name}
    (folder / f"seed{seed}.json").write_text(json.dumps(result) + "\n")
    checkpoint = torch.load(run_dir / "agent.pt", weights_only=True)
    checkpoint["progress"] = {"global_step": checkpoint["progress"]["global_step"]}
    torch.save(checkpoint | {"optimizer": None}, folder / f"seed{seed}.pt")
    if name in WITH_PICTURES:
        copy_gif(run_dir / "agent.gif", folder / f"seed{seed}.gif")
    if name == "LunarLander-v3":  # the README's example
        shutil.copy(run_dir / "training.png", folder / f"seed{seed}.png")


def copy_gif(source, target, limit=600_000):
    """Copy a GIF, with every second or third frame only where it would be too large."""
    image = Image.open(source)
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    for step in range(1, 10):
        rest = {"append_images": frames[step::step], "duration": step * image.info["duration"]}
        frames[0].save(target, save_all=True, loop=0, **rest)
        if target.stat().st_size <= limit:
            break


def thin(curve):
    """About 100 points of the curve, with as many digits as a picture needs."""
    points = zip(curve["step"], curve["seconds"], curve["episodic_return"], strict=True)
    points = [point for point in points if point[2] is not None]
    points = points[:: -(-len(points) // 100) or 1] + points[-1:]
    steps, seconds, returns = zip(*points, strict=True)
    rounded = {"seconds": [round(x, 1) for x in seconds], "step": steps}
    return rounded | {"episodic_return": [float(f"{x:.5g}") for x in returns]}


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


def records(name):
    """The recorded results of the row's seeds; of ours, those that were trained with its steps."""
    files = [ROOT / "benchmark" / name / f"seed{seed}.json" for seed in ROWS[name][0]]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    return [result for result in results if "commit" in result]


def sb3_records(name):
    """The recorded results of Stable-Baselines3."""
    row = name.removesuffix("-multienv").removesuffix("-own")
    file = ROOT / "benchmark" / row / "sb3.json"
    return json.loads(file.read_text()) if file.exists() and "kl-penalty" not in name else []


def difference(ours, theirs):
    """Difference of the means, its 95% bootstrap interval over seeds, and what follows from it."""
    if min(len(ours), len(theirs)) < 3:
        return "", ""
    rng = np.random.default_rng(0)
    ours, theirs = (np.array([result["eval_mean"] for result in each]) for each in (ours, theirs))
    draws = [rng.choice(each, (10_000, len(each))).mean(1) for each in (ours, theirs)]
    low, high = np.percentile(draws[0] - draws[1], (2.5, 97.5))
    verdict = "ahead" if low > 0 else "behind" if high < 0 else "level"
    return f"{ours.mean() - theirs.mean():+,.1f} [{low:+,.1f}, {high:+,.1f}]", verdict


def outcome(results):
    """The mean of the seeds' means, and their standard deviation."""
    means = [result["eval_mean"] for result in results]
    deviation = f" ± {np.std(means, ddof=1):,.1f}" if len(means) > 1 else ""
    return f"{np.mean(means):,.1f}{deviation} ({len(means)})" if means else ""


def comparison():
    """Print ours beside Stable-Baselines3's after as many steps."""
    print("| environment | steps | ours | SB3, rl-zoo's recipe | difference, 95% interval | |")
    print("|" + " --- |" * 6)
    for name in CLASSIC | BOX2D:
        ours, theirs = records(name), sb3_records(name)
        if ours:
            steps = EngFormatter(places=0, sep="")(ours[0]["args"]["total_timesteps"])
            columns = [name, steps, outcome(ours), outcome(theirs), *difference(ours, theirs)]
            print(f"| {' | '.join(columns)} |")


def carracing():
    """Print what becomes of CarRacing's laps: only a complete one returns more than 900."""
    results = records("CarRacing-v3")
    if results:
        print("| seed | mean of 100 episodes | complete laps: mean | incomplete "
              "| car lost (below 800) | training's last 100 episodes pass 900 after |")  # fmt: skip
        print("|" + " --- |" * 6)
    for result in results:
        returns, curve = np.array(result["eval_returns"]), result["curve"]
        complete, lost = returns > 900, returns < 800
        passed = np.argmax(np.array(curve["episodic_return"]) >= 900)
        columns = [
            result["args"]["seed"],
            f"{result['eval_mean']:.1f} ± {result['eval_std']:.1f}",
            f"{complete.sum()}: {returns[complete].mean():.1f}",
            (~complete & ~lost).sum(),
            lost.sum(),
            f"{curve['step'][passed]:,} actions" if passed else "never",
        ]
        print(f"| {' | '.join(map(str, columns))} |")


def mujoco():
    """Print ours on MuJoCo beside Stable-Baselines3's and what others have published."""
    print("| task | ours | SB3, defaults | difference, 95% interval | | published, v2 to v4, 1M "
          "| SLM-Lab, v5, 4M to 10M |")  # fmt: skip
    print("|" + " --- |" * 7)
    for name in [row for task in MUJOCO for row in (task, f"{task}-own") if row in ROWS]:
        if ours := records(name):
            theirs, published = sb3_records(name), PUBLISHED[name.removesuffix("-own")]
            columns = [name, outcome(ours), outcome(theirs), *difference(ours, theirs), *published]
            print(f"| {' | '.join(columns)} |")


def table():
    """Print every seed of every row."""
    print("| row | mean ± standard deviation over 100 episodes, of each seed | seconds |")
    print("|" + " --- |" * 3)
    for name in ROWS:
        if results := records(name):
            means = ", ".join(f"{r['eval_mean']:,.1f} ± {r['eval_std']:,.1f}" for r in results)
            seconds = [result["learning_seconds"] for result in results]
            print(f"| {name} | {means} | {min(seconds):.0f} to {max(seconds):.0f} |")
        if results := sb3_records(name) if not name.endswith(("-multienv", "-own")) else []:
            means = ", ".join(f"{r['eval_mean']:,.1f} ± {r['eval_std']:,.1f}" for r in results)
            seconds = [result["learning_seconds"] for result in results]
            print(f"| {name}, SB3 | {means} | {min(seconds):.0f} to {max(seconds):.0f} |")


def commands():
    """Print the command of every row."""
    print("| row | command |")
    print("|" + " --- |" * 2)
    for name, (_, command) in ROWS.items():
        print(f"| {name} | `python {command}` |")


def draw_curves(path, rows):
    """Draw training's return over steps, mean and range over (so many) seeds, a panel a row."""
    rows = {name: results for name in rows if (results := records(name))}
    lines = max(math.ceil(len(rows) / 3), 1)
    figure = Figure(figsize=(10, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).flat
    for axis, (name, results) in zip(panels, rows.items(), strict=False):
        groups = {"ours": results, "SB3": sb3_records(name)}
        if f"{name}-own" in ROWS:
            groups["own recipe"] = records(f"{name}-own")
        for color, (label, group) in enumerate(groups.items()):
            curves = [result["curve"] for result in group if "curve" in result]
            if curves:
                steps = np.linspace(
                    max(curve["step"][0] for curve in curves),
                    min(curve["step"][-1] for curve in curves),
                    200,
                )
                returns = [np.interp(steps, c["step"], c["episodic_return"]) for c in curves]
                least, mean, most = (f(returns, axis=0) for f in (np.min, np.mean, np.max))
                axis.fill_between(steps, least, most, color=f"C{color}", alpha=0.25, linewidth=0)
                axis.plot(steps, mean, color=f"C{color}", label=f"{label} ({len(curves)})")
        if results[0]["threshold"] is not None:
            axis.axhline(results[0]["threshold"], color="gray", linestyle=":")
        axis.set_title(name, fontsize=10)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    for axis in list(figure.axes)[len(rows) :]:
        axis.set_axis_off()
    figure.supxlabel("environment steps (in the legends: number of seeds)", fontsize=10)
    figure.supylabel("return, mean of the last 100 episodes", fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of all seeds of the row")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="seeds side by side")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="agent.pt of a stopped run")
    args = parser.parse_args()
    if args.resume and not len(args.rows) == len(args.seeds or []) == 1:
        parser.error("--resume takes one row and one seed")
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for row in args.rows:
        train(row, args.seeds or ROWS[row][0], args.at_once, args.resume)
    for print_table in (comparison, carracing, mujoco, table, commands):
        print_table()
        print()
    draw_curves(ROOT / "benchmark" / "curves.png", CLASSIC | BOX2D | CARRACING)
    draw_curves(ROOT / "benchmark" / "mujoco.png", MUJOCO)
