"""What it does to take a time limit for an end: the same command with both, three seeds each.

    python benchmark/truncation.py

CartPole-v1 is cut after 100 steps here, when the pole still stands and would earn 1 a step for
ever, 1 / (1 - gamma) = 100 discounted. Printed is V of the pole upright and at rest. Pendulum-v1,
by the recorded command (benchmark/run.py), is cut after 200 steps and never ends by itself. Printed
is the mean return of 100 evaluation episodes.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from run import ROWS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ppo_continuous  # noqa: E402
import ppo_discrete  # noqa: E402

compute_gae = ppo_discrete.compute_gae
CARTPOLE = "ppo_discrete.py --env-kwargs max_episode_steps=100 --gamma 0.99 --eval-episodes 0"


def confused_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    ends = terminations | truncations
    return compute_gae(rewards, values, next_values, ends, truncations, gamma, gae_lambda)


def train(script, command, seed):
    """The result of the run, quietly."""
    flags = [*command.split()[1:], "--seed", str(seed)]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return script.train(tyro.cli(script.Args, args=flags))


def main():
    os.chdir(tempfile.mkdtemp())
    for name, function in (("bootstrapped", compute_gae), ("taken for an end", confused_gae)):
        ppo_discrete.compute_gae = ppo_continuous.compute_gae = function
        for seed in (1, 2, 3):
            result = train(ppo_discrete, CARTPOLE, seed)
            agent, _ = ppo_discrete.load_agent(f"{result['run_dir']}/agent.pt", "cpu")
            value = agent.get_value(torch.zeros(1, 4)).item()
            print(f"CartPole, cut {name:16} seed {seed}: V = {value:5.1f}", flush=True)
        for seed in (1, 2, 3):
            result = train(ppo_continuous, ROWS["Pendulum-v1"][1], seed)
            mean, std = result["eval_mean"], result["eval_std"]
            print(f"Pendulum, cut {name:16} seed {seed}: {mean:7.1f} ± {std:5.1f}", flush=True)


if __name__ == "__main__":
    main()
