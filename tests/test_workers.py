"""Environments in the worker processes of ppo_multienv.py, and every way to fail."""

import dataclasses
import gc
import os
import signal
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, only
from gymnasium.vector import AutoresetMode, SyncVectorEnv

pytestmark = only("ppo_multienv")


@pytest.fixture
def open_workers(script):
    """Makes a WorkerVectorEnv that the test's end closes."""
    opened = []

    def open_workers(env_id, num_envs=5, num_workers=2, timeout=60.0, **kwargs):
        env_fns = [partial(gym.make, env_id, **kwargs)] * num_envs
        opened.append(script.WorkerVectorEnv(env_fns, num_workers, timeout))
        return opened[-1]

    yield open_workers
    for envs in opened:
        envs.close()


@pytest.mark.parametrize(
    ("env_id", "num_workers"),
    [("CartPole-v1", 1), ("Staggered-v0", 2), ("Pendulum-v1", 9), ("RewardsChange-v0", 2)],
)
def test_equal_to_the_in_process_environments(open_workers, env_id, num_workers):
    """Observations, rewards, flags, final observations, spaces; five environments, unevenly."""
    limit = {"max_episode_steps": 20} if env_id == "Pendulum-v1" else {}
    ours = open_workers(env_id, num_workers=num_workers, **limit)
    mode = AutoresetMode.SAME_STEP
    theirs = SyncVectorEnv([partial(gym.make, env_id, **limit)] * 5, autoreset_mode=mode)
    for name in ("num_envs", "single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert len(ours.workers) == min(num_workers, 5)
    rng, ends = np.random.default_rng(1), 0
    theirs.action_space.seed(1)
    for step in range(120):
        if step in (0, 70):
            seeds = rng.integers(2**31, size=5).tolist() if step else 7  # a number: 7, 8, 9, ...
            obs, same_obs = (envs.reset(seed=seeds)[0] for envs in (ours, theirs))
            np.testing.assert_array_equal(obs, same_obs, strict=True)
        actions = theirs.action_space.sample()
        (*step, infos), (*same_step, same_infos) = (envs.step(actions) for envs in (ours, theirs))
        for array, same in zip(step, same_step, strict=True):
            np.testing.assert_array_equal(array, same, strict=True)
        for i in np.flatnonzero(step[2] | step[3]):
            ends += 1
            np.testing.assert_array_equal(infos["final_obs"][i], same_infos["final_obs"][i])
    assert ends > 10
    theirs.close()


def test_same_rollout_with_and_without_workers(script, small):
    """As make_vector_env makes them: numbers of workers do not change what is learned from."""
    rows = []
    for num_workers in (0, 1, 3):
        args = dataclasses.replace(small, num_workers=num_workers, env_id="Staggered-v0")
        envs = script.make_vector_env(args)
        obs = [np.array(script.reset_envs(envs, args, 0))]
        for _ in range(12):
            obs.append(np.array(envs.step(np.zeros(4, int))[0]))
        rows.append(np.stack(obs))
        envs.close()
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_environments_that_are_rendered_are_in_this_process(script, small):
    args = dataclasses.replace(small, num_workers=2, num_envs=1)
    envs = script.make_vector_env(args, training=False, render_mode="rgb_array")
    envs.reset(seed=[1])
    assert envs.render()[0].ndim == 3
    envs.close()


def test_numpys_global_generator_follows_from_the_seed(open_workers):
    envs = open_workers("GloballyRandom-v0")
    runs = []
    for _ in range(2):
        envs.reset(seed=[1, 2, 3, 4, 5])
        runs.append([envs.step(np.zeros(5, int))[1].copy() for _ in range(3)])
    assert np.array_equal(*runs) and len(np.unique(runs[0])) > 5


def ended(workers):
    for worker in workers:
        worker.join(timeout=30)
    return not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("RaisesInStep-v0", "RuntimeError.*no track"),
        ("Broken-v0", "RuntimeError.*no track"),
        ("Dies-v0", "the process of an environment died"),
        ("Hangs-v0", r"no answer in 0\.5 s"),
    ],
)
def test_failures_are_told(open_workers, capfd, env_id, words):
    envs = open_workers(env_id, timeout=0.5 if env_id == "Hangs-v0" else 60.0)
    with pytest.raises(ChildProcessError, match=words):
        envs.reset(seed=list(range(5)))
        for _ in range(5):
            envs.step(np.zeros(5, int))
    if "RuntimeError" in words:
        assert "toy_envs.py" in capfd.readouterr().err, "its own traceback"
    assert ended(envs.workers), "or a late answer would be taken for that to the next step"
    with pytest.raises(ChildProcessError, match="died"):
        envs.step(np.zeros(5, int))


def test_an_interrupted_step_is_not_taken_for_the_next(open_workers):
    """As by a notebook's stop button: what was under way is given up, and that is told."""
    envs = open_workers("Hangs-v0")
    envs.reset(seed=list(range(5)))
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            envs.step(np.zeros(5, int))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert ended(envs.workers)
    with pytest.raises(ChildProcessError, match="died"):
        envs.reset(seed=list(range(5)))


def test_workers_end_with_their_environments(script):
    """Even if these are not closed."""
    envs = script.WorkerVectorEnv([partial(gym.make, "CartPole-v1")] * 3, 2, 60.0)
    workers = envs.workers
    del envs
    gc.collect()
    assert ended(workers)


def test_observations_must_be_arrays(open_workers):
    with pytest.raises(ValueError, match="arrays"):
        open_workers("DictObservation-v0")


def test_signals_are_the_main_processs(open_workers):
    envs = open_workers("CartPole-v1")
    envs.reset(seed=list(range(5)))
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in envs.workers:
            os.kill(worker.pid, number)
    envs.step(np.zeros(5, int))
    assert all(worker.is_alive() for worker in envs.workers)
    envs.close()
    assert ended(envs.workers)


def test_a_run_with_workers(script, small):
    """From beginning to end, in the numbers of a run without."""
    weights = []
    for num_workers in (0, 2):
        args = dataclasses.replace(
            small, num_workers=num_workers, total_timesteps=192, exp_name=f"run{num_workers}"
        )
        weights.append(load(f"{script.train(args)['run_dir']}/agent.pt")["agent"])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)
