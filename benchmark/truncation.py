"""What it costs to take a time limit for an end: Pendulum-v1, learned with and without.

    python benchmark/truncation.py

Every episode of Pendulum is cut after 200 steps and none terminates. Each of three seeds is trained
by the recorded command (benchmark/run.py), once as it is and once with the cuts counted as
terminations, so that nothing is bootstrapped there; all else is the same.
"""

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path

import tyro
from run import ROWS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ppo_continuous  # noqa: E402

compute_gae = ppo_continuous.compute_gae


def confused_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    ends = terminations | truncations
    return compute_gae(rewards, values, next_values, ends, truncations, gamma, gae_lambda)


def main():
    seeds, command = ROWS["Pendulum-v1"]
    os.chdir(tempfile.mkdtemp())
    for name, function in (("bootstrapped", compute_gae), ("taken for an end", confused_gae)):
        ppo_continuous.compute_gae = function
        for seed in seeds:
            flags = [*shlex.split(command)[1:], "--seed", str(seed)]
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                result = ppo_continuous.train(tyro.cli(ppo_continuous.Args, args=flags))
            mean, std = result["eval_mean"], result["eval_std"]
            print(f"time limit {name:16} seed {seed}: {mean:7.1f} ± {std:5.1f}", flush=True)


if __name__ == "__main__":
    main()
