"""Continuous actions: the Gaussian policy, bounds, reward scaling, PPO-Penalty."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import load, only
from gymnasium import spaces
from test_rollout import collect
from torch.distributions import Normal

pytestmark = only("ppo_continuous", "ppo_multienv")

CPU = torch.device("cpu")
OBS_SPACE = spaces.Box(-1, 1, (3,))


@pytest.fixture
def gaussian(script):
    torch.manual_seed(0)
    agent = script.Agent(OBS_SPACE, spaces.Box(-1, 1, (2,)), log_std_init=-0.5)
    with torch.no_grad():
        for weight in agent.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    return agent


@pytest.fixture
def box(script, small):
    """`small`, on an environment with continuous actions."""
    return dataclasses.replace(
        small, env_id="Pendulum-v1", env_kwargs=("max_episode_steps=20",), log_std_init=0.0
    )


def test_distribution_equals_torch_normal(gaussian):
    obs, action = torch.randn(5, 7, 3), 3 * torch.randn(5, 7, 2)
    mean = gaussian.get_deterministic_action(obs)
    policy = Normal(mean, gaussian.log_std.exp())
    _, logprob, entropy, value = gaussian.get_action_and_value(obs, action)
    torch.testing.assert_close(logprob, policy.log_prob(action).sum(-1))
    expected = policy.entropy().sum(-1)
    torch.testing.assert_close(entropy, expected)
    assert logprob.shape == entropy.shape == value.shape == (5, 7)


def test_log_std_init(script):
    agent = script.Agent(OBS_SPACE, spaces.Box(-1, 1, (2,)), log_std_init=-0.5)
    assert agent.log_std.tolist() == [-0.5, -0.5]
    assert any(weight is agent.log_std for weight in agent.parameters())


def test_means_stay_within_the_bounds_if_all_actions_have_some(script):
    def largest_mean(high, **settings):
        space = spaces.Box(-np.array(high, np.float32), np.array(high, np.float32))
        agent = script.Agent(OBS_SPACE, space, **settings)
        with torch.no_grad():
            for weight in agent.actor.parameters():
                weight.fill_(100.0)
        return agent.get_deterministic_action(torch.randn(50, 3)).abs().max()

    assert largest_mean([1, 1]) <= 1
    assert largest_mean([1, np.inf]) >= 100 and largest_mean([1, 1], bound_mean=False) >= 100


@pytest.mark.parametrize("bound_mean", [True, False])
def test_a_loaded_agent_has_its_bounds(script, box, main, in_tmp, bound_mean):
    """And --resume can't change them."""
    args = dataclasses.replace(box, bound_mean=bound_mean, total_timesteps=64)
    path = in_tmp / script.train(args)["run_dir"] / "agent.pt"
    agent, _ = script.load_agent(path, "cpu")
    with torch.no_grad():
        for weight in agent.actor.parameters():
            weight.fill_(100.0)
    largest = agent.get_deterministic_action(torch.ones(1, 3)).abs().max()
    assert (largest <= 1) == bound_mean
    code, _, errors = main("--resume", path, "--no-bound-mean" if bound_mean else "--bound-mean")
    assert code == 2 and "--bound-mean" in errors


def test_actions_are_sampled_with_mean_and_deviation(gaussian):
    torch.manual_seed(1)
    obs = torch.randn(1, 3).expand(100_000, 3)
    actions, logprobs, _, _ = gaussian.get_action_and_value(obs)
    deviation = gaussian.log_std.exp()
    error = deviation / math.sqrt(len(actions))
    assert ((actions.mean(0) - gaussian.get_deterministic_action(obs[0])).abs() < 5 * error).all()
    assert ((actions.std(0) / deviation - 1).abs() < 0.02).all()
    torch.testing.assert_close(logprobs, gaussian.get_action_and_value(obs, actions)[1])


