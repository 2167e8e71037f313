"""Checkpoints: whole or not there, refused in one sentence, safe to kill."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ONCE, ROOT, assert_same_weights, load

CPU = torch.device("cpu")


def test_loaded_agent_is_the_trained_one(script, trained):
    agent, args = script.load_agent(trained.path, CPU)
    assert args == trained.args
    assert_same_weights(agent.state_dict(), load(trained.path)["agent"])


def test_settings_of_the_network_are_in_the_checkpoint(script, small):
    args = dataclasses.replace(small, hidden_size=24, norm_obs=True, total_timesteps=64)
    agent, loaded = script.load_agent(f"{script.train(args)['run_dir']}/agent.pt", CPU)
    assert loaded.hidden_size == 24 and loaded.norm_obs
    assert 24 in {weight.shape[0] for weight in agent.parameters()}
    assert agent.normalize.count == 64


def test_cut_short_at_any_length_is_refused(script, trained, in_tmp):
    data, cut = trained.path.read_bytes(), in_tmp / "cut.pt"
    for length in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.pt") as error:
            script.load_agent(cut, CPU)
        assert "\n" not in str(error.value) and script.__name__ in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"no checkpoint at all",
        {"script": "ppo_other", "args": {}, "agent": {}},
        {"agent": {}},
        [1, 2, 3],
        {"script": "ppo_discrete", "args": {"unknown": 1}},
        np.ones(3),
    ],
)
def test_other_files_are_refused(script, main, in_tmp, content):
    path = in_tmp / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for there in (path, in_tmp / "missing.pt", in_tmp):
        with pytest.raises(ValueError, match=there.name) as error:
            script.load_agent(there, CPU)
        assert "\n" not in str(error.value)
    for flag in ("--evaluate", "--resume"):
        code, output, errors = main(flag, path)
        assert code == 2 and output == "" and errors.count("\n") == 1
        assert errors.startswith("error: ") and "other.pt" in errors


class Treacherous:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("treason", "w")


def test_code_in_a_file_is_not_run(script, in_tmp):
    torch.save({"script": script.__name__, "args": Treacherous()}, in_tmp / "other.pt")
    with pytest.raises(ValueError):
        script.load_agent(in_tmp / "other.pt", CPU)
    assert not (in_tmp / "treason").exists()


def test_checkpoint_of_another_script_is_refused_by_name(script, trained, in_tmp):
    torch.save(load(trained.path) | {"script": "ppo_other"}, in_tmp / "other.pt")
    with pytest.raises(ValueError, match="ppo_other"):
        script.load_agent(in_tmp / "other.pt", CPU)


def test_an_environment_that_raises_beside_a_checkpoint(script, trained, main, in_tmp):
    """Its own error, not a word about the checkpoint; an unknown environment is one line."""
    checkpoint = load(trained.path)
    for env_id in ("RaisesInInit-v0", "Nowhere-v0"):
        checkpoint["args"] |= {"env_id": env_id, "env_kwargs": ()}
        torch.save(checkpoint, in_tmp / "other.pt")
        if env_id == "RaisesInInit-v0":
            with pytest.raises(RuntimeError, match="no track"):
                main("--evaluate", in_tmp / "other.pt")
        else:
            code, _, errors = main("--evaluate", in_tmp / "other.pt")
            assert code == 2 and errors.count("\n") == 1 and "Nowhere" in errors


def test_weights_that_do_not_fit_are_refused(trained, main, in_tmp):
    checkpoint = load(trained.path)
    checkpoint["agent"] = {"weight": torch.zeros(2)}
    torch.save(checkpoint, in_tmp / "other.pt")
    code, _, errors = main("--resume", in_tmp / "other.pt")
    assert code == 2 and errors.count("\n") == 1 and "other.pt" in errors


@ONCE
def test_a_renamed_experiment_is_still_of_this_script(script, small):
    args = dataclasses.replace(small, exp_name="../a/b", total_timesteps=64)
    result = script.train(args)
    assert len(script.Path(result["run_dir"]).parts) == 2
    assert script.load_agent(f"{result['run_dir']}/agent.pt", CPU)[1].exp_name == "../a/b"


def test_nothing_but_plain_types_is_saved(trained):
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

    check(dict(load(trained.path)))


def test_checkpoints_are_saved_at_the_interval_and_at_the_end(script, small, monkeypatch):
    """8 iterations, an interval of 3: after the 3rd, the 6th and the last."""
    save, steps = torch.save, []

    def spy(content, path):
        steps.append(content["progress"]["global_step"])
        save(content, path)

    monkeypatch.setattr(torch, "save", spy)
    script.train(small)
    assert steps == [3 * 64, 6 * 64, 8 * 64]


@ONCE
def test_failure_while_saving_leaves_the_old_checkpoint(script, small, monkeypatch, in_tmp):
    """The disk is full at the second save, in the middle of the file."""
    save, saved = torch.save, []

    def fail(content, path):
        if saved:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        saved.append(content["progress"]["global_step"])
        save(content, path)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        script.train(small)
    (path,) = in_tmp.glob("runs/*/agent.pt")
    assert load(path)["progress"]["global_step"] == saved[0] == 3 * 64


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_run_with_a_checkpoint(
    script, small, monkeypatch, in_tmp, capsys, number, code
):
    """After its iteration; the handlers of before are there again."""
    update, calls, before = script.update, [], signal.getsignal(number)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(number)
        return update(*args)

    monkeypatch.setattr(script, "update", interrupted)
    with pytest.raises(SystemExit) as stop:
        script.train(small)
    assert stop.value.code == code and len(calls) == 2
    (path,) = in_tmp.glob("runs/*/agent.pt")
    assert load(path)["progress"]["global_step"] == 128
    assert f"--resume {path.relative_to(in_tmp)}" in capsys.readouterr().out
    assert signal.getsignal(number) is before


@ONCE
def test_signal_before_the_first_iteration(script, small, monkeypatch, capsys):
    """There is no checkpoint to continue with, and none is named."""
    open_run = script.open_run

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return open_run(*args)

    monkeypatch.setattr(script, "open_run", interrupted)
    with pytest.raises(SystemExit) as stop:
        script.train(small)
    assert stop.value.code == 130
    assert "--resume" not in capsys.readouterr().out


# In processes of their own.


def wait_for(process, folder, pattern):
    """The first file of this kind that the process makes."""
    for _ in range(600):
        if paths := list(folder.glob(pattern)):
            return paths[0]
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} within a minute")


def wait_for_line(process, words):
    """The line of standard output that holds these words."""
    for _ in range(1200):
        for line in process.read("stdout").splitlines(keepends=True):
            if words in line and line.endswith("\n"):
                return line
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.05)
    raise AssertionError(f"no {words!r} within a minute")


@ONCE
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(in_tmp, start, flags, number, code):
    process = start(*flags(total_timesteps=10**8, checkpoint_interval=10**6))
    wait_for_line(process, "run folder")
    wait_for(process, in_tmp, "runs/*/events*")
    time.sleep(0.5)
    assert not list(in_tmp.glob("runs/*/agent.pt"))
    process.send_signal(number)
    ended, output, errors = process.communicate()
    assert ended == code and "Traceback" not in errors, errors
    assert "stopping after this iteration" in output and "--resume" in output
    (path,) = in_tmp.glob("runs/*/agent.pt")
    assert load(path)["progress"]["global_step"] > 0


@ONCE
def test_ctrl_c_that_also_ends_the_tee_of_its_output(script, in_tmp, flags):
    """`2>&1 | tee log`: the output goes nowhere, and the checkpoint is saved all the same."""
    command = [sys.executable, ROOT / f"{script.__name__}.py"]
    command += flags(total_timesteps=10**8, checkpoint_interval=10**6)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, in_tmp, "runs/*/events*")
    time.sleep(1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (path,) = in_tmp.glob("runs/*/agent.pt")
    assert load(path)["progress"]["global_step"] >= 128


@ONCE
def test_second_signal_ends_at_once(in_tmp, start):
    """In the middle of a rollout of more than a minute."""
    process = start("--num-envs", 4, "--num-steps", 500_000, "--total-timesteps", 10**8)
    wait_for_line(process, "run folder")
    wait_for(process, in_tmp, "runs/*/events*")
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "stopping after this iteration")
    time.sleep(0.5)  # the handler has returned
    process.send_signal(signal.SIGINT)
    code, _, errors = process.communicate()
    assert code == -signal.SIGINT and "Traceback" not in errors
    assert os.listdir(in_tmp) == ["runs"]


@ONCE
def test_kill_at_any_time_leaves_a_good_checkpoint(script, in_tmp, start, flags, main):
    """Runs that save all the time are killed; each time the checkpoint loads, and goes on."""
    command, steps, rng = flags(total_timesteps=10**8, checkpoint_interval=1), [0], random.Random(0)
    for _ in range(2):
        process = start(*command)
        folder = in_tmp / wait_for_line(process, "run folder").split()[-1]
        path = wait_for(process, folder, "agent.pt")
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:
            assert process.poll() is None, process.read("stderr")
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        steps.append(load(path)["progress"]["global_step"])
        assert steps[-1] > steps[-2]
        command = ["--resume", path]
    code, _, errors = main("--resume", path, "--total-timesteps", steps[-1] + 64)
    assert code == 0, errors
    ends = [load(path)["progress"]["global_step"] for path in in_tmp.glob("runs/*/agent.pt")]
    assert max(ends) == steps[-1] + 64
