"""compute_gae against sums written out, and cases worked by hand."""

import pytest
import torch


def direct_sum(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """PPO eq. 11 term by term in float64: for each step, TD errors up to the end of its episode."""
    steps, envs = rewards.shape
    advantages = torch.zeros(steps, envs, dtype=torch.float64)
    for e in range(envs):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                target = rewards[k, e].double()
                if not terminations[k, e]:
                    target = target + gamma * next_values[k, e].double()
                advantages[t, e] += weight * (target - values[k, e].double())
                if terminations[k, e] or truncations[k, e]:
                    break
                weight *= gamma * gae_lambda
    return advantages


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
def test_equals_the_direct_sum(script, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 50, 6, generator=generator)
    terminations, truncations = torch.rand(2, 50, 6, generator=generator) < 0.1
    assert (terminations & truncations).any() and (~terminations & truncations).any()
    inputs = (rewards, values, next_values, terminations, truncations)
    advantages, returns = script.compute_gae(*inputs, gamma, gae_lambda)
    expected = direct_sum(*inputs, gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(returns.double(), expected + values, rtol=1e-5, atol=1e-4)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


NOWHERE = column(0, 0, 0)


@pytest.mark.parametrize(
    ("terminations", "truncations", "expected"),
    [
        # gamma = lambda = 1/2, r = (1, 2, 3), V = (4, 5, 6), V(next) = (5, 6, 8):
        # delta = (1 + 2.5 - 4, 2 + 3 - 5, 3 + 4 - 6) = (-0.5, 0, 1); decay 1/4
        (NOWHERE, NOWHERE, (-0.5 + 0.25 * 0.25, 0.25, 1)),
        # ended at the second step in a terminal state: delta = (-0.5, 2 - 5, 1)
        (column(0, 1, 0), NOWHERE, (-0.5 - 0.75, -3, 1)),
        # cut at the second step: delta as without, nothing passed back from the third
        (NOWHERE, column(0, 1, 0), (-0.5, 0, 1)),
        # both: terminated wins
        (column(0, 1, 0), column(0, 1, 0), (-0.5 - 0.75, -3, 1)),
        # at the last step
        (column(0, 0, 1), NOWHERE, (-0.5 - 0.1875, -0.75, -3)),
        (NOWHERE, column(0, 0, 1), (-0.5 + 0.0625, 0.25, 1)),
    ],
)
def test_by_hand(script, terminations, truncations, expected):
    values, next_values = column(4, 5, 6), column(5, 6, 8)
    for flag in (torch.Tensor.bool, torch.Tensor.float):
        advantages, returns = script.compute_gae(
            column(1, 2, 3), values, next_values, flag(terminations), flag(truncations), 0.5, 0.5
        )
        torch.testing.assert_close(advantages, column(*expected))
        torch.testing.assert_close(returns, column(*expected) + values)


def test_value_after_a_terminal_state_is_never_used(script):
    next_values = column(1, float("nan"), 1)
    advantages, _ = script.compute_gae(
        column(1, 1, 1), column(0, 0, 0), next_values, column(0, 1, 0), column(0, 1, 0), 1.0, 1.0
    )
    torch.testing.assert_close(advantages, column(3, 1, 2))


def test_inputs_are_not_changed(script):
    inputs = [torch.randn(5, 3) for _ in range(3)] + [torch.rand(2, 5, 3)[i] < 0.3 for i in (0, 1)]
    copies = [tensor.clone() for tensor in inputs]
    script.compute_gae(*inputs, 0.99, 0.95)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_advantages_do_not_carry_over_to_the_next_call(script):
    """A rollout's last advantage rests on its next value alone."""
    inputs = (column(1), column(2), column(3), column(0), column(0), 0.5, 0.9)
    for _ in range(2):
        advantages, returns = script.compute_gae(*inputs)
        torch.testing.assert_close(advantages, column(1 + 0.5 * 3 - 2))
        torch.testing.assert_close(returns, column(2.5))
