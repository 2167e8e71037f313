"""What only ppo_discrete.py does: CartPole by the default command, and actions that start at 5."""

import dataclasses

import numpy as np
import pytest
from conftest import only

pytestmark = only("ppo_discrete")


def test_actions_that_count_from_five_are_learned(script, small):
    args = dataclasses.replace(small, env_id="toy_envs:CountsFromFive-v0", total_timesteps=8000)
    result = script.train(args)
    assert result["eval_returns"] == [10.0] * 3
    assert 0 < np.mean(result["random_returns"]) < 10


@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_default_command_solves_cartpole(script, in_tmp, surrogate):
    result = script.train(dataclasses.replace(script.Args(), surrogate=surrogate))
    assert result["eval_mean"] >= 475 and result["solved"] is True
    assert np.mean(result["random_returns"]) < 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_cartpole_is_perfect_on_five_seeds(script, in_tmp, seed):
    result = script.train(dataclasses.replace(script.Args(), seed=seed))
    assert result["eval_returns"] == [500.0] * 100
