"""The network, its distribution, the normaliser, and the flattened parameters."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import ON_VECTORS
from gymnasium import spaces
from torch.distributions import Categorical, kl_divergence

import ppo_discrete

OBSERVATIONS = spaces.Box(-1, 1, (3,))


@pytest.fixture
def agent():
    torch.manual_seed(0)
    agent = ppo_discrete.Agent(OBSERVATIONS, spaces.Discrete(4), norm_obs=False)
    for weight in agent.parameters():  # away from the nearly uniform policy of the start
        weight.data.add_(0.5 * torch.randn_like(weight))
    return agent


def test_initialisation_is_orthogonal():
    agent = ppo_discrete.Agent(OBSERVATIONS, spaces.Discrete(4), norm_obs=False)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, scale in zip(network.layers, (math.sqrt(2), math.sqrt(2), last), strict=True):
            singular_values = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular_values, torch.full_like(singular_values, scale))
            assert not layer.bias.any()
    assert not set(agent.actor.parameters()) & set(agent.critic.parameters())


def test_distribution_equals_torch_categorical(agent):
    obs, action = torch.randn(5, 7, 3), torch.randint(4, (5, 7))
    policy = Categorical(logits=agent.get_logits(obs))
    same, logprob, entropy, value = agent.get_action_and_value(obs, action)
    assert torch.equal(same, action)
    torch.testing.assert_close(logprob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy())
    torch.testing.assert_close(value, agent.get_value(obs))
    assert value.shape == (5, 7)
    assert torch.equal(agent.get_deterministic_action(obs), policy.probs.argmax(-1))


def test_actions_are_sampled_with_their_probabilities(agent):
    torch.manual_seed(1)
    obs = torch.randn(1, 3).expand(100_000, 3)
    probabilities = agent.get_logits(obs[0]).softmax(-1)
    actions, logprobs, _, _ = agent.get_action_and_value(obs)
    frequencies = actions.bincount(minlength=4) / len(actions)
    # five standard errors of a frequency, at the most
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=5 * 0.5 / math.sqrt(1e5))
    torch.testing.assert_close(logprobs, probabilities[actions].log())


def test_kl_divergence_equals_torch():
    old, new = torch.randn(2, 50, 4)
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    torch.testing.assert_close(ppo_discrete.kl_divergence(old, new), expected)
    assert not ppo_discrete.kl_divergence(old, old).any()


@ON_VECTORS
def test_normalizer_equals_two_passes_in_float64(script):
    alone = (script.Ranks(script.Args()),) if script.__name__ == "ppo_multienv" else ()
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3, [1e-2, 1, 50], (steps, 4, 3)).astype(np.float32) for steps in (1, 9)]
    batches += [rng.normal(-5, 2, (100, 4, 3)).astype(np.float32)]
    normalizer = script.ObservationNormalizer(3)
    for batch in batches:
        normalizer.update(torch.from_numpy(batch), *alone)
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


def test_normalizer_is_part_of_the_agent():
    agent = ppo_discrete.Agent(OBSERVATIONS, spaces.Discrete(4), norm_obs=True)
    obs = 5 + 3 * torch.randn(1000, 3)
    agent.normalize.update(obs)
    loaded = ppo_discrete.Agent(OBSERVATIONS, spaces.Discrete(4), norm_obs=True)
    loaded.load_state_dict(agent.state_dict())
    assert torch.equal(agent.get_value(obs), loaded.get_value(obs))
    assert torch.equal(agent.get_value(obs), agent.critic(agent.normalize(obs)).squeeze(-1))
    assert not torch.equal(agent.get_value(obs), agent.critic(obs).squeeze(-1))


def test_flat_parameters_step_like_separate_ones(agent):
    """Norm, clipping and Adam over one vector give what they give over the list of weights."""
    separate = copy.deepcopy(agent)
    vector = ppo_discrete.flatten_parameters(agent)
    flat_adam = torch.optim.Adam([vector], 1e-2, eps=1e-5, fused=True)
    adam = torch.optim.Adam(separate.parameters(), 1e-2, eps=1e-5)
    obs = torch.randn(16, 3)
    for _ in range(5):
        vector.grad.zero_()
        agent.get_value(obs).square().mean().backward()
        vector.grad.mul_((0.5 / (vector.grad.norm() + 1e-6)).clamp(max=1))
        flat_adam.step()
        adam.zero_grad()
        separate.get_value(obs).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(separate.parameters(), 0.5)
        assert norm > 0.5
        adam.step()
    for weight, expected in zip(
        agent.critic.parameters(), separate.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
