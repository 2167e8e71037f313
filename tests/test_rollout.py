"""What is stored of a rollout."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper

CPU = torch.device("cpu")


def collect(script, args):
    envs = script.make_vector_env(args)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    next_obs = script.reset_envs(envs, args, 0)
    rollout, next_obs = script.collect_rollout(agent, envs, next_obs, args, CPU)
    envs.close()
    return agent, rollout, np.array(next_obs)


@pytest.mark.parametrize(
    ("name", "end", "flag"), [("Toy", 10, "truncations"), ("Terminating", 7, "terminations")]
)
def test_every_transition_is_real(script, small, toy, name, end, flag):
    """Environments that count their steps: no step is missing, doubled or made up."""
    args = dataclasses.replace(small, **toy(name), num_steps=25)
    agent, rollout, next_obs = collect(script, args)
    expected = torch.arange(25).float() % end
    assert torch.equal(rollout.obs[:, :, 1], expected.unsqueeze(1).expand(25, 4))
    assert next_obs[:, 1].tolist() == [25 % end] * 4
    ended = (expected == end - 1).unsqueeze(1).expand(25, 4)
    assert torch.equal(getattr(rollout, flag), ended)
    assert (rollout.terminations | rollout.truncations).sum() == ended.sum()
    assert len(rollout.obs[:, :, 0].unique()) > 4, "a new episode has a new label"
    assert torch.equal(rollout.rewards, torch.ones(25, 4))
    assert_next_values_are_of_what_was_reached(agent, rollout)


def assert_next_values_are_of_what_was_reached(agent, rollout):
    """Each action led to the same label and one step more, at the end of an episode, too."""
    following = rollout.obs.clone()
    following[:, :, 1] += 1
    alive = ~rollout.terminations
    reached = agent.get_value(following)[alive].detach()
    torch.testing.assert_close(rollout.next_values[alive], reached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_episodes_that_end_at_different_times_in_different_ways(script, small, toy, norm_obs):
    args = dataclasses.replace(
        small, **toy("Staggered"), num_steps=30, num_envs=7, norm_obs=norm_obs
    )
    agent, rollout, _ = collect(script, args)
    label, steps = rollout.obs[:, :, 0].long(), rollout.obs[:, :, 1]
    ended = steps + 1 == 3 + label // 2 % 5
    assert torch.equal(rollout.terminations, ended & (label % 2 == 0))
    assert torch.equal(rollout.truncations, ended & (label % 2 == 1))
    assert rollout.terminations.any() and (rollout.truncations.sum(1) > 1).any()
    assert_next_values_are_of_what_was_reached(agent, rollout)


def test_both_flags_at_once(script, small, toy):
    args = dataclasses.replace(small, **toy("BothFlags"), num_steps=25)
    _, rollout, _ = collect(script, args)
    assert rollout.terminations.sum() == 8
    assert torch.equal(rollout.terminations, rollout.truncations)


@pytest.mark.parametrize("name", ["SharesItsArray", "Untidy"])
def test_untidy_environments_are_the_tidy_one(script, small, toy, name):
    """An observation in the array of the last one, lists, arrays for rewards, growing infos."""
    rollouts = []
    for toy_name in ("Toy", name):
        args = dataclasses.replace(small, **toy(toy_name), num_steps=25)
        agent, rollout, _ = collect(script, args)
        assert_next_values_are_of_what_was_reached(agent, rollout)
        rollouts.append(rollout)
    for tidy, untidy in zip(*rollouts, strict=True):
        assert torch.equal(tidy, untidy)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_stored_values_and_logprobs_are_the_acting_agents(script, small, norm_obs):
    args = dataclasses.replace(small, norm_obs=norm_obs)
    agent, rollout, _ = collect(script, args)
    _, logprobs, _, values = agent.get_action_and_value(rollout.obs, rollout.actions)
    torch.testing.assert_close(rollout.logprobs, logprobs)
    torch.testing.assert_close(rollout.values, values)
    assert not any(tensor.requires_grad for tensor in rollout)
    floats = (rollout.obs, rollout.logprobs, rollout.values, rollout.rewards, rollout.next_values)
    assert all(tensor.dtype == torch.float32 for tensor in floats)


def test_actions_are_sampled(script, small):
    """Not the most probable one: 4 environments in 100 steps take actions of both kinds."""
    args = dataclasses.replace(small, num_steps=100)
    agent, rollout, _ = collect(script, args)
    greedy = agent.get_deterministic_action(rollout.obs)
    assert 0.2 < (rollout.actions != greedy).float().mean() <= 1


class ChangesItsActions(VectorWrapper):
    """Environments that write to the array of actions that they are given."""

    def step(self, actions):
        self.actions = [*getattr(self, "actions", []), actions.copy()]
        outcome = self.env.step(actions)
        actions += 1
        return outcome


def test_stored_actions_are_the_sampled_ones_whatever_the_environment_does(script, small):
    envs = ChangesItsActions(script.make_vector_env(small))
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    next_obs = script.reset_envs(envs, small, 0)
    rollout, _ = script.collect_rollout(agent, envs, next_obs, small, CPU)
    assert np.array_equal(rollout.actions.numpy(), np.stack(envs.actions))
    envs.close()


def test_rollouts_go_on_where_the_last_one_stopped(script, small, toy):
    args = dataclasses.replace(small, **toy("Toy"), num_steps=4)
    envs = script.make_vector_env(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    next_obs, counts = script.reset_envs(envs, args, 0), []
    for _ in range(3):
        rollout, next_obs = script.collect_rollout(agent, envs, next_obs, args, CPU)
        counts += rollout.obs[:, 0, 1].tolist()
    assert counts == [step % 10 for step in range(12)]
    envs.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(script, small, mode):
    """In Gymnasium's default mode, phantom transitions would be trained on."""
    envs = SyncVectorEnv([lambda: script.make_env(small)] * 4, autoreset_mode=mode)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    with pytest.raises(ValueError, match="SAME_STEP"):
        script.collect_rollout(agent, envs, envs.reset()[0], small, CPU)


def test_seeds_differ_between_environments_iterations_and_runs(script, small, toy):
    def labels(seed, iteration):
        args = dataclasses.replace(small, **toy("Toy"), seed=seed, num_envs=8)
        envs = script.make_vector_env(args)
        return tuple(script.reset_envs(envs, args, iteration)[:, 0].tolist())

    assert labels(1, 0) == labels(1, 0)
    streams = [labels(seed, iteration) for seed in (1, 2, 3) for iteration in (0, 1, 2)]
    assert len(set(streams)) == 9
    assert len(set(np.concatenate(streams))) > 60, "neighbouring seeds share no environments"


def test_reset_seeds_torch_and_numpy(script, small, toy):
    """Environments that use NumPy's global generator repeat with the seed, too."""

    def draw(seed, iteration):
        args = dataclasses.replace(small, **toy("Toy"), seed=seed)
        script.reset_envs(script.make_vector_env(args), args, iteration)
        return torch.rand(()).item(), np.random.random()

    assert draw(1, 0) == draw(1, 0)
    for numbers in zip(draw(1, 0), draw(1, 1), draw(2, 0), strict=True):
        assert len(set(numbers)) == 3
