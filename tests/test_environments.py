"""Environments of every kind: those that run, and how those that cannot are refused."""

import dataclasses
import traceback
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ONCE, load, only, playing
from gymnasium import spaces

TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"  # by Gymnasium's version


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DictObservation", [0.25, 0.5, 0, 1, 0]),
        ("TupleObservation", [0, 0, 1, 0.25, 0.5]),
        ("MultiDiscreteObservation", [0, 1, 1, 0, 0]),
        ("Image", [0] * 48),
        ("Untidy", None),
    ],
)
def test_observations_are_flattened(script, small, toy, name, expected):
    args = dataclasses.replace(small, **toy(name))
    env = script.make_env(args)
    obs, info = env.reset(seed=1)
    if expected is not None:
        assert obs.tolist() == expected
    assert obs in env.observation_space and info == {}
    obs, reward, *_, info = env.step(env.action_space.sample())
    assert obs in env.observation_space and type(reward) is float and info == {}


@ONCE
@pytest.mark.parametrize(
    "name", ["DictObservation", "TupleObservation", "MultiDiscreteObservation", "Untidy", "Image"]
)
def test_observations_of_every_kind_train(main, flags, toy, name):
    code, output, errors = main(*flags(**toy(name), total_timesteps=64, norm_obs=True))
    assert code == 0, errors
    told = [line for line in output.splitlines() if "ppo_carracing_cnn.py" in line]
    assert len(told) == (1 if name == "Image" else 0)


@ONCE
@pytest.mark.parametrize(("env_id", "size"), [("FrozenLake-v1", 16), (TAXI, 500)])
def test_observations_that_are_a_number(script, main, flags, no_gif, env_id, size):
    args = flags(**playing(env_id, "max_episode_steps=20"), total_timesteps=64, eval_episodes=2)
    code, output, errors = main(*args)
    assert code == 0 and "over 2 episodes" in output, errors
    (path,) = Path().glob("runs/*/agent.pt")
    agent, _ = script.load_agent(path, "cpu")
    assert agent.get_value(torch.zeros(size)).shape == ()


def test_environment_of_ones_own_module(script, main, flags, in_tmp):
    """`module:Name-v0` imports the module; its run ends with all files."""
    name = "ToyBox" if script.__name__ == "ppo_continuous" else "Toy"
    args = flags(**playing(f"toy_envs:{name}-v0"), total_timesteps=64, eval_episodes=2)
    code, output, errors = main(*args)
    assert code == 0, errors
    assert "no GIF" in output, "the toy environments cannot be drawn"
    assert output.splitlines()[-1].startswith("trained agent     10.0 ±   0.0 over 2 episodes")
    assert list(in_tmp.glob("runs/*/result.json")) and not list(in_tmp.glob("runs/*/agent.gif"))


def test_arguments_reach_the_environment(script, small):
    args = dataclasses.replace(
        small, **playing("CartPole-v1", "sutton_barto_reward=True", "max_episode_steps=7")
    )
    env = script.make_env(args)
    assert env.unwrapped._sutton_barto_reward is True and env.spec.max_episode_steps == 7


@only("ppo_discrete", "ppo_multienv")
def test_actions_that_count_from_five(script):
    env = script.make_env(script.Args(env_id="CountsFromFive-v0"))
    env.reset(seed=1)
    assert env.action_space == spaces.Discrete(2)
    assert [env.step(action)[1] for action in (0, 1)] == [0, 1]


@ONCE
def test_without_a_time_limit(main, flags, toy):
    """It is told, and trains."""
    code, output, errors = main(*flags(**toy("WithoutLimit"), total_timesteps=64))
    assert code == 0, errors
    (line,) = [line for line in output.splitlines() if "no time limit" in line]
    assert "10,000" in line and "WithoutLimit" in line
    _, output, _ = main(*flags(**toy("Toy"), total_timesteps=64))
    assert "time limit" not in output


