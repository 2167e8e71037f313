"""What is stored of a rollout, and what an update does with it."""

import dataclasses

import numpy as np
import pytest
import torch

from old.conftest import ON_VECTORS

pytestmark = ON_VECTORS

CPU = torch.device("cpu")


def collect(script, args):
    envs = script.make_vector_env(args)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    next_obs = script.start_episodes(envs, args, 0)
    rollout, next_obs = script.collect_rollout(agent, envs, next_obs, args, CPU)
    return agent, rollout, next_obs


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
    # V of what each action led to: the final observation counts `end` steps, not 0
    following = rollout.obs.clone()
    following[:, :, 1] += 1
    reached = agent.get_value(following)
    alive = ~rollout.terminations
    torch.testing.assert_close(rollout.next_values[alive], reached[alive])


@pytest.mark.parametrize("norm_obs", [False, True])
def test_stored_values_and_logprobs_are_the_acting_agents(script, small, norm_obs):
    args = dataclasses.replace(small, norm_obs=norm_obs)
    agent, rollout, _ = collect(script, args)
    _, logprobs, _, values = agent.get_action_and_value(rollout.obs, rollout.actions)
    torch.testing.assert_close(rollout.logprobs, logprobs)
    torch.testing.assert_close(rollout.values, values)


def run_update(script, args, monkeypatch, **changes):
    """One update; returns the metrics of every minibatch, and agent and rollout."""
    args = dataclasses.replace(args, **changes)
    agent, rollout, _ = collect(script, args)
    weights = script.flatten_parameters(agent)
    before = weights.detach().clone()
    optimizer = torch.optim.Adam([weights], args.learning_rate, eps=1e-5, fused=True)
    seen = []
    for name in ("ppo_loss", "ppo_penalty_loss"):
        if hasattr(script, name):
            original = getattr(script, name)

            def spy(*inputs, original=original):
                loss, metrics = original(*inputs)
                seen.append((inputs, metrics))
                return loss, metrics

            monkeypatch.setattr(script, name, spy)
    advantages, returns = torch.randn(2, args.num_steps, args.num_envs)
    last = script.Ranks(args) if script.__name__ == "ppo_multienv" else 1.0
    means = script.update(agent, weights, optimizer, rollout, advantages, returns, args, last)
    return seen, means, (weights.detach() - before).abs().max().item(), returns, optimizer


@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_ratio_is_one_in_the_first_minibatch(script, small, monkeypatch, surrogate):
    changes = {"surrogate": surrogate} if hasattr(small, "surrogate") else {}
    seen, *_ = run_update(script, small, monkeypatch, learning_rate=0.01, **changes)
    (new_logprobs, old_logprobs, *_), metrics = seen[0]
    torch.testing.assert_close(new_logprobs, old_logprobs, rtol=0, atol=1e-6)
    assert metrics["clipfrac"] == 0 and abs(metrics["approx_kl"]) < 1e-6
    (new_logprobs, old_logprobs, *_), _ = seen[-1]
    assert (new_logprobs - old_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("num_minibatches", [1, 4, 7, 32])
def test_minibatches_cover_all_data_in_every_epoch(script, small, monkeypatch, num_minibatches):
    seen, _, _, returns, _ = run_update(
        script, small, monkeypatch, num_minibatches=num_minibatches, update_epochs=3
    )
    assert len(seen) == 3 * num_minibatches
    orders = []
    for epoch in range(3):
        batches = seen[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        sizes = [len(inputs[5]) for inputs, _ in batches]
        assert max(sizes) - min(sizes) <= 1
        orders.append(torch.cat([inputs[5] for inputs, _ in batches]))
        assert torch.equal(orders[-1].sort().values, returns.flatten().sort().values)
    assert not torch.equal(orders[0], orders[1])


def test_advantages_are_normalised_in_each_minibatch(script, small, monkeypatch):
    seen, *_ = run_update(script, small, monkeypatch)
    for inputs, _ in seen:
        assert inputs[2].mean().item() == pytest.approx(0, abs=1e-6)
        assert inputs[2].std().item() == pytest.approx(1, rel=1e-5)
    monkeypatch.undo()
    seen, *_ = run_update(script, small, monkeypatch, norm_adv=False)
    assert all(abs(inputs[2].std().item() - 1) > 1e-4 for inputs, _ in seen)


def test_target_kl_stops_before_the_step(script, small, monkeypatch):
    changes = {"num_minibatches": 4, "learning_rate": 0.01}
    seen, _, _, _, optimizer = run_update(script, small, monkeypatch, target_kl=1e-6, **changes)
    kls = [metrics["approx_kl"].item() for _, metrics in seen]
    assert kls[-1] > 1.5e-6 and all(kl <= 1.5e-6 for kl in kls[:-1])
    (state,) = optimizer.state.values()
    assert state["step"] == len(seen) - 1 < 8
    monkeypatch.undo()
    seen, _, _, _, optimizer = run_update(script, small, monkeypatch, target_kl=1e6, **changes)
    assert len(seen) == 8


def test_gradient_is_clipped(script, small, monkeypatch):
    """Adam is given a gradient of the norm max_grad_norm."""
    norms = []
    original = torch.optim.Adam.step

    def step(self, *args):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        return original(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    _, means, *_ = run_update(script, small, monkeypatch, max_grad_norm=0.01)
    assert means["grad_norm"] > 0.01
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_seeds_differ_between_environments_iterations_and_runs(script, small, toy):
    def labels(seed, iteration):
        args = dataclasses.replace(small, **toy("Toy"), seed=seed, num_envs=8)
        envs = script.make_vector_env(args)
        return tuple(script.start_episodes(envs, args, iteration)[:, 0].tolist())

    assert labels(1, 0) == labels(1, 0)
    streams = [labels(seed, iteration) for seed in (1, 2, 3) for iteration in (0, 1, 2)]
    assert len(set(streams)) == 9
    assert len(set(np.concatenate(streams))) > 60, "neighbouring seeds share no environments"
