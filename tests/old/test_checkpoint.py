"""Checkpoints: whole or not there, refused in one sentence, safe to kill."""

import dataclasses
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from old.conftest import ON_VECTORS

pytestmark = ON_VECTORS

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(script, small):
    """A checkpoint of a short run."""
    return script.Path(script.train(small)["run_dir"]) / "agent.pt"


def test_loaded_agent_plays_as_it_was_evaluated(script, small, in_tmp):
    args = dataclasses.replace(small, norm_obs=True, total_timesteps=2048)
    result = script.train(args)
    agent, loaded = script.load_agent(f"{result['run_dir']}/agent.pt", CPU)
    returns = script.evaluate(agent, loaded, args.eval_episodes, args.seed, CPU)
    assert returns.tolist() == result["eval_returns"]
    assert dataclasses.asdict(loaded) == dataclasses.asdict(args)


def test_cut_short_at_any_length_is_refused(script, checkpoint):
    data = checkpoint.read_bytes()
    cut = checkpoint.with_name("cut.pt")
    for length in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.pt is damaged, or no checkpoint") as error:
            script.load_agent(cut, CPU)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"no checkpoint at all",
        {"script": "ppo_other", "args": {}, "agent": {}},
        {"agent": {}},
        [1, 2, 3],
        {"script": "ppo_continuous", "args": {"unknown": 1}},
        np.ones(3),
    ],
)
def test_other_files_are_refused(script, in_tmp, content):
    path = in_tmp / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pt is .*checkpoint of") as error:
        script.load_agent(path, CPU)
    assert "\n" not in str(error.value)
    for nowhere in (in_tmp / "missing.pt", in_tmp):
        with pytest.raises(ValueError, match="is not a file"):
            script.load_agent(nowhere, CPU)


def test_nothing_but_plain_types_is_saved(checkpoint):
    def check(value):
        if isinstance(value, dict):
            for key, item in value.items():
                check(key)
                check(item)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (bool, int, float, str, torch.Tensor), value

    check(dict(torch.load(checkpoint, weights_only=True)))


def test_failure_while_saving_leaves_the_old_checkpoint(script, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    agent, args = script.load_agent(checkpoint, CPU)
    optimizer = torch.optim.Adam(agent.parameters())
    with pytest.raises(OSError, match="No space left"):
        script.save_checkpoint(checkpoint, args, agent, optimizer, script.Progress(1))
    assert checkpoint.read_bytes() == before


QUICK = (
    "--num-envs", "4", "--num-steps", "16", "--eval-episodes", "3", "--num-minibatches", "4",
)  # fmt: skip
ENDLESS = (*QUICK, "--total-timesteps", "100000000", "--checkpoint-interval", "1")


def wait_for_checkpoint(in_tmp, process):
    for _ in range(600):
        if paths := list(in_tmp.glob("runs/*/agent.pt")):
            return paths[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no checkpoint within a minute")


def test_kill_at_any_time_leaves_a_good_checkpoint(script, in_tmp, start):
    """A run that saves all the time is killed five times; each time it goes on from its file."""
    process = start(*ENDLESS)
    path = wait_for_checkpoint(in_tmp, process)
    rng, steps = random.Random(0), []
    for _ in range(5):
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        checkpoint, _ = script.read_checkpoint(path)
        steps.append(checkpoint["progress"]["global_step"])
        script.load_agent(path, CPU)
        before = path.stat().st_mtime_ns
        process = start("--resume", str(path))
        while path.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
    process.kill()
    process.communicate()
    assert steps == sorted(steps) and steps[0] > 0 and len(set(steps)) == 5
    assert len(list(in_tmp.glob("runs/*"))) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_ends_the_run(script, in_tmp, start, number, code):
    process = start(*ENDLESS[:-2], "--checkpoint-interval", "1000000")
    while not list(in_tmp.glob("runs/*/events*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(1)
    assert not list(in_tmp.glob("runs/*/agent.pt"))
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "stopping after this iteration" in errors
    assert "--resume" in output
    (path,) = in_tmp.glob("runs/*/agent.pt")
    checkpoint, _ = script.read_checkpoint(path)
    step = checkpoint["progress"]["global_step"]
    assert step > 0
    process = start("--resume", str(path), "--total-timesteps", str(step + 1000))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "trained agent" in output
    assert (path.parent / "result.json").exists()
    assert script.read_checkpoint(path)[0]["progress"]["global_step"] >= step + 1000


def test_second_signal_ends_at_once(script, in_tmp, start):
    process = start("--num-envs", "4", "--num-steps", "500000", "--total-timesteps", "100000000")
    while not list(in_tmp.glob("runs/*/events*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(2)  # in the middle of a rollout of more than a minute
    process.send_signal(signal.SIGINT)
    told = ""
    while "stopping after this iteration" not in told:
        character = process.stderr.read(1)
        assert character, told
        told += character
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
    assert os.listdir(in_tmp) == ["runs"]