def test_actions_reach_the_environment_within_its_bounds(script):
    """Two finite bounds: scaled and clipped; one: clipped; none: as they are."""
    env = script.make_env(script.Args(env_id="Bounds-v0"))
    assert env.action_space.low.tolist() == [-1, -1, -np.inf, 0, -np.inf]
    assert env.action_space.high.tolist() == [1, 1, np.inf, np.inf, -7]
    env.reset(seed=1)
    for action in ([0, 0, 0, 0, 0], [1, -1, 5, 5, -9], [7, -7, -1e6, -1, 1], [-0.5, 0.5, 0, 2, -8]):
        env.step(np.array(action, np.float32))
    assert np.array(env.unwrapped.actions).tolist() == [
        [1, 2.25, 0, 0, -7], [3, 2, 5, 5, -9], [3, 2, -1e6, 0, -7], [0, 2.375, 0, 2, -8],
    ]  # fmt: skip
    assert all(action in env.unwrapped.action_space for action in env.unwrapped.actions)
    lunar = script.Args(env_id="LunarLander-v3", env_kwargs=("continuous=True",))
    assert script.make_env(lunar).action_space == spaces.Box(-1, 1, (2,))


def test_bounds_that_stand_for_none(script, recwarn):
    env = script.make_env(script.Args(env_id="WideBounds-v0"))
    env.reset(seed=1)
    assert env.step(np.array([0.5, -7], np.float32))[0].tolist() == [0.5, -7]
    assert not [warning for warning in recwarn if "precision" in str(warning.message)]


def test_stored_actions_are_those_sampled(script, box):
    """Not the clipped ones, whose probability under the Gaussian is another."""
    envs = script.make_vector_env(box)
    spaces_of = envs.single_observation_space, envs.single_action_space
    agent = script.Agent(*spaces_of, log_std_init=2.0)
    next_obs = script.reset_envs(envs, box, 0)
    rollout, _ = script.collect_rollout(agent, envs, next_obs, box, CPU)
    assert rollout.actions.std().item() == pytest.approx(math.exp(2), rel=0.3)
    logprobs = agent.get_action_and_value(rollout.obs, rollout.actions)[1]
    torch.testing.assert_close(rollout.logprobs, logprobs)
    assert rollout.rewards.max() < 0, "stored rewards are the environment's own"


@pytest.mark.parametrize("chunks", [1, 5])
def test_reward_scaler_equals_two_passes_in_float64(script, chunks):
    """Also when an episode goes on from one rollout to the next."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(3, 20, (100, 4)).astype(np.float32)
    dones = rng.random((100, 4)) < 0.1
    scaler = script.RewardScaler()
    for chunk in np.split(np.arange(100), chunks):
        scaler.update(torch.from_numpy(rewards[chunk]), torch.from_numpy(dones[chunk]), 0.9)
    expected = np.zeros((100, 4))
    for i in range(4):
        start = 0
        for t in range(100):
            weights = 0.9 ** np.arange(t - start, -1, -1)
            expected[t, i] = weights @ rewards[start : t + 1, i].astype(np.float64)
            start = t + 1 if dones[t, i] else start
    np.testing.assert_allclose(scaler.var.item(), expected.var(), rtol=1e-9)
    scaled = scaler(torch.from_numpy(rewards))
    np.testing.assert_allclose(scaled, rewards / np.sqrt(expected.var() + 1e-8), rtol=1e-6)
    assert scaler(torch.tensor([1e6, -1e6, 0.0])).tolist() == [10, -10, 0]


def test_log_std_init_of_a_run(script, box, record_updates):
    script.train(dataclasses.replace(box, total_timesteps=64, log_std_init=-1.5))
    assert record_updates[0].weights["log_std"].tolist() == [-1.5]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "StaggeredBox-v0"])
def test_rewards_are_scaled_by_returns_of_episodes(script, box, record_updates, env_id):
    """Which end by truncation (Pendulum), or half of them in terminal states."""
    args = dataclasses.replace(box, env_id=env_id, env_kwargs=(), norm_reward=True)
    script.train(dataclasses.replace(args, total_timesteps=192))
    scaler = script.RewardScaler()
    for call in record_updates:
        dones = call.rollout.terminations | call.rollout.truncations
        assert call.rollout.terminations.any() == (env_id != "Pendulum-v1")
        scaler.update(call.rollout.rewards, dones, args.gamma)
        assert call.weights["scale_rewards.var"] == pytest.approx(scaler.var)


def test_advantages_are_of_scaled_rewards(script, box, record_updates):
    """Logged and stored returns stay the environment's own."""
    args = dataclasses.replace(box, norm_reward=True, norm_obs=True, total_timesteps=192)
    result = script.train(dataclasses.replace(args, eval_episodes=3))
    agent, loaded = script.load_agent(f"{result['run_dir']}/agent.pt", CPU)
    scaler = script.RewardScaler()
    for call in record_updates:
        rollout = call.rollout
        scaler.update(rollout.rewards, rollout.terminations | rollout.truncations, args.gamma)
        advantages, _ = script.compute_gae(
            scaler(rollout.rewards), rollout.values, rollout.next_values, rollout.terminations,
            rollout.truncations, args.gamma, args.gae_lambda,
        )  # fmt: skip
        torch.testing.assert_close(call.advantages, advantages)
    torch.testing.assert_close(agent.scale_rewards.var, scaler.var)
    assert agent.normalize.count == agent.scale_rewards.count == 192
    returns = script.evaluate(agent, loaded, 3, args.seed, CPU)
    assert returns.tolist() == pytest.approx(result["eval_returns"], rel=1e-4)
    assert agent.normalize.count == agent.scale_rewards.count == 192
    assert returns.max() < -1, "returns are not the scaled ones"


