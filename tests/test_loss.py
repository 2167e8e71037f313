"""The loss functions against cases worked by hand."""

import math

import pytest
import torch
from conftest import WITH_PENALTY

ONE = torch.ones(1)
ZERO = torch.zeros(1)


def clip_loss(script, ratio, advantage, **kwargs):
    """Loss, metrics and d loss / d log-probability of one sample, the policy term alone."""
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, metrics = script.ppo_loss(
        logprob, ZERO, advantage * ONE, ZERO, ZERO, ZERO, ZERO, ent_coef=0.0, **kwargs
    )
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.item(), metrics, gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # good action, already far more probable: clipped
        (0.5, 1.0, -0.5, -0.5),  # good action made improbable: pulled back
        (1.5, -1.0, 1.5, 1.5),  # bad action made probable: pushed back
        (0.5, -1.0, 0.8, 0.0),  # bad action, already far less probable: clipped
        (1.1, 2.0, -2.2, -2.2),  # within the range nothing is clipped
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_clip_and_its_gradient(script, ratio, advantage, loss, gradient):
    value, metrics, slope = clip_loss(script, ratio, advantage, clip_coef=0.2)
    assert value == pytest.approx(loss, rel=1e-5)
    assert slope == pytest.approx(gradient, rel=1e-5, abs=1e-12)
    assert metrics["policy_loss"].item() == pytest.approx(loss, rel=1e-5)
    assert metrics["clipfrac"].item() == (abs(ratio - 1) > 0.2)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)


def test_all_terms_by_hand(script):
    new_logprobs = torch.tensor([math.log(2.0), math.log(0.9)])
    advantages, returns = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 3.0])
    values, entropy = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.7])
    loss, metrics = script.ppo_loss(
        new_logprobs, torch.zeros(2), advantages, values, torch.zeros(2), returns, entropy,
        clip_coef=0.2, vf_coef=0.5, ent_coef=0.1,
    )  # fmt: skip
    # L^CLIP = (1.2 - 0.9) / 2, L^VF = (1 + 4) / 2, S = 0.6
    assert loss.item() == pytest.approx(-0.15 + 0.5 * 2.5 - 0.1 * 0.6)
    assert metrics["policy_loss"].item() == pytest.approx(-0.15)
    assert metrics["value_loss"].item() == pytest.approx(2.5)
    assert metrics["entropy"].item() == pytest.approx(0.6)
    assert metrics["clipfrac"].item() == 0.5
    assert metrics["approx_kl"].item() == pytest.approx(
        (1 - math.log(2) + (-0.1 - math.log(0.9))) / 2, rel=1e-5
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.81),  # within 0.2 of the old value 0: as without clipping
        (0.9, 0.64),  # nearer to the return 1 than the clipped 0.2: that one counts
        (-0.9, 3.61),  # further away than the clipped -0.2: the unclipped one counts
    ],
)
def test_clipped_value_loss(script, value, expected):
    _, metrics = script.ppo_loss(
        ZERO, ZERO, ZERO, value * ONE, ZERO, ONE, ZERO, clip_coef=0.2, clip_vloss=True
    )
    assert metrics["value_loss"].item() == pytest.approx(expected)
    _, metrics = script.ppo_loss(ZERO, ZERO, ZERO, value * ONE, ZERO, ONE, ZERO, clip_coef=0.2)
    assert metrics["value_loss"].item() == pytest.approx((value - 1) ** 2)


def test_metrics_are_detached_scalars(script):
    tensors = [torch.randn(8, requires_grad=True) for _ in range(7)]
    loss, metrics = script.ppo_loss(*tensors)
    assert loss.requires_grad and loss.ndim == 0
    assert set(metrics) == {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"}
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("shape", [(8, 1), (1,), (), (2, 4)])
def test_another_shape_is_refused(script, position, shape):
    tensors = [torch.zeros(8) for _ in range(7)]
    tensors[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        script.ppo_loss(*tensors)


def test_matrices_are_refused_even_if_equal(script):
    with pytest.raises(ValueError, match="batch"):
        script.ppo_loss(*[torch.zeros(8, 1) for _ in range(7)])


@WITH_PENALTY
def test_penalty_by_hand(script):
    logprob = torch.tensor([math.log(2.0), math.log(0.5)], requires_grad=True)
    advantages, kl = torch.tensor([1.0, -3.0]), torch.tensor([0.2, 0.4], requires_grad=True)
    zeros = torch.zeros(2)
    loss, metrics = script.ppo_penalty_loss(
        logprob, zeros, advantages, kl, torch.tensor([1.0, 2.0]), zeros, zeros, zeros + 0.5,
        kl_coef=4.0, vf_coef=0.5, ent_coef=0.1,
    )  # fmt: skip
    # E[r A] = (2 - 1.5) / 2, beta E[KL] = 4 * 0.3, L^VF = (1 + 4) / 2: the ratio is not clipped
    assert metrics["policy_loss"].item() == pytest.approx(-(0.25 - 1.2))
    assert loss.item() == pytest.approx(-(0.25 - 1.2) + 0.5 * 2.5 - 0.1 * 0.5)
    slopes = torch.autograd.grad(loss, (logprob, kl))
    torch.testing.assert_close(slopes[0], torch.tensor([-1.0, 0.75]))
    torch.testing.assert_close(slopes[1], torch.tensor([2.0, 2.0]))
    with pytest.raises(ValueError, match="batch"):
        script.ppo_penalty_loss(*[zeros] * 3, kl.unsqueeze(1), *[zeros] * 4, kl_coef=1.0)


@WITH_PENALTY
@pytest.mark.parametrize(
    ("kl_coef", "kl", "expected"),
    [
        (1.0, 0.01 / 1.5 - 1e-6, 0.5),
        (1.0, 0.01 / 1.5 + 1e-6, 1.0),
        (1.0, 0.01, 1.0),
        (1.0, 0.01 * 1.5 - 1e-6, 1.0),
        (1.0, 0.01 * 1.5 + 1e-6, 2.0),
        (1e-4, 0.0, 1e-4),
        (1e4, 1.0, 1e4),
    ],
)
def test_kl_coefficient_adapts(script, kl_coef, kl, expected):
    assert script.adapt_kl_coef(kl_coef, kl, 0.01) == expected


def test_gradients_of_value_and_entropy(script):
    """d loss / dV = 2 c_1 (V - return) / batch; d loss / dS = -c_2 / batch."""
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    entropy = torch.tensor([0.5, 0.7], requires_grad=True)
    zeros, returns = torch.zeros(2), torch.tensor([2.0, 0.0])
    loss, _ = script.ppo_loss(
        zeros, zeros, zeros, values, zeros, returns, entropy, vf_coef=0.5, ent_coef=0.1
    )
    gradients = torch.autograd.grad(loss, (values, entropy))
    torch.testing.assert_close(gradients[0], 0.5 * (values - returns).detach())
    torch.testing.assert_close(gradients[1], torch.tensor([-0.05, -0.05]))


def test_default_coefficients(script):
    """epsilon 0.2, c_1 0.5, c_2 0.01, no clipping of the value loss."""
    logprob, ones = torch.full((1,), math.log(2.0)), torch.ones(1)
    loss, _ = script.ppo_loss(logprob, ZERO, ones, 3 * ones, ZERO, ZERO, ones)
    assert loss.item() == pytest.approx(-1.2 + 0.5 * 9 - 0.01)
