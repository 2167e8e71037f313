"""The agent: its interface, its distribution, its normaliser; and that it is plain torch."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import only
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Distribution

OBS_SPACE = spaces.Box(-1, 1, (3,))


@only("ppo_discrete")
def test_initialisation_is_orthogonal(script, action_space):
    agent = script.Agent(OBS_SPACE, action_space, hidden_size=16)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), last), strict=True):
            singular_values = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular_values, torch.full_like(singular_values, scale))
            assert not layer.bias.any()
        assert [layer.out_features for layer in layers[:2]] == [16, 16]
    assert not set(agent.actor.parameters()) & set(agent.critic.parameters())


@only("ppo_discrete")
def test_distribution_is_categorical(agent):
    obs, action = torch.randn(5, 7, 3), torch.randint(4, (5, 7))
    expected = Categorical(logits=agent.actor(obs))
    _, logprob, entropy, _ = agent.get_action_and_value(obs, action)
    torch.testing.assert_close(logprob, expected.log_prob(action))
    torch.testing.assert_close(entropy, expected.entropy())
    assert torch.equal(agent.get_deterministic_action(obs), expected.probs.argmax(-1))


@only("ppo_discrete")
def test_networks_are_the_usual_ones(agent):
    """Two layers of tanh units, written out."""
    obs = torch.randn(6, 3)
    first, _, second, _, output = agent.critic
    hidden = torch.tanh(second(torch.tanh(first(obs))))
    torch.testing.assert_close(agent.get_value(obs), output(hidden).squeeze(-1))


@only("ppo_multienv")
def test_the_shared_body_is_the_usual_one(script, action_space, agent):
    """Two layers of tanh units, written out; orthogonal weights at the start."""
    new = script.Agent(OBS_SPACE, action_space)
    first, _, second, _ = new.body
    scales = (first, 2**0.5), (second, 2**0.5), (new.actor[0], 0.01), (new.critic, 1.0)
    for layer, scale in scales:
        singular_values = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, scale))
        assert not layer.bias.any()
    obs, (first, _, second, _) = torch.randn(6, 3), agent.body
    hidden = torch.tanh(second(torch.tanh(first(obs))))
    torch.testing.assert_close(agent.get_value(obs), agent.critic(hidden).squeeze(-1))
    torch.testing.assert_close(agent.get_policy(obs).probs, agent.actor(hidden).softmax(-1))


def test_interface(agent):
    """CleanRL's get_action_and_value, forward, and their parts agree and keep the batch's shape."""
    obs = torch.randn(5, 7, 3)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    policy, same_value = agent(obs)
    assert isinstance(policy, Distribution)
    assert logprob.shape == entropy.shape == value.shape == (5, 7)
    torch.testing.assert_close(policy.log_prob(action), logprob)
    torch.testing.assert_close(policy.entropy(), entropy)
    torch.testing.assert_close(agent.get_policy(obs).log_prob(action), logprob)
    torch.testing.assert_close(same_value, value)
    torch.testing.assert_close(agent.get_value(obs), value)
    torch.testing.assert_close(agent.get_value(obs[0, 0]), value[0, 0])
    same_action, *_ = agent.get_action_and_value(obs, action)
    assert torch.equal(same_action, action)
    assert agent.get_deterministic_action(obs).shape == action.shape
    assert agent.get_deterministic_action(obs[0, 0]).shape == action.shape[2:]


@only("ppo_discrete")
def test_actions_are_sampled_with_their_probabilities(agent):
    torch.manual_seed(1)
    obs = torch.randn(1, 3).expand(100_000, 3)
    probabilities = agent.get_policy(obs[0]).probs
    actions, logprobs, _, _ = agent.get_action_and_value(obs)
    frequencies = actions.bincount(minlength=4) / len(actions)
    # five standard errors of a frequency, at the most
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=5 * 0.5 / math.sqrt(1e5))
    torch.testing.assert_close(logprobs, probabilities[actions].log())


# What readers do to a torch module takes effect.


def outputs(agent, obs):
    """Log-probability of a fixed action, and value."""
    with torch.no_grad():
        policy, value = agent(obs)
        return torch.stack([policy.log_prob(agent.action), value])


@pytest.fixture
def obs(agent):
    """Observations; and a fixed action for each, which `outputs` takes from the agent."""
    obs = torch.randn(6, 3)
    agent.action = agent.get_policy(obs).sample()
    return obs


def linear_layers(agent):
    return [
        (parent, name, layer)
        for parent in agent.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]


def test_each_parameter_has_a_gradient_of_its_own(agent, obs):
    for _ in range(2):
        agent.zero_grad()
        assert all(weight.grad is None for weight in agent.parameters())
        policy, value = agent(obs)
        (policy.log_prob(agent.action).mean() + policy.entropy().mean() + value.mean()).backward()
        gradients = [weight.grad for weight in agent.parameters()]
        assert all(gradient is not None for gradient in gradients)
        memory = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        assert len(memory) == len(gradients)
        weights = {weight.untyped_storage().data_ptr() for weight in agent.parameters()}
        assert len(weights) == len(gradients)


def test_replaced_layers_take_effect(agent, obs):
    for parent, name, layer in linear_layers(agent):
        before = outputs(agent, obs)
        setattr(parent, name, nn.Linear(layer.in_features, layer.out_features))
        assert not torch.equal(outputs(agent, obs), before), name


def test_forward_hooks_take_effect(agent, obs):
    for _, name, layer in linear_layers(agent):
        before = outputs(agent, obs)
        hook = layer.register_forward_hook(lambda layer, inputs, output: output + 1 + output**2)
        assert not torch.equal(outputs(agent, obs), before), name
        hook.remove()
        assert torch.equal(outputs(agent, obs), before)


def test_functional_call_and_assign_take_effect(agent, obs):
    other = copy.deepcopy(agent)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    expected = outputs(other, obs)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    policy, value = torch.func.functional_call(agent, state, (obs,))
    torch.testing.assert_close(policy.log_prob(agent.action), expected[0])
    torch.testing.assert_close(value, expected[1])
    assert not torch.allclose(outputs(agent, obs), expected)
    agent.load_state_dict(state, assign=True)
    torch.testing.assert_close(outputs(agent, obs), expected)


# The normaliser.


def test_normalizer_equals_two_passes_in_float64(script):
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3, [1e-2, 1, 50], (steps, 4, 3)).astype(np.float32) for steps in (1, 9)]
    batches += [rng.normal(-5, 2, (100, 4, 3)).astype(np.float32)]
    normalizer = script.ObservationNormalizer(3)
    for batch in batches:
        normalizer.update(torch.from_numpy(batch))
    everything = np.concatenate([batch.reshape(-1, 3) for batch in batches]).astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, everything.var(0), rtol=1e-9)
    assert normalizer.count.item() == len(everything)
    obs = batches[2]
    expected = (obs - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8)
    normalized = normalizer(torch.from_numpy(obs))
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized, expected.clip(-10, 10), rtol=1e-6, atol=1e-6)
    assert normalizer(torch.tensor([1e9, -1e9, 0.0])).tolist()[:2] == [10, -10]


def test_normalizer_returns_observations_as_they_are_before_its_first_update(script):
    normalizer, obs = script.ObservationNormalizer(3), torch.tensor([1e6, -1e6, 0.1])
    assert torch.equal(normalizer(obs), obs)
    normalizer.update(torch.randn(5, 2, 3))
    assert normalizer(obs).tolist()[:2] == [10, -10]


def test_normalizer_of_a_constant_stays_finite(script):
    normalizer = script.ObservationNormalizer(3)
    normalizer.update(torch.full((5, 2, 3), 7.0))
    assert not normalizer(torch.full((3,), 7.0)).any()


def test_normalizer_is_part_of_the_agent(script, action_space):
    """Policy and value see normalised observations; the moments are saved with the weights."""
    torch.manual_seed(0)
    agent, loaded = (script.Agent(OBS_SPACE, action_space, norm_obs=True) for _ in range(2))
    obs = 5 + 3 * torch.randn(1000, 3)
    before = outputs_of_zero(agent, obs)
    agent.normalize.update(obs)
    after = outputs_of_zero(agent, obs)
    assert not any(torch.allclose(*pair) for pair in zip(before, after, strict=True))
    loaded.load_state_dict(agent.state_dict())
    for ours, theirs in zip(after, outputs_of_zero(loaded, obs), strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = script.Agent(OBS_SPACE, action_space)
    weights = {name: w for name, w in agent.state_dict().items() if "normalize" not in name}
    plain.load_state_dict(weights)
    normalized = outputs_of_zero(plain, agent.normalize(obs))
    for ours, theirs in zip(after, normalized, strict=True):
        torch.testing.assert_close(ours, theirs)


def outputs_of_zero(agent, obs):
    """Log-probability of action 0, and value."""
    policy, value = agent(obs)
    return policy.log_prob(torch.zeros_like(policy.sample())).detach(), value.detach()
