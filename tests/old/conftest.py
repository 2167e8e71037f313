"""Fixtures of the tests of the scripts that are not yet rebuilt to the second design.

A rebuilt script leaves SCRIPTS here and joins CONVERTED in tests/conftest.py.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = ["ppo_continuous", "ppo_carracing_cnn", "ppo_multienv"]


def only(*scripts):
    """A mark: the test is for these scripts."""
    left = [script for script in scripts if script in SCRIPTS]
    return pytest.mark.parametrize("script", left, indirect=True)


ON_VECTORS = only("ppo_continuous", "ppo_multienv")
WITH_PENALTY = only("ppo_continuous")
WITH_WORKERS = only("ppo_continuous", "ppo_carracing_cnn", "ppo_multienv")

os.environ["SDL_VIDEODRIVER"] = "dummy"  # rendering needs no screen
torch.set_num_threads(1)  # for networks as small as these, more are slower


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module; ON_VECTORS keeps those that the toy environments fit."""
    return importlib.import_module(request.param)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(script, in_tmp):
    """Args of a run that takes a second: 8 iterations of 4 x 16 steps."""
    changes = {}
    if script.__name__ == "ppo_continuous":
        changes = dict(
            env_id="Pendulum-v1", env_kwargs=("max_episode_steps=20",), num_workers=0,
            norm_obs=False, norm_reward=False, gamma=0.98, gae_lambda=0.9, learning_rate=2e-3,
            num_minibatches=4, ent_coef=0.0, log_std_init=0.0,
        )  # fmt: skip
    if script.__name__ == "ppo_multienv":
        changes = dict(
            env_ids=("CartPole-v1",), num_workers=0, norm_obs=False, norm_reward=False, gamma=0.98,
            gae_lambda=0.9, learning_rate=2e-3, num_minibatches=4, ent_coef=0.0,
        )  # fmt: skip
    return dataclasses.replace(
        script.Args(), num_envs=4, num_steps=16, total_timesteps=512, update_epochs=2,
        checkpoint_interval=3, eval_episodes=3, **changes,
    )  # fmt: skip


@pytest.fixture
def toy(script):
    """Gives the settings for a toy environment, with the kind of actions that the script takes."""
    kind = "Box" if script.__name__ == "ppo_continuous" else ""
    return lambda name: playing(script, f"toy_envs:{name}{kind}-v0")


def playing(script, env_id, *env_kwargs):
    """The settings by which a script plays this environment."""
    if script.__name__ == "ppo_multienv":
        return {"env_ids": (env_id,), "env_kwargs": env_kwargs}
    return {"env_id": env_id, "env_kwargs": env_kwargs}


@pytest.fixture
def start(script, in_tmp):
    """Starts the script as a process of its own, in the empty folder; the test's end kills it."""
    started = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, ROOT / f"{script.__name__}.py", *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def main(script, monkeypatch, capsys):
    """Runs `main` with flags, in this process; returns exit code, standard output and error."""

    def main(*flags):
        flags = [str(flag) for flag in flags]
        if script.__name__ == "ppo_multienv":
            flags = ["--env-ids" if flag == "--env-id" else flag for flag in flags]
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags])
        try:
            script.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        return code, *capsys.readouterr()

    return main
