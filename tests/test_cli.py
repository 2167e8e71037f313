"""The command line: bad input is one line on standard error, exit code 2, nothing on disk."""

import dataclasses
import importlib.machinery
import subprocess
import sys
import types

import pytest
import torch
from conftest import ONCE, ROOT


def assert_refused(result, in_tmp, *words):
    code, output, errors = result
    assert code == 2 and output == ""
    assert errors.count("\n") == 1 and errors.startswith("error: ")
    for word in words:
        assert word in errors
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--num-envs", "0", "from 1"),
        ("--num-envs", "-3", "from 1"),
        ("--num-steps", "0", "from 1"),
        ("--total-timesteps", "0", "from 1"),
        ("--learning-rate", "nan", "from 0"),
        ("--learning-rate", "inf", "from 0"),
        ("--learning-rate", "-0.1", "from 0"),
        ("--gamma", "1.1", "from 0 to 1"),
        ("--gae-lambda", "-0.1", "from 0 to 1"),
        ("--num-minibatches", "0", "from 1 to {half}"),
        ("--num-minibatches", "1000000000", "from 1 to {half}"),
        ("--update-epochs", "0", "from 1"),
        ("--clip-coef", "nan", "from 0"),
        ("--ent-coef", "nan", "from 0"),
        ("--vf-coef", "-1.0", "from 0"),
        ("--max-grad-norm", "nan", "from 1e-08"),
        ("--max-grad-norm", "0", "from 1e-08"),
        ("--target-kl", "-1.0", "from 1e-08"),
        ("--hidden-size", "0", "from 1"),
        ("--checkpoint-interval", "0", "from 1"),
        ("--eval-episodes", "-1", "from 0"),
        ("--seed", "-1", "from 0 to 9223372036854775807"),
        ("--log-std-init", "200", "from -20 to 20"),
        ("--step-timeout", "0", "from 0.1"),
        ("--step-timeout", "10000000", "from 0.1 to 1000000"),
        ("--rank-timeout", "10000000", "from 0.1 to 1000000"),
    ],
)
def test_numbers_out_of_range(script, main, in_tmp, flag, value, allowed):
    if not hasattr(script.Args, flag[2:].replace("-", "_")):
        pytest.skip("not a flag of this script")
    half = script.Args.num_envs * script.Args.num_steps // 2
    assert_refused(main(flag, value), in_tmp, flag, value, allowed.format(half=half))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "Nowhere-v0"), ("Nowhere",)),
        (("--env-id", "no_such_module:Env-v0"), ("no_such_module",)),
        (("--env-kwargs", "nonsense"), ("--env-kwargs", "nonsense")),
        (("--env-kwargs", "gravity=oops("), ("--env-kwargs", "oops(")),
        (("--env-kwargs", "no_such_argument=1"), ("--env-kwargs", "no_such_argument")),
        (("--env-kwargs", "max_episode_steps=0"), ("--env-kwargs", "max_episode_steps")),
        (("--render",), ("--render", "--evaluate")),
        (("--evaluate", "nowhere.pt"), ("nowhere.pt",)),
        (("--resume", "nowhere.pt"), ("nowhere.pt",)),
    ],
)
def test_settings_that_cannot_work(main, in_tmp, flags, words):
    assert_refused(main(*flags), in_tmp, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(main, in_tmp):
    assert_refused(main("--cuda"), in_tmp, "--cuda", "GPU")


@ONCE
@pytest.mark.parametrize(
    "flags",
    [("--no-such-flag", "1"), ("--num-envs", "many"), ("--num-envs", "1e6"), ("--gamma", "x")],
)
def test_what_the_parser_refuses(main, in_tmp, flags):
    code, _, errors = main(*flags)
    assert code == 2 and flags[0] in errors and list(in_tmp.iterdir()) == []


@ONCE
def test_bad_input_through_the_real_command(script, in_tmp):
    command = [sys.executable, ROOT / f"{script.__name__}.py", "--num-envs", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_refused((result.returncode, result.stdout, result.stderr), in_tmp, "--num-envs")


@ONCE
def test_real_command_trains_from_another_folder(script, in_tmp, flags):
    """From start to end, in a process of its own; the progress bar is on standard error."""
    command = [sys.executable, ROOT / f"{script.__name__}.py"]
    command += flags(total_timesteps=128, eval_episodes=2)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("trained agent") and "128/128" in run.stderr
    (folder,) = in_tmp.glob("runs/*")
    assert {"agent.pt", "agent.gif", "training.png", "result.json"} <= {
        path.name for path in folder.iterdir()
    }


@ONCE
def test_run_folder_that_cannot_be_made(main, flags, in_tmp):
    (in_tmp / "runs").write_text("in the way")
    code, _, errors = main(*flags(total_timesteps=64))
    assert code in (1, 2) and errors.startswith("error: ") and "runs" in errors
    assert errors.count("\n") == 1
    assert [path.name for path in in_tmp.iterdir()] == ["runs"]


@ONCE
def test_two_runs_have_a_folder_each(script, small):
    args = dataclasses.replace(small, total_timesteps=64)
    first, second = (script.train(args)["run_dir"] for _ in range(2))
    assert first != second


# Weights & Biases.


def test_track_without_wandb(main, in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it raises ImportError
    assert_refused(main("--track"), in_tmp, "--track", "pip install wandb")


@ONCE
def test_track(main, flags, in_tmp, monkeypatch):
    """wandb.init comes before TensorBoard's writer, which it patches."""
    wandb, calls = types.ModuleType("wandb"), []
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: calls.append((kwargs, list(in_tmp.glob("runs/*/events*"))))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, _, errors = main(*flags(total_timesteps=64, track=True))
    assert code == 0, errors
    ((kwargs, events),) = calls
    (folder,) = in_tmp.glob("runs/*")
    assert kwargs["sync_tensorboard"] is True and kwargs["name"] == folder.name
    assert kwargs["config"]["num_steps"] == 16 and not events


@ONCE
def test_wandb_is_not_imported_unless_asked_for(main, flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(*flags(total_timesteps=64))[0] == 0
