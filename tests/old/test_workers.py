"""Environments in worker processes: the numbers of the in-process ones, and every way to fail."""

import functools
import multiprocessing
import os
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import toy_envs  # noqa: F401

from old.conftest import WITH_WORKERS

pytestmark = WITH_WORKERS


@pytest.fixture
def open_workers(script):
    """Makes a WorkerVectorEnv that the test's end closes."""
    opened = []

    def open_workers(env_id, num_envs=5, num_workers=2, timeout=60.0):
        env_fns = [functools.partial(gym.make, env_id)] * num_envs
        opened.append(script.WorkerVectorEnv(env_fns, num_workers, timeout))
        return opened[-1]

    yield open_workers
    for envs in opened:
        envs.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "toy_envs:Terminating-v0", "Pendulum-v1"])
@pytest.mark.parametrize("num_workers", [1, 2, 9])
def test_equal_to_the_in_process_environments(script, open_workers, env_id, num_workers):
    """Observations, rewards, flags, final observations, spaces; five environments, unevenly."""
    make = functools.partial(gym.make, env_id)
    if env_id == "Pendulum-v1":
        make = functools.partial(make, max_episode_steps=20)
    env_fns = [make] * 5
    both = [
        script.WorkerVectorEnv(env_fns, num_workers, 60.0), script.make_sync_vector_env(env_fns)
    ]  # fmt: skip
    try:
        for name in ("num_envs", "single_observation_space", "single_action_space"):
            assert getattr(both[0], name) == getattr(both[1], name)
        assert both[0].metadata["autoreset_mode"] == both[1].metadata["autoreset_mode"]
        rng, ends = np.random.default_rng(1), 0
        both[1].action_space.seed(1)
        for step in range(120):
            if step in (0, 70):
                seeds = rng.integers(2**31, size=5).tolist()
                obs, same_obs = (envs.reset(seed=seeds)[0] for envs in both)
                np.testing.assert_array_equal(obs, same_obs, strict=True)
            actions = both[1].action_space.sample()
            (*step, infos), (*same_step, same_infos) = (envs.step(actions) for envs in both)
            for array, same in zip(step, same_step, strict=True):
                np.testing.assert_array_equal(array, same, strict=True)
            assert ("final_obs" in infos) == ("final_obs" in same_infos)
            for i in np.flatnonzero(step[2] | step[3]):
                ends += 1
                assert infos["_final_obs"][i] and same_infos["_final_obs"][i]
                np.testing.assert_array_equal(infos["final_obs"][i], same_infos["final_obs"][i])
        assert ends > 10
    finally:
        for envs in both:
            envs.close()


def test_global_random_numbers_follow_from_the_seed(open_workers):
    envs = open_workers("toy_envs:GloballyRandom-v0")
    runs = []
    for _ in range(2):
        envs.reset(seed=[1, 2, 3, 4, 5])
        runs.append([envs.step(np.zeros(5, int))[1].copy() for _ in range(3)])
    assert np.array_equal(*runs) and len(np.unique(runs[0])) > 5


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("toy_envs:RaisesInStep-v0", "RuntimeError no track no car (.*toy_envs.py, line"),
        ("toy_envs:LosesItsServer-v0", "ConnectionRefusedError no server (.*toy_envs.py, line"),
        ("toy_envs:Broken-v0", "RuntimeError no track no car (.*toy_envs.py, line"),
        ("toy_envs:Dies-v0", "the process of an environment died"),
    ],
)
def test_failures_are_told(open_workers, env_id, words):
    envs = open_workers(env_id)
    with pytest.raises(ChildProcessError, match=words.replace("(", r"\(")):
        envs.reset(seed=list(range(5)))
        for _ in range(5):
            envs.step(np.zeros(5, int))
    started = time.monotonic()
    envs.close()
    assert time.monotonic() - started < 10
    assert not any(worker.is_alive() for worker in envs.workers)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_a_process(script, open_workers, monkeypatch, method):
    """Those of other systems, and of later versions of Python."""
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(script.multiprocessing, "Process", context.Process)
    monkeypatch.setattr(script, "create_shared_memory", functools.partial(
        script.create_shared_memory, ctx=context
    ))  # fmt: skip
    envs = open_workers("CartPole-v1")
    obs, _ = envs.reset(seed=[1, 2, 3, 4, 5])
    same_obs, _ = script.make_sync_vector_env(
        [functools.partial(gym.make, "CartPole-v1")] * 5
    ).reset(seed=[1, 2, 3, 4, 5])
    assert np.array_equal(obs, same_obs)


def test_one_that_hangs_is_told_and_ended(open_workers):
    envs = open_workers("toy_envs:Hangs-v0", timeout=0.5)
    envs.reset(seed=list(range(5)))
    with pytest.raises(ChildProcessError, match=r"no answer of an environment in 0\.5 s"):
        for _ in range(5):
            envs.step(np.zeros(5, int))
    envs.close()
    assert not any(worker.is_alive() for worker in envs.workers)


def test_signals_are_the_main_processs(open_workers):
    envs = open_workers("CartPole-v1")
    envs.reset(seed=list(range(5)))
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in envs.workers:
            os.kill(worker.pid, number)
    envs.step(np.zeros(5, int))
    envs.close()
    assert [worker.exitcode for worker in envs.workers] == [0, 0]
