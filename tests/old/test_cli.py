"""Bad input: one line on standard error, exit code 2, nothing on disk; and faults of a run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from old.conftest import ON_VECTORS, playing

pytestmark = ON_VECTORS

ROOT = Path(__file__).parents[2]


def assert_refused(result, in_tmp, *words):
    code, output, errors = result
    assert code == 2 and output == ""
    assert errors.count("\n") == 1 and errors.startswith("error: ")
    for word in words:
        assert word in errors.replace("--env-ids", "--env-id")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--num-envs", "0", "at least 1"),
        ("--num-envs", "-3", "at least 1"),
        ("--num-steps", "0", "at least 1"),
        ("--total-timesteps", "0", "at least 1"),
        ("--learning-rate", "nan", "at least 0"),
        ("--learning-rate", "inf", "at least 0"),
        ("--learning-rate", "-0.1", "at least 0"),
        ("--gamma", "1.1", "from 0 to 1"),
        ("--gae-lambda", "-0.1", "from 0 to 1"),
        ("--num-minibatches", "0", "from 1 to {half}"),
        ("--num-minibatches", "1000000000", "from 1 to {half}"),
        ("--update-epochs", "0", "at least 1"),
        ("--clip-coef", "nan", "at least 0"),
        ("--ent-coef", "nan", "at least 0"),
        ("--vf-coef", "-1.0", "at least 0"),
        ("--max-grad-norm", "nan", "at least 0"),
        ("--target-kl", "-1.0", "at least 0"),
        ("--checkpoint-interval", "0", "at least 1"),
        ("--eval-episodes", "0", "at least 1"),
        ("--seed", "-1", "from 0 to 9223372036854775807"),
    ],
)
def test_numbers_out_of_range(script, main, in_tmp, flag, value, allowed):
    half = script.Args.num_envs * script.Args.num_steps // 2
    assert_refused(main(flag, value), in_tmp, flag, value, allowed.format(half=half))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "Nowhere-v0"), ("--env-id Nowhere-v0", "Nowhere")),
        (("--env-id", "no_such_module:Env-v0"), ("--env-id", "no_such_module")),
        (("--num-envs", "1", "--num-steps", "1"), ("--num-envs", "--num-steps", "at least 2")),
        (("--env-id", "toy_envs:DictObservation-v0"), ("--env-id", "Dict", "Flatten")),
        (("--env-id", "FrozenLake-v1"), ("--env-id FrozenLake-v1", "Discrete(16)", "Box")),
        (("--env-id", "toy_envs:Broken-v0"), ("--env-id", "no track no car")),
        (("--env-id", "toy_envs:OldStep-v0"), ("--env-id", "does not start", "unpack")),
        (("--env-id", "toy_envs:ManyBounds-v0"), ("--env-id", "observes Box", "0.5")),
        (("--env-kwargs", "nonsense"), ("--env-kwargs",)),
        (("--env-kwargs", "gravity=oops("), ("--env-kwargs",)),
        (("--env-kwargs", "no_such_argument=1"), ("no_such_argument",)),
        (("--render",), ("--render", "--evaluate")),
        (("--evaluate", "nowhere.pt"), ("nowhere.pt",)),
        (("--resume", "nowhere.pt"), ("nowhere.pt",)),
    ],
)
def test_settings_that_cannot_work(main, in_tmp, flags, words):
    assert_refused(main(*flags), in_tmp, *words)


def test_the_wrong_kind_of_actions(script, main, in_tmp):
    env_id, words = {
        "ppo_continuous": ("CartPole-v1", "vectors"),
        "ppo_multienv": ("toy_envs:MatrixActions-v0", "vectors"),
    }[script.__name__]
    assert_refused(main("--env-id", env_id), in_tmp, f"--env-id {env_id}", words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(main, in_tmp):
    assert_refused(main("--cuda"), in_tmp, "--cuda", "GPU")


@pytest.mark.parametrize(
    "flags",
    [("--no-such-flag", "1"), ("--num-envs", "many"), ("--num-envs", "1e6"), ("--gamma", "x")],
)
def test_what_the_parser_refuses(main, in_tmp, flags):
    code, _, errors = main(*flags)
    assert code == 2 and flags[0] in errors and list(in_tmp.iterdir()) == []


def test_one_bad_input_through_the_real_command(script, in_tmp):
    command = [sys.executable, ROOT / f"{script.__name__}.py", "--num-envs", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_refused((result.returncode, result.stdout, result.stderr), in_tmp, "--num-envs")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--env-id", "NanObservation"), "observation"),
        (("--env-id", "NanReward"), "reward"),
        (("--env-id", "NanFinal"), "value"),
        (("--learning-rate", "1e38"), "loss"),
    ],
)
def test_not_finite_stops_the_run(script, main, in_tmp, flags, what):
    if flags[0] == "--env-id":
        kind = "Box" if script.__name__ == "ppo_continuous" else ""
        flags = (flags[0], f"toy_envs:{flags[1]}{kind}-v0")
    code, output, errors = main(*flags, "--num-envs", 4, "--num-steps", 16, "--num-minibatches", 4)
    assert code == 1 and output.startswith("run folder ") and output.count("\n") == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and what in last and "not finite at step " in last
    assert "Traceback" not in errors
    assert not list(in_tmp.glob("runs/*/agent.pt"))


def test_run_folder_that_cannot_be_made(main, in_tmp):
    (in_tmp / "runs").write_text("in the way")
    code, _, errors = main("--total-timesteps", 100)
    assert code == 1 and errors.startswith("error: ") and "runs" in errors
    assert errors.count("\n") == 1


def test_two_runs_of_one_second_have_a_folder_each(script, in_tmp):
    assert script.make_run_dir(script.Args()) != script.make_run_dir(script.Args())
    args = script.Args(exp_name="../a/b", **playing(script, "toy_envs:Toy-v0"))
    assert script.make_run_dir(args).parent == Path("runs")
    assert len(list(in_tmp.glob("runs/*"))) == 3


def test_an_environment_that_cannot_be_drawn_costs_only_the_gif(script, main, in_tmp):
    name = "ToyBox" if script.__name__ == "ppo_continuous" else "Toy"
    code, output, _ = main("--env-id", f"toy_envs:{name}-v0", *QUICK)
    assert code == 0 and "no GIF" in output and output.splitlines()[-1].startswith("trained agent")
    assert list(in_tmp.glob("runs/*/result.json")) and not list(in_tmp.glob("runs/*/*.gif"))


QUICK = (
    "--num-envs", 4, "--num-steps", 16, "--total-timesteps", 256, "--eval-episodes", 2,
    "--num-minibatches", 4,
)  # fmt: skip


def test_evaluate_repeats_the_result(main, in_tmp):
    code, trained, _ = main(*QUICK)
    assert code == 0
    (path,) = in_tmp.glob("runs/*/agent.pt")
    before = sorted(path.parent.iterdir())
    code, output, _ = main("--evaluate", path)
    assert code == 0 and output.splitlines() == trained.splitlines()[-1:]
    code, output, _ = main("--evaluate", path, "--eval-episodes", 7)
    assert code == 0 and "over 7 episodes" in output
    assert sorted(path.parent.iterdir()) == before


def test_resume_keeps_the_saved_settings_and_takes_new_ones(main, script, in_tmp):
    main(*QUICK, "--gamma", 0.5)
    (path,) = in_tmp.glob("runs/*/agent.pt")
    code, output, _ = main("--resume", path, "--total-timesteps", 512)
    assert code == 0 and "over 2 episodes" in output
    checkpoint, args = script.read_checkpoint(path)
    assert checkpoint["progress"]["global_step"] == 512
    assert args.gamma == 0.5 and args.num_envs == 4 and args.resume is None
    for flag in ("--resume", "--evaluate"):
        changed = "--no-norm-obs" if args.norm_obs else "--norm-obs"
        code, _, errors = main(flag, path, changed)
        assert code == 2 and "--norm-obs cannot differ" in errors and errors.count("\n") == 1
    slim = path.with_name("slim.pt")
    torch.save(checkpoint | {"optimizer": None}, slim)
    code, _, errors = main("--resume", slim)
    assert code == 2 and "slim.pt holds no optimiser state" in errors
    assert main("--evaluate", slim)[0] == 0
    copy = path.with_name("copy.pt")
    shutil.copy(path, copy)
    code, _, errors = main("--resume", copy)
    assert code == 2 and "takes the agent.pt of a run folder" in errors and "copy.pt" in errors
    code, _, errors = main("--resume", path, "--evaluate", path)
    assert code == 2 and "exclude each other" in errors
    code, _, errors = main("--resume", path, "--env-id", "Acrobot-v1")
    assert code == 2 and "--env-id cannot differ" in errors.replace("--env-ids", "--env-id")
