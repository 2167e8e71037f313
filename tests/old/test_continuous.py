"""Continuous actions: the Gaussian policy, bounds, reward scaling, PPO-Penalty."""

import copy
import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
import toy_envs  # noqa: F401
from gymnasium import spaces
from torch.distributions import Normal, kl_divergence

import ppo_continuous

CPU = torch.device("cpu")


@pytest.fixture
def script():
    return ppo_continuous


@pytest.fixture
def agent():
    torch.manual_seed(0)
    agent = ppo_continuous.Agent(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), norm_obs=False)
    for weight in agent.parameters():
        weight.data.add_(0.5 * torch.randn_like(weight))
    return agent


def test_distribution_equals_torch_normal(agent):
    obs, action = torch.randn(5, 7, 3), 3 * torch.randn(5, 7, 2)
    policy = Normal(agent.actor(obs).tanh(), agent.log_std.exp())
    same, logprob, entropy, value = agent.get_action_and_value(obs, action)
    assert torch.equal(same, action)
    torch.testing.assert_close(logprob, policy.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, policy.entropy().sum(-1))
    torch.testing.assert_close(value, agent.get_value(obs))
    assert logprob.shape == entropy.shape == value.shape == (5, 7)
    assert torch.equal(agent.get_deterministic_action(obs), policy.mean)


@pytest.mark.parametrize("name", ["ppo_continuous", "ppo_multienv"])
def test_means_stay_within_the_bounds_if_all_actions_have_some(name):
    module = importlib.import_module(name)

    def largest_mean(high):
        space = spaces.Box(-np.array(high, np.float32), np.array(high, np.float32))
        agent = module.Agent(spaces.Box(-1, 1, (3,)), space, norm_obs=False)
        for weight in agent.actor.parameters():
            weight.data.fill_(100.0)
        return agent.get_deterministic_action(torch.randn(50, 3)).abs().max()

    assert largest_mean([1, 1]) == 1
    assert largest_mean([1, np.inf]) >= 100


def test_actions_are_sampled_with_mean_and_deviation(agent):
    torch.manual_seed(1)
    obs = torch.randn(1, 3).expand(100_000, 3)
    actions, logprobs, _, _ = agent.get_action_and_value(obs)
    deviation = agent.log_std.exp()
    error = deviation / math.sqrt(len(actions))
    assert ((actions.mean(0) - agent.get_mean(obs[0])).abs() < 5 * error).all()
    assert ((actions.std(0) / deviation - 1).abs() < 0.02).all()
    torch.testing.assert_close(logprobs, agent.get_action_and_value(obs, actions)[1])


def test_kl_divergence_equals_torch():
    means, log_stds = torch.randn(2, 50, 3), torch.randn(2, 3)
    old, new = (Normal(mean, std) for mean, std in zip(means, log_stds.exp(), strict=True))
    kl = ppo_continuous.kl_divergence(means[0], log_stds[0], means[1], log_stds[1])
    torch.testing.assert_close(kl, kl_divergence(old, new).sum(-1))
    same = ppo_continuous.kl_divergence(means[0], log_stds[0], means[0], log_stds[0])
    torch.testing.assert_close(same, torch.zeros(50), rtol=0, atol=1e-6)


def test_actions_reach_the_environment_within_its_bounds():
    """Two finite bounds: scaled and clipped; one: clipped; none: as they are."""
    env = ppo_continuous.make_env(ppo_continuous.Args(env_id="toy_envs:Bounds-v0"))
    assert env.action_space.low.tolist() == [-1, -1, -np.inf, 0, -np.inf]
    assert env.action_space.high.tolist() == [1, 1, np.inf, np.inf, -7]
    env.reset(seed=1)
    for action in ([0, 0, 0, 0, 0], [1, -1, 5, 5, -9], [7, -7, -1e6, -1, 1], [-0.5, 0.5, 0, 2, -8]):
        env.step(np.array(action, np.float32))
    assert np.array(env.unwrapped.actions).tolist() == [
        [1, 2.25, 0, 0, -7], [3, 2, 5, 5, -9], [3, 2, -1e6, 0, -7], [0, 2.375, 0, 2, -8],
    ]  # fmt: skip
    assert all(action in env.unwrapped.action_space for action in env.unwrapped.actions)
    lunar = ppo_continuous.Args(env_id="LunarLander-v3", env_kwargs=("continuous=True",))
    assert ppo_continuous.make_env(lunar).action_space == spaces.Box(-1, 1, (2,))


