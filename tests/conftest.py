"""Fixtures of all tests, and the settings of a small run of each script."""

import contextlib
import dataclasses
import importlib
import io
import multiprocessing.forkserver
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_envs  # noqa: F401
from gymnasium import spaces

ROOT = Path(__file__).parents[1]
ON_VECTORS = ["ppo_discrete", "ppo_continuous", "ppo_multienv"]
SCRIPTS = [*ON_VECTORS, "ppo_carracing_cnn"]  # whose tests are in test_carracing.py

# The settings that make a run of 8 iterations of 4 x 16 steps out of each script's defaults.
FAST = dict(gamma=0.98, gae_lambda=0.9, learning_rate=2e-3, num_minibatches=4, ent_coef=0.0)
RAW = dict(norm_obs=False, norm_reward=False)
SMALL = {
    "ppo_discrete": FAST,
    "ppo_continuous": FAST
    | RAW
    | {"env_id": "Pendulum-v1", "env_kwargs": ("max_episode_steps=20",)},
    "ppo_multienv": FAST | RAW | {"env_id": "CartPole-v1", "num_workers": 0},
}

os.environ["SDL_VIDEODRIVER"] = "dummy"  # rendering needs no screen
os.environ["SDL_AUDIODRIVER"] = "dummy"


def only(*scripts):
    """A mark: the test is for these scripts."""
    return pytest.mark.parametrize("script", scripts, indirect=True)


ONCE = only("ppo_discrete")  # text that all scripts share, exercised at length in one of them
WITH_PENALTY = only("ppo_discrete", "ppo_continuous")


@pytest.fixture(params=ON_VECTORS, scope="session")
def script(request):
    """Each script in turn, as a module; CarRacing's only where a mark says so."""
    return importlib.import_module(request.param)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_args(script):
    return dataclasses.replace(
        script.Args(), num_envs=4, num_steps=16, total_timesteps=512, update_epochs=2,
        checkpoint_interval=3, eval_episodes=0, **SMALL[script.__name__],
    )  # fmt: skip


@pytest.fixture
def small(script, in_tmp):
    """Args of a run of less than a second: 8 iterations of 4 x 16 steps, no evaluation."""
    return small_args(script)


@pytest.fixture
def flags(script, in_tmp):
    """Gives the command line for `small`, with other values and any further flags."""

    def flags(**changes):
        small = dataclasses.asdict(dataclasses.replace(small_args(script), **changes))
        default = dataclasses.asdict(script.Args())
        words = []
        for name, value in small.items():
            flag = name.replace("_", "-")
            if value != default[name] and isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value != default[name]:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{flag}", *map(str, values)]
        return words

    return flags


def playing(env_id, *env_kwargs):
    """The settings by which a script plays an environment."""
    return {"env_id": env_id, "env_kwargs": env_kwargs}


@pytest.fixture
def toy(script):
    """Gives the settings for a toy environment, with the kind of actions that the script takes."""
    kind = "Box" if script.__name__ == "ppo_continuous" else ""
    return lambda name, *env_kwargs: playing(f"{name}{kind}-v0", *env_kwargs)


@pytest.fixture
def action_space(script):
    """A space that the script can act in."""
    return spaces.Box(-1, 1, (2,)) if script.__name__ == "ppo_continuous" else spaces.Discrete(4)


@pytest.fixture
def agent(script, action_space):
    """An agent for observations (3,), away from the nearly uniform policy of the start."""
    torch.manual_seed(0)
    agent = script.Agent(spaces.Box(-1, 1, (3,)), action_space)
    with torch.no_grad():
        for weight in agent.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    return agent


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory):
    """A small run from beginning to end: args, result, folder, output. Only to be looked at."""
    args = dataclasses.replace(small_args(script), eval_episodes=3)
    output, folder = io.StringIO(), tmp_path_factory.mktemp(script.__name__)
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        result = script.train(args)
    folder = folder / result["run_dir"]
    path = folder / "agent.pt"
    return SimpleNamespace(
        args=args, result=result, folder=folder, path=path, output=output.getvalue()
    )


@pytest.fixture
def record_updates(script, monkeypatch):
    """A list to which each call of `update` in `train` adds what it was given."""
    calls, update = [], script.update

    def spy(agent, optimizer, rollout, advantages, returns, args, *rest):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert isinstance(optimizer, torch.optim.Adam)
        assert {group["eps"] for group in optimizer.param_groups} == {1e-5}, "detail 3"
        steps = {int(state["step"]) for state in optimizer.state.values()}
        weights = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        metrics = update(agent, optimizer, rollout, advantages, returns, args, *rest)
        calls.append(
            SimpleNamespace(
                rates=rates, steps=steps, weights=weights, rollout=rollout, rest=rest,
                metrics=dict(metrics), advantages=advantages, returns=returns,
            )
        )  # fmt: skip
        return metrics

    monkeypatch.setattr(script, "update", spy)
    return calls


@pytest.fixture
def no_gif(script, monkeypatch):
    """A GIF takes seconds, and is looked at in other tests."""
    monkeypatch.setattr(script, "save_gif", lambda *inputs: None)


@pytest.fixture
def main(script, in_tmp, monkeypatch, capsys):
    """Runs `main` with flags, in this process; returns exit code, standard output and error."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
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


class Run:
    """A script in a process and a group of its own, like subprocess.Popen, but without a pipe.

    It is forked from a server that has imported the libraries, which takes two seconds otherwise.
    """

    def __init__(self, context, logs, folder, command, environment):
        self.logs, inputs = logs, (logs, folder, list(map(str, command)), environment)
        self.process = context.Process(target=run_script, args=inputs)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def read(self, name):
        path = self.logs / name
        return path.read_text() if path.exists() else ""

    def communicate(self, timeout=60):
        """Exit code, standard output and standard error of the process, at its end."""
        self.process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s"
        return self.poll(), self.read("stdout"), self.read("stderr")


def run_script(logs, folder, command, environment):
    """What the process does: the script's part as `__main__`."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(logs / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)  # lines are waited for
    multiprocessing.set_start_method(None, force=True)  # for its children: the default
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture(scope="session")
def forkserver():
    context = multiprocessing.get_context("forkserver")
    libraries = "matplotlib.figure pygame pytest torch.distributed torch.utils.tensorboard tyro"
    context.set_forkserver_preload([*libraries.split(), "gymnasium.envs.box2d"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def start_script(forkserver, in_tmp, tmp_path_factory):
    """Starts a script as a process of its own, in the empty folder; the test's end kills it."""
    started = []

    def start_script(*command, **environment):
        logs = tmp_path_factory.mktemp("logs")
        started.append(Run(forkserver, logs, in_tmp, command, environment))
        return started[-1]

    yield start_script
    for run in started:
        run.kill()
        run.process.join()


@pytest.fixture
def start(script, start_script):
    """Starts the script with flags."""
    return lambda *flags: start_script(ROOT / f"{script.__name__}.py", *flags)


def load(path):
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def pytest_collection_finish(session):
    """Start the dry run of benchmark/gpu.py beside the other tests: it takes half a minute."""
    if any(item.name == "test_dry_run" for item in session.items):
        folder = Path(tempfile.mkdtemp())
        command = [sys.executable, ROOT / "benchmark" / "gpu.py", "--dry-run", folder / "out"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        session.config.dry_run = subprocess.Popen(command, **pipe), folder


@pytest.fixture
def dry_run(request):
    """The process of the dry run, and the folder with its folder `out`."""
    process, folder = request.config.dry_run
    yield process, folder
    process.kill()
    shutil.rmtree(folder)
