"""evaluate: whole episodes, raw returns, seeds of its own."""

import dataclasses

import numpy as np
import pytest
import torch

from old.conftest import ON_VECTORS

pytestmark = ON_VECTORS

CPU = torch.device("cpu")


def make_agent(script, args):
    env = script.make_env(args)
    torch.manual_seed(0)
    return script.Agent(env.observation_space, env.action_space, args.norm_obs)


def test_known_returns(script, small, toy):
    for name, expected in (("Toy", 10), ("Terminating", 7)):
        args = dataclasses.replace(small, **toy(name))
        for agent in (None, make_agent(script, args)):
            returns = script.evaluate(agent, args, 5, 1, CPU)
            assert returns.dtype == np.float64 and returns.tolist() == [expected] * 5


def test_one_whole_episode_for_each_seed_whatever_their_length(script, small):
    """Playing episodes (of CartPole: of different lengths) alone gives what playing all gives."""
    agent = make_agent(script, small)
    together = script.evaluate(agent, small, 6, 3, CPU)
    seeds = np.random.default_rng(3).integers(2**31, 2**32, (2, 6))[0]
    for seed, expected in zip(seeds.tolist(), together, strict=True):
        env = script.make_env(small)
        (obs, _), total, ended = env.reset(seed=seed), 0.0, False
        while not ended:
            (action,) = agent.get_deterministic_action(torch.from_numpy(obs).unsqueeze(0)).numpy(
                force=True
            )
            obs, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        assert total == pytest.approx(expected, rel=1e-5)
    assert len(set(together)) > 1


def test_seed_fixes_the_episodes(script, small):
    for agent in (None, make_agent(script, small)):
        first = script.evaluate(agent, small, 20, 1, CPU)
        assert np.array_equal(first, script.evaluate(agent, small, 20, 1, CPU))
        assert not np.array_equal(first, script.evaluate(agent, small, 20, 2, CPU))


def test_random_actions_are_independent_of_the_environment(script, small, toy):
    """Seeded alike, environment and action space would toss the same coins."""
    args = dataclasses.replace(small, **toy("Guess"))
    returns = script.evaluate(None, args, 400, 1, CPU)
    assert abs(returns.mean() - 5) < 5 * np.sqrt(10 / 4 / 400)


def test_evaluation_seeds_are_never_trained_on(script, small, monkeypatch):
    seeds = {"train": set(), "evaluate": set()}
    make_env, phase = script.make_env, "train"

    def spying_make_env(*args, **kwargs):
        env = make_env(*args, **kwargs)
        original = env.unwrapped.reset

        def reset(*, seed=None, options=None):
            if seed is not None:
                seeds[phase].add(seed)
            return original(seed=seed, options=options)

        env.unwrapped.reset = reset
        return env

    monkeypatch.setattr(script, "make_env", spying_make_env)
    envs = script.make_vector_env(small)
    for iteration in range(200):
        script.start_episodes(envs, small, iteration)
    phase = "evaluate"
    for seed in range(20):
        script.evaluate(None, small, 20, seed, CPU)
    assert len(seeds["train"]) == 800 and len(seeds["evaluate"]) == 400
    assert max(seeds["train"]) < 2**31 <= min(seeds["evaluate"])


def test_evaluation_leaves_the_normalizer_alone(script, small):
    args = dataclasses.replace(small, norm_obs=True)
    agent = make_agent(script, args)
    agent.normalize.mean.copy_(torch.randn(len(agent.normalize.mean)))
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    script.evaluate(agent, args, 3, 1, CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in agent.state_dict().items())