def test_bounds_that_stand_for_none(recwarn):
    env = ppo_continuous.make_env(ppo_continuous.Args(env_id="toy_envs:WideBounds-v0"))
    env.reset(seed=1)
    assert env.step(np.array([0.5, -7], np.float32))[0].tolist() == [0.5, -7]
    assert not [warning for warning in recwarn if "precision" in str(warning.message)]


def test_stored_actions_are_those_sampled(small):
    """Not the clipped ones, whose probability under the Gaussian is another."""
    args = dataclasses.replace(small, log_std_init=2.0)
    envs = ppo_continuous.make_vector_env(args)
    agent = ppo_continuous.Agent(
        envs.single_observation_space, envs.single_action_space, False, args.log_std_init
    )
    next_obs = ppo_continuous.start_episodes(envs, args, 0)
    rollout, _ = ppo_continuous.collect_rollout(agent, envs, next_obs, args, CPU)
    assert rollout.actions.std().item() == pytest.approx(math.exp(2), rel=0.3)
    torch.testing.assert_close(
        rollout.logprobs, agent.get_action_and_value(rollout.obs, rollout.actions)[1]
    )


@pytest.mark.parametrize("chunks", [1, 5])
def test_reward_scaler_equals_two_passes_in_float64(chunks):
    """Also when an episode goes on from one rollout to the next."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(3, 20, (100, 4)).astype(np.float32)
    dones = rng.random((100, 4)) < 0.1
    scaler, discounted = ppo_continuous.RewardScaler(), torch.zeros(4, dtype=torch.float64)
    for chunk in np.split(np.arange(100), chunks):
        discounted = scaler.update(
            torch.from_numpy(rewards[chunk]), torch.from_numpy(dones[chunk]), discounted, 0.9
        )
    expected = np.zeros((100, 4))
    for i in range(4):
        start = 0
        for t in range(100):
            weights = 0.9 ** np.arange(t - start, -1, -1)
            expected[t, i] = weights @ rewards[start : t + 1, i].astype(np.float64)
            start = t + 1 if dones[t, i] else start
    np.testing.assert_allclose(scaler.var.item(), expected.var(), rtol=1e-9)
    np.testing.assert_allclose(discounted, np.where(dones[-1], 0, expected[-1]), rtol=1e-12)
    scaled = scaler(torch.from_numpy(rewards))
    np.testing.assert_allclose(scaled, rewards / np.sqrt(expected.var() + 1e-8), rtol=1e-6)
    assert scaler(torch.tensor([1e6, -1e6, 0.0])).tolist() == [10, -10, 0]


def test_normalisers_are_in_the_checkpoint_and_frozen_in_evaluation(small):
    args = dataclasses.replace(small, norm_obs=True, norm_reward=True)
    result = ppo_continuous.train(args)
    agent, loaded = ppo_continuous.load_agent(f"{result['run_dir']}/agent.pt", CPU)
    assert agent.normalize.count == agent.scale_rewards.count == 512
    assert agent.normalize.mean.abs().max() > 0.01 and agent.scale_rewards.var > 1
    returns = ppo_continuous.evaluate(agent, loaded, 3, args.seed, CPU)
    assert returns.tolist() == result["eval_returns"]
    assert agent.normalize.count == agent.scale_rewards.count == 512
    assert returns.max() < -1, "returns are the environment's own, not the scaled ones"


def test_final_observations_meet_the_same_normaliser(small):
    """V of the observation at a cut is what the agent makes of it, raw as it came."""
    args = dataclasses.replace(small, norm_obs=True, num_steps=20)  # cut at 20 steps
    envs = ppo_continuous.make_vector_env(args)
    agent = ppo_continuous.Agent(envs.single_observation_space, envs.single_action_space, True)
    agent.normalize.update(torch.randn(100, 3) * 5 + 2)
    for weight in agent.critic.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    next_obs = ppo_continuous.start_episodes(envs, args, 0).copy()
    rollout, _ = ppo_continuous.collect_rollout(agent, envs, next_obs, args, CPU)
    assert rollout.truncations[-1].all()
    seeds = np.random.default_rng([args.seed, 0])
    seeds.integers(2**63), seeds.integers(2**32), seeds.integers(2**32)
    for i, seed in enumerate(seeds.integers(2**31, size=args.num_envs).tolist()):
        env = ppo_continuous.make_env(args)
        obs, _ = env.reset(seed=seed)
        assert np.array_equal(obs, next_obs[i])
        for t in range(20):
            obs, *_ = env.step(rollout.actions[t, i].numpy())
        value = agent.get_value(torch.from_numpy(obs))
        torch.testing.assert_close(rollout.next_values[-1, i], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_an_action_away_from_the_middle_is_learned(small, surrogate):
    """The best action is 0.5 in [-1, 1], which is 4.5 in the environment's [0, 6]."""
    args = dataclasses.replace(
        small, env_id="toy_envs:FarTarget-v0", env_kwargs=(), total_timesteps=30_000,
        surrogate=surrogate, norm_obs=True, norm_reward=True, num_steps=32, update_epochs=8,
    )  # fmt: skip
    result = ppo_continuous.train(args)
    assert -1 < result["eval_mean"] <= 0 and np.mean(result["random_returns"]) < -20