def test_norm_reward_is_not_changed_beside_resume(script, box, main, capsys):
    path = f"{script.train(dataclasses.replace(box, total_timesteps=64))['run_dir']}/agent.pt"
    capsys.readouterr()
    code, _, errors = main("--resume", path, "--norm-reward")
    assert code == 2 and "--norm-reward" in errors and errors.count("\n") == 1
    assert load(path)["progress"]["global_step"] == 64


def test_final_observations_meet_the_same_normaliser(script, box):
    """V of the observation at a cut is what the agent makes of it, raw as it came."""
    args = dataclasses.replace(box, norm_obs=True, num_steps=20)  # cut at 20 steps
    envs = script.make_vector_env(args)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, True)
    agent.normalize.update(torch.randn(100, 3) * 5 + 2)
    next_obs = np.array(script.reset_envs(envs, args, 0))
    rollout, _ = script.collect_rollout(agent, envs, next_obs, args, CPU)
    assert rollout.truncations[-1].all()
    for i in range(args.num_envs):
        env = script.make_env(args)
        env.reset(seed=0)
        x, y, speed = next_obs[i].astype(np.float64)
        env.unwrapped.state = np.array([np.arctan2(y, x), speed])
        for action in rollout.actions[:, i]:
            obs, *_ = env.step(action.numpy())
        value = agent.get_value(torch.from_numpy(obs)).detach()
        torch.testing.assert_close(rollout.next_values[-1, i], value, rtol=1e-2, atol=1e-2)


def test_kl_of_an_update_is_the_closed_form(script, box):
    """What is reported is KL(pi_old || pi) of the stored states."""
    if not hasattr(box, "surrogate"):
        pytest.skip("PPO-Clip alone")
    args = dataclasses.replace(box, surrogate="kl-penalty", learning_rate=0.02)
    agent, rollout, _ = collect(script, args)
    old = collect(script, args)[0]
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate)
    advantages, returns = torch.randn(2, args.num_steps, args.num_envs)
    means = script.update(agent, optimizer, rollout, advantages, returns, args, 1.0)
    old_mean, new_mean = (a.get_deterministic_action(rollout.obs) for a in (old, agent))
    old_var, new_var = (2 * old.log_std).exp(), (2 * agent.log_std).exp()
    kl = agent.log_std - old.log_std - 0.5 + (old_var + (old_mean - new_mean) ** 2) / (2 * new_var)
    assert means["kl"] == pytest.approx(kl.sum(-1).mean().item(), rel=1e-3)
    assert means["kl"] > 1e-4


@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_an_action_away_from_the_middle_is_learned(script, box, surrogate):
    """The best action is 0.5 in [-1, 1], which is 4.5 in the environment's [0, 6]."""
    if surrogate != "clip" and not hasattr(box, "surrogate"):
        pytest.skip("PPO-Clip alone")
    changes = {} if surrogate == "clip" else {"surrogate": surrogate}
    args = dataclasses.replace(
        box, env_id="FarTarget-v0", env_kwargs=(), total_timesteps=12_000, norm_obs=True,
        norm_reward=True, num_steps=64, update_epochs=8, eval_episodes=3, **changes,
    )  # fmt: skip
    result = script.train(args)
    assert -1.5 < result["eval_mean"] <= 0 and np.mean(result["random_returns"]) < -20


@pytest.mark.parametrize("env_id", ["IntegerActions-v0", "MatrixActions-v0"])
def test_integers_and_matrices_are_refused(script, box, env_id):
    with pytest.raises(ValueError, match=env_id):
        script.check_args(dataclasses.replace(box, env_id=env_id, env_kwargs=()))
