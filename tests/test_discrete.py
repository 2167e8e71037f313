"""What only ppo_discrete.py does: CartPole by the default command, and actions that start at 5."""

import dataclasses

import numpy as np
import pytest
from conftest import only

pytestmark = only("ppo_discrete")


def test_actions_that_count_from_five_are_learned(script, small):
    args = dataclasses.replace(
        small, env_id="CountsFromFive-v0", total_timesteps=4000, eval_episodes=3
    )
    result = script.train(args)
    assert result["eval_returns"] == [10.0] * 3
    assert 0 < np.mean(result["random_returns"]) < 10


def test_default_command_solves_cartpole(script, in_tmp, no_gif):
    result = script.train(script.Args(eval_episodes=10))
    assert result["eval_mean"] >= 475 and result["solved"] is True
    assert np.mean(result["random_returns"]) < 40


def test_penalty_learns_cartpole(script, in_tmp, no_gif):
    """A third of the steps of the default run."""
    args = script.Args(surrogate="kl-penalty", total_timesteps=30_000, eval_episodes=10)
    assert script.train(args)["eval_mean"] >= 150


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_cartpole_is_perfect_on_five_seeds(script, in_tmp, surrogate, seed):
    result = script.train(script.Args(surrogate=surrogate, seed=seed))
    assert result["eval_returns"] == [500.0] * 100