def test_integers_and_matrices_are_refused(small):
    for env_id in ("toy_envs:IntegerActions-v0", "toy_envs:MatrixActions-v0"):
        with pytest.raises(ValueError, match="vectors"):
            ppo_continuous.check_args(dataclasses.replace(small, env_id=env_id, env_kwargs=()))


def test_kl_of_an_update_is_the_closed_form(small, monkeypatch):
    """What the penalty is given and what is reported is KL(pi_old || pi) of the stored states."""
    torch.manual_seed(0)
    args = dataclasses.replace(small, surrogate="kl-penalty", learning_rate=0.02)
    envs = ppo_continuous.make_vector_env(args)
    agent = ppo_continuous.Agent(envs.single_observation_space, envs.single_action_space, False)
    next_obs = ppo_continuous.start_episodes(envs, args, 0)
    rollout, _ = ppo_continuous.collect_rollout(agent, envs, next_obs, args, CPU)
    old = copy.deepcopy(agent)
    weights = ppo_continuous.flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], args.learning_rate)
    seen, loss = [], ppo_continuous.ppo_penalty_loss
    monkeypatch.setattr(
        ppo_continuous,
        "ppo_penalty_loss",
        lambda *a: (seen.append(a[3].mean().item()), loss(*a))[1],
    )
    advantages, returns = torch.randn(2, args.num_steps, args.num_envs)
    means = ppo_continuous.update(
        agent, weights, optimizer, rollout, advantages, returns, args, 1.0
    )
    old_mean, new_mean = old.get_mean(rollout.obs), agent.get_mean(rollout.obs)
    old_var, new_var = (2 * old.log_std).exp(), (2 * agent.log_std).exp()
    kl = agent.log_std - old.log_std - 0.5 + (old_var + (old_mean - new_mean) ** 2) / (2 * new_var)
    assert means["kl"] == pytest.approx(kl.sum(-1).mean().item(), rel=1e-4)
    assert means["kl"] > 1e-4 and seen[0] == pytest.approx(0, abs=1e-6) and seen[-1] > 1e-4
