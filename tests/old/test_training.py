"""Learning: known values, solved tasks, determinism, exact resume."""

import dataclasses
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from old.conftest import ON_VECTORS, playing

pytestmark = ON_VECTORS

CPU = torch.device("cpu")


def weights_of(path):
    return torch.load(path, weights_only=True)["agent"]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("gamma", [0.9, 0.5])
def test_value_of_endless_reward_is_bootstrapped(script, small, toy, gamma):
    """Reward 1 for ever, cut every 10 steps: V must approach 1 / (1 - gamma), as if never cut."""
    args = dataclasses.replace(
        small, **toy("Endless"), gamma=gamma, total_timesteps=6000,
        learning_rate=0.01,
    )  # fmt: skip
    result = script.train(args)
    agent, _ = script.load_agent(f"{result['run_dir']}/agent.pt", CPU)
    # Taken for terminations, the cuts would leave 6.5 of 10, and 1.8 of 2.
    assert agent.get_value(torch.ones(2)).item() == pytest.approx(1 / (1 - gamma), rel=0.03)


def test_value_of_terminating_episodes_is_not_bootstrapped(script, small, toy):
    """Reward 1 for 7 steps, then a terminal state: V(t) = 1 + gamma + ... over the rest."""
    args = dataclasses.replace(
        small, **toy("Terminating"), gamma=0.9, total_timesteps=20_000,
        norm_obs=True,
    )  # fmt: skip
    result = script.train(args)
    agent, _ = script.load_agent(f"{result['run_dir']}/agent.pt", CPU)
    values = agent.get_value(torch.tensor([[500.0, t] for t in range(7)]))
    expected = torch.tensor([(1 - 0.9 ** (7 - t)) / (1 - 0.9) for t in range(7)])
    torch.testing.assert_close(values, expected, rtol=0, atol=0.4)


def test_same_seed_same_weights(script, small):
    paths = []
    for seed in (7, 7, 8):
        args = dataclasses.replace(small, seed=seed, exp_name=f"run{len(paths)}")
        paths.append(f"{script.train(args)['run_dir']}/agent.pt")
    first, same, other = map(weights_of, paths)
    assert_equal(first, same)
    assert not any(torch.equal(first[name], other[name]) for name in first if "weight" in name)


@pytest.mark.parametrize("env_id", [None, "LunarLander-v3", "Wears"])
@pytest.mark.parametrize("changes", [{}, {"surrogate": "kl-penalty", "norm_obs": True}])
def test_resumed_run_equals_straight_run(script, small, toy, monkeypatch, env_id, changes):
    """Killed after a checkpoint and resumed, a run ends with the weights of one never stopped."""
    if env_id == "Wears":
        changes = changes | toy(env_id)
    elif env_id:
        continuous = ("continuous=True",) if script.__name__ == "ppo_continuous" else ()
        changes = changes | playing(script, env_id, *continuous)
    changes = changes | {"norm_reward": True, "num_workers": 2 if env_id else 0}
    if script.__name__ == "ppo_multienv":
        changes.pop("surrogate", None)
    args = dataclasses.replace(small, **changes)
    straight = script.train(args)
    assert straight["global_step"] == 512

    save_checkpoint, saves = script.save_checkpoint, []

    def save_then_die(*inputs):
        save_checkpoint(*inputs)
        saves.append(inputs[0])
        if len(saves) == 2:  # iterations 3 and 6 of 8
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        script.train(dataclasses.replace(args, exp_name="killed"))
    monkeypatch.setattr(script, "save_checkpoint", save_checkpoint)
    _, saved = script.read_checkpoint(saves[0])
    resumed = script.train(dataclasses.replace(saved, resume=saves[0]))
    assert resumed["run_dir"] == str(saves[0].parent) != straight["run_dir"]
    assert resumed["eval_returns"] == straight["eval_returns"]
    checkpoints = [
        torch.load(f"{result['run_dir']}/agent.pt", weights_only=True)
        for result in (straight, resumed)
    ]
    assert_equal(checkpoints[0]["agent"], checkpoints[1]["agent"])
    states = [checkpoint["optimizer"]["state"][0] for checkpoint in checkpoints]
    assert_equal(*states)
    ours, theirs = (checkpoint["progress"] for checkpoint in checkpoints)
    assert ours.pop("learning_seconds") != theirs.pop("learning_seconds")
    for point in (*ours["metrics"], *theirs["metrics"]):
        del point["seconds"]
    assert ours == theirs


def test_what_a_run_leaves(script, small, capsys):
    env_id, threshold, env_kwargs = "CartPole-v1", 475, ("sutton_barto_reward=True",)
    if script.__name__ == "ppo_continuous":
        env_id, threshold, env_kwargs = "LunarLander-v3", 200, ("continuous=True",)
    game = playing(script, env_id, *env_kwargs, "max_episode_steps=30")
    result = script.train(dataclasses.replace(small, **game))
    run_dir = script.Path(result["run_dir"])
    assert run_dir.name.startswith(f"{env_id}__{script.__name__}__1__")
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(
        json.dumps(result, default=str)
    )
    assert result["global_step"] == 512 and len(result["eval_returns"]) == 3
    assert result["threshold"] == threshold and result["solved"] is False
    if env_id == "CartPole-v1":
        assert max(result["eval_returns"]) <= 0, "Sutton and Barto's reward: -1 at the fall, else 0"
    assert result["args"]["num_steps"] == 16 and "torch" in result["versions"]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run folder {run_dir}" and len(lines) == 4
    assert lines[1] == "playing 3 episodes with a random agent and with the trained one"
    assert lines[2].startswith("random agent") and lines[2].endswith("over 3 episodes")
    assert lines[3].startswith("trained agent")
    assert lines[3].endswith(f"over 3 episodes, not solved (threshold {threshold})")

    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate",
        "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl",
        "losses/clipfrac", "losses/explained_variance",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    expected = [small.learning_rate * (1 - i / 8) for i in range(8)]
    assert rates == pytest.approx(expected)
    assert [event.step for event in events.Scalars("losses/entropy")] == list(range(64, 513, 64))

    curve = result["curve"]
    assert curve["step"] == list(range(64, 513, 64))
    assert curve["seconds"] == sorted(curve["seconds"])
    assert curve["seconds"][-1] == result["learning_seconds"]
    last = [event.value for event in events.Scalars("charts/episodic_return")][-100:]
    assert curve["episodic_return"][-1] == pytest.approx(sum(last) / len(last))

    gif = script.Image.open(run_dir / "agent.gif")
    assert gif.n_frames > 1 and gif.width == 600
    assert script.Image.open(run_dir / "training.png").size == (1200, 700)


def test_episode_statistics_are_right(script, small, toy):
    """7 rewards of 1 an episode, in 4 environments that restart together at every checkpoint."""
    args = dataclasses.replace(small, **toy("Terminating"), eval_episodes=1)
    result = script.train(args)
    progress = torch.load(f"{result['run_dir']}/agent.pt", weights_only=True)["progress"]
    assert all((total, length) == (7.0, 7) for _, total, length in progress["episodes"])
    # 48 steps between checkpoints hold 6 episodes; the last two iterations (32 steps) hold 4.
    starts = [0] * 6 + [192] * 6 + [384] * 4
    ends = [4 * 7 * (i + 1) for i in (*range(6), *range(6), *range(4))]
    steps = [start + end for start, end in zip(starts, ends, strict=True) for _ in range(4)]
    assert [step for step, _, _ in progress["episodes"]] == steps