# Refused: one line on standard error, exit code 2, nothing on disk.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OldReset", ["reset", "(observation, info)"]),
        ("OldStep", ["step", "terminated, truncated"]),
        ("WrongLength", ["observation", "(2,)"]),
        ("WrongLengthInDict", ["observation"]),
        ("SequenceObservation", ["Sequence"]),
    ],
)
def test_misfits_are_refused(main, flags, toy, in_tmp, name, words):
    code, output, errors = main(*flags(**toy(name)))
    assert code == 2 and output == "" and errors.count("\n") == 1, errors
    assert errors.startswith("error: ") and "--env-id" in errors and name in errors
    assert all(word in errors for word in words), errors
    assert list(in_tmp.iterdir()) == []


def test_the_wrong_kind_of_actions(script, main, in_tmp, flags):
    env_id, word = {
        "ppo_discrete": ("Pendulum-v1", "Discrete"),
        "ppo_continuous": ("CartPole-v1", "Box"),
        "ppo_multienv": ("MatrixActions-v0", "Box"),
    }[script.__name__]
    code, output, errors = main(*flags(**playing(env_id)))
    assert code == 2 and output == "" and errors.count("\n") == 1
    assert env_id in errors and word in errors and list(in_tmp.iterdir()) == []


# Errors of the environment's own: its traceback, and a last line that says which and when.


def report_of(error):
    """What Python prints for an exception that nothing catches."""
    return "".join(traceback.format_exception(error)).strip()


@pytest.mark.parametrize("name", ["RaisesInInit", "RaisesInReset", "RaisesInFirstStep"])
def test_an_environment_that_raises_at_the_start(main, flags, toy, in_tmp, name):
    with pytest.raises(RuntimeError, match="no track") as caught:
        main(*flags(**toy(name)))
    report = report_of(caught.value)
    assert "toy_envs.py" in report and 'raise RuntimeError("no track")' in report
    assert name in report.splitlines()[-1]
    assert list(in_tmp.iterdir()) == []


@ONCE
def test_an_environment_that_raises_in_training(script, main, flags, toy, in_tmp):
    """In its third step: after one whole iteration, of 2 steps in 4 environments."""
    args = flags(**toy("RaisesInStep"), num_steps=2, num_minibatches=1)
    with pytest.raises(RuntimeError, match="no track") as caught:
        main(*args)
    report = report_of(caught.value)
    last = report.splitlines()[-1]
    assert "toy_envs.py" in report and "RaisesInStep" in last and "step 8" in last
    (path,) = in_tmp.glob("runs/*/agent.pt")
    assert torch.load(path, weights_only=True)["progress"]["global_step"] == 8


@ONCE
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("RaisesGymError", gym.error.InvalidAction),
        ("NeedsModule", ModuleNotFoundError),
        ("CallsWrongly", TypeError),
    ],
)
def test_errors_in_training_that_look_like_bad_input(main, flags, toy, name, error):
    with pytest.raises(error) as caught:
        main(*flags(**toy(name)))
    report = report_of(caught.value)
    assert "toy_envs.py" in report and name in report.splitlines()[-1]


def test_error_of_a_checkpoints_environment_names_it(script, main, trained, toy, in_tmp):
    """Not the default one, which is not played."""
    checkpoint = load(trained.path)
    checkpoint["args"] |= toy("RaisesInInit")
    torch.save(checkpoint, in_tmp / "agent.pt")
    with pytest.raises(RuntimeError) as caught:
        main("--evaluate", in_tmp / "agent.pt")
    assert "RaisesInInit" in report_of(caught.value).splitlines()[-1]


def test_seeds_of_the_evaluation_are_tried_before_training(main, flags, toy, in_tmp):
    with pytest.raises(OverflowError):
        main(*flags(**toy("Int32Seeds")))
    assert list(in_tmp.iterdir()) == []


def test_dropped_infos_do_not_cost_the_final_observation(script, small, toy):
    """Truncated episodes are bootstrapped from what the vector environment itself reports."""
    args = dataclasses.replace(small, **toy("Untidy"))
    envs = script.make_vector_env(args)
    script.reset_envs(envs, args, 0)
    envs.action_space.seed(0)
    for _ in range(10):
        *_, truncations, infos = envs.step(envs.action_space.sample())
    assert truncations.all()
    assert [obs[1] for obs in infos["final_obs"]] == [10] * 4
    assert np.ndim(infos["final_obs"][0]) == 1
