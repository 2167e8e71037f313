"""What an update does with a rollout."""

import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import WITH_PENALTY
from test_rollout import collect
from torch.distributions import kl_divergence

SETTINGS = dict(num_minibatches=1, update_epochs=3, vf_coef=0.7, ent_coef=0.03, clip_coef=0.1)


def written_out(agent, optimizer, rollout, advantages, returns, args, kl_coef):
    """The update of one minibatch an epoch, in which the order of transitions does not matter."""
    obs, actions, old_logprobs, old_values = (tensor.flatten(0, 1) for tensor in rollout[:4])
    advantages, returns = advantages.flatten(), returns.flatten()
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    old_policy = copy.deepcopy(agent).get_policy(obs)
    for _ in range(args.update_epochs):
        policy, values = agent(obs)
        ratio = (policy.log_prob(actions) - old_logprobs).exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        objective = torch.min(ratio * advantages, clipped * advantages).mean()
        if getattr(args, "surrogate", "clip") == "kl-penalty":
            kl = kl_divergence(old_policy, policy)
            objective = (ratio * advantages - kl_coef * kl).mean()
        errors = (values - returns) ** 2
        if args.clip_vloss:
            near = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
            errors = torch.max(errors, (near - returns) ** 2)
        loss = -objective + args.vf_coef * errors.mean()
        loss = loss - args.ent_coef * policy.entropy().mean()
        gradients = torch.autograd.grad(loss, list(agent.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = min(1.0, args.max_grad_norm / (norm.item() + 1e-6))
        for weight, gradient in zip(agent.parameters(), gradients, strict=True):
            weight.grad = gradient * scale
        optimizer.step()
    return norm.item()


def test_agents_that_keep_a_result_can_be_updated(script, small):
    """As recurrent ones keep a state: a copy of the agent, which PPO-Clip does not need, fails."""
    agent, rollout, _ = collect(script, small)
    agent.state = agent.get_value(rollout.obs)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(agent)
    advantages, returns = torch.randn(2, *rollout.rewards.shape)
    optimizer = torch.optim.Adam(agent.parameters())
    assert "policy_loss" in script.update(agent, optimizer, rollout, advantages, returns, small)


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_grad_norm=1e9),
        dict(max_grad_norm=0.1),
        dict(norm_adv=False, max_grad_norm=1e9),
        dict(clip_vloss=True, max_grad_norm=1e9, clip_coef=0.02),
        dict(surrogate="kl-penalty", max_grad_norm=1e9),
        dict(surrogate="kl-penalty", clip_vloss=True),
    ],
)
def test_update_equals_the_one_written_out(script, small, changes):
    """Three steps of plain gradient descent give the same weights."""
    if "surrogate" in changes and not hasattr(small, "surrogate"):
        pytest.skip("PPO-Clip alone")
    args = dataclasses.replace(small, **SETTINGS | changes)
    agent, rollout, _ = collect(script, args)
    expected, start = copy.deepcopy(agent), copy.deepcopy(agent)
    torch.manual_seed(1)
    advantages, returns = torch.randn(2, *rollout.rewards.shape) + 1
    optimizers = [torch.optim.SGD(a.parameters(), lr=0.1) for a in (agent, expected)]
    written_out(expected, optimizers[1], rollout, advantages, returns, args, 3.0)
    kl_coef = (3.0,) if "surrogate" in changes else ()
    script.update(agent, optimizers[0], rollout, advantages, returns, args, *kl_coef)
    moved = False
    for ours, theirs, before in zip(
        agent.parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
        moved |= (ours - before).abs().max().item() > 1e-3
    assert moved


def run_update(script, args, monkeypatch, **changes):
    """One update with Adam; returns the inputs and metrics of each minibatch, and more."""
    args = dataclasses.replace(args, **changes)
    agent, rollout, _ = collect(script, args)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    seen = []
    for name in ("ppo_loss", "ppo_penalty_loss"):
        if hasattr(script, name):
            original = getattr(script, name)

            def spy(*inputs, original=original, **kwargs):
                loss, metrics = original(*inputs, **kwargs)
                seen.append((inputs, metrics))
                return loss, metrics

            monkeypatch.setattr(script, name, spy)
    advantages, returns = torch.randn(2, args.num_steps, args.num_envs)
    means = script.update(agent, optimizer, rollout, advantages, returns, args)
    return seen, means, rollout, (advantages, returns), optimizer, agent


@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_ratio_is_one_in_the_first_minibatch(script, small, monkeypatch, surrogate):
    if surrogate != "clip" and not hasattr(small, "surrogate"):
        pytest.skip("PPO-Clip alone")
    changes = {} if surrogate == "clip" else {"surrogate": surrogate}
    seen, *_ = run_update(script, small, monkeypatch, learning_rate=0.01, **changes)
    (new_logprobs, old_logprobs, *_), metrics = seen[0]
    torch.testing.assert_close(new_logprobs, old_logprobs, rtol=0, atol=1e-5)
    assert metrics["clipfrac"] == 0 and abs(metrics["approx_kl"]) < 1e-6
    (new_logprobs, old_logprobs, *_), _ = seen[-1]
    assert (new_logprobs - old_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("num_minibatches", [1, 4, 7, 32])
def test_minibatches_cover_all_data_in_every_epoch(script, small, monkeypatch, num_minibatches):
    """In an order that differs from epoch to epoch, and that all inputs share."""
    seen, _, rollout, (advantages, returns), *_ = run_update(
        script, small, monkeypatch, num_minibatches=num_minibatches, update_epochs=3, norm_adv=False
    )
    assert len(seen) == 3 * num_minibatches
    # logprobs, advantages, values, returns of each transition, as ppo_loss is given them
    expected = (rollout.logprobs, advantages, rollout.values, returns)
    expected = torch.stack([tensor.flatten() for tensor in expected], 1)
    orders = []
    for epoch in range(3):
        batches = seen[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        sizes = [len(inputs[5]) for inputs, _ in batches]
        assert max(sizes) - min(sizes) <= 1
        rows = torch.cat([torch.stack([*inputs[1:3], *inputs[4:6]], 1) for inputs, _ in batches])
        orders.append([(expected == row).all(1).nonzero().item() for row in rows])
        assert sorted(orders[-1]) == list(range(len(expected)))
        assert orders[-1] != sorted(orders[-1])
    assert all(first != second for first, second in itertools.combinations(orders, 2))


def test_advantages_are_normalised_in_each_minibatch(script, small, monkeypatch):
    seen, *_ = run_update(script, small, monkeypatch)
    for inputs, _ in seen:
        assert inputs[2].mean().item() == pytest.approx(0, abs=1e-6)
        assert inputs[2].std().item() == pytest.approx(1, rel=1e-5)


def test_target_kl_stops_before_the_step(script, small, monkeypatch):
    changes = {"num_minibatches": 4, "learning_rate": 0.01}
    seen, _, _, _, optimizer, _ = run_update(script, small, monkeypatch, target_kl=1e-6, **changes)
    kls = [metrics["approx_kl"].item() for _, metrics in seen]
    assert kls[-1] > 1.5e-6 and all(kl <= 1.5e-6 for kl in kls[:-1])
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {len(seen) - 1} and len(seen) < 8


def test_target_kl_that_is_not_reached(script, small, monkeypatch):
    seen, _, _, _, optimizer, _ = run_update(script, small, monkeypatch, target_kl=1e6)
    assert len(seen) == 8
    assert all(int(state["step"]) == 8 for state in optimizer.state.values())


@pytest.mark.parametrize("factor", [1.4, 1.6])
def test_target_kl_is_compared_with_one_and_a_half_times_it(script, small, monkeypatch, factor):
    """The second minibatch has a KL of `factor` times the target."""
    changes = {"num_minibatches": 2, "update_epochs": 1, "learning_rate": 0.01}
    seen, *_ = run_update(script, small, monkeypatch, **changes)
    kl = seen[1][1]["approx_kl"].item()
    monkeypatch.undo()
    *_, optimizer, _ = run_update(script, small, monkeypatch, target_kl=kl / factor, **changes)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == ({2} if factor < 1.5 else {1})


@WITH_PENALTY
def test_penalty_is_not_stopped_by_target_kl(script, small, monkeypatch):
    changes = {"surrogate": "kl-penalty", "learning_rate": 0.01, "target_kl": 1e-9}
    seen, *_ = run_update(script, small, monkeypatch, **changes)
    assert len(seen) == 8


def test_metrics_are_means_over_the_minibatches(script, small, monkeypatch):
    seen, means, *_ = run_update(script, small, monkeypatch)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        expected = sum(metrics[name].item() for _, metrics in seen) / len(seen)
        assert means[name] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert type(means[name]) is float


@WITH_PENALTY
def test_kl_coefficient_is_reported_as_it_is(script, small):
    args = dataclasses.replace(small, surrogate="kl-penalty")
    agent, rollout, _ = collect(script, args)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    advantages, returns = torch.randn(2, *rollout.rewards.shape)
    assert script.update(agent, optimizer, rollout, advantages, returns, args, 3.0)["kl_coef"] == 3


@WITH_PENALTY
def test_direction_of_the_penalty(script, small, monkeypatch):
    """KL(pi_old || pi_new) after the last step is reported, and penalised in the next one."""
    changes = {"surrogate": "kl-penalty", "learning_rate": 0.2, "num_minibatches": 1}
    _, means, rollout, _, _, agent = run_update(
        script, small, monkeypatch, update_epochs=1, **changes
    )
    old = collect(script, small)[0]  # seeded alike: the agent before the update
    with torch.no_grad():
        kl = kl_divergence(old.get_policy(rollout.obs), agent.get_policy(rollout.obs)).mean()
        reverse = kl_divergence(agent.get_policy(rollout.obs), old.get_policy(rollout.obs)).mean()
    assert means["kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert abs(kl - reverse) > 0.01 * kl, "the directions must differ for the test to tell"
    monkeypatch.undo()
    seen, *_ = run_update(script, small, monkeypatch, update_epochs=2, **changes)
    (inputs, _) = seen[1]
    assert inputs[3].mean().item() == pytest.approx(kl.item(), rel=1e-3)
