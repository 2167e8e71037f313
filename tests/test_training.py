"""Training: the loop, learning, logging, resuming, and what a crash leaves."""

import dataclasses
import hashlib
import json
import math
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ONCE, WITH_PENALTY, assert_same_weights, load, only
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

CPU = torch.device("cpu")


def scalars(folder, name):
    """(step, value) of each point of a TensorBoard curve, all of them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# Learning, in train and in loops of a reader's own.


def test_value_of_endless_reward_is_bootstrapped(script, small, toy):
    """Reward 1 for ever, cut every 10 steps: V must approach 1 / (1 - gamma), as if never cut."""
    args = dataclasses.replace(
        small, **toy("Endless"), gamma=0.9, total_timesteps=6000, learning_rate=0.01
    )
    agent, _ = script.load_agent(f"{script.train(args)['run_dir']}/agent.pt", CPU)
    # Taken for terminations, the cuts would leave 6.5.
    assert agent.get_value(torch.ones(2)).item() == pytest.approx(10, rel=0.03)


@ONCE
def test_value_of_terminating_episodes_is_not_bootstrapped(script, small, toy):
    """Reward 1 for 7 steps, then a terminal state: V(t) = 1 + gamma + ... over the rest."""
    args = dataclasses.replace(
        small, **toy("Terminating"), gamma=0.9, total_timesteps=12_000, norm_obs=True,
        learning_rate=0.01,
    )  # fmt: skip
    agent, _ = script.load_agent(f"{script.train(args)['run_dir']}/agent.pt", CPU)
    values = agent.get_value(torch.tensor([[500.0, t] for t in range(7)]))
    expected = torch.tensor([(1 - 0.9 ** (7 - t)) / (1 - 0.9) for t in range(7)])
    torch.testing.assert_close(values, expected, rtol=0, atol=0.5)


def correct(obs, action):
    """1 where the action (1, or a number above 0) has the sign of the observation."""
    right = action[..., 0] > 0 if action.is_floating_point() else action == 1
    return (right == (obs[..., 0] > 0)).float()


@pytest.fixture
def two_actions(script):
    box = script.__name__ == "ppo_continuous"
    return gym.spaces.Box(-1, 1, (1,)) if box else gym.spaces.Discrete(2)


def test_pasted_into_a_loop_of_ones_own(script, two_actions):
    """Agent, compute_gae and ppo_loss with the field's most habitual lines: it learns."""
    torch.manual_seed(0)
    agent = script.Agent(gym.spaces.Box(-3, 3, (1,)), two_actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    for _ in range(30):
        with torch.no_grad():
            obs = torch.randn(8, 33, 1)
            policy, values = agent(obs)
            actions = policy.sample()
            logprobs, rewards = policy.log_prob(actions), correct(obs, actions)
            never = torch.zeros(8, 32, dtype=torch.bool)
            advantages, returns = script.compute_gae(
                rewards[:, :-1], values[:, :-1], values[:, 1:], never, ~never, 0.9, 0.9
            )
        for _ in range(4):
            policy, new_values = agent(obs[:, :-1].flatten(0, 1))
            loss, _ = script.ppo_loss(
                policy.log_prob(actions[:, :-1].flatten(0, 1)), logprobs[:, :-1].flatten(),
                advantages.flatten(), new_values, values[:, :-1].flatten(), returns.flatten(),
                policy.entropy(),
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    obs = torch.randn(1000, 1)
    assert correct(obs, agent.get_deterministic_action(obs)).mean() > 0.95
    assert correct(obs, agent.get_policy(obs).sample()).mean() > 0.7


class Sign(gym.Env):
    """Pays 1 for an action with the sign of the observation; episodes of 16 steps."""

    observation_space = gym.spaces.Box(-5, 5, (1,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.obs = 0, self.np_random.normal(size=1).clip(-5, 5).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        reward = correct(torch.tensor(self.obs), torch.as_tensor(action)).item()
        self.obs = self.np_random.normal(size=1).clip(-5, 5).astype(np.float32)
        self.steps += 1
        return self.obs, reward, self.steps == 16, False, {}


def test_agent_drops_into_cleanrls_loop(script, two_actions):
    """CleanRL's ppo.py, shortened: get_value, get_action_and_value, its own GAE and loss."""
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: Sign(two_actions)] * 8)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    obs = torch.zeros((32, 8, *envs.single_observation_space.shape))
    actions = torch.zeros((32, 8, *envs.single_action_space.shape))
    logprobs, rewards, dones, values = torch.zeros(4, 32, 8)
    next_obs, next_done = torch.tensor(envs.reset(seed=1)[0]), torch.zeros(8)
    for _ in range(25):
        for step in range(32):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprobs[step], _, value = agent.get_action_and_value(next_obs)
                values[step] = value.flatten()
            actions[step] = action
            next_obs, reward, terminations, truncations, _ = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward)
            next_obs = torch.tensor(next_obs)
            next_done = torch.tensor(terminations | truncations).float()
        with torch.no_grad():
            next_value = agent.get_value(next_obs).reshape(1, -1)
            advantages, lastgaelam = torch.zeros(32, 8), 0
            for t in reversed(range(32)):
                alive = 1 - (next_done if t == 31 else dones[t + 1])
                nextvalues = next_value if t == 31 else values[t + 1]
                delta = rewards[t] + 0.9 * nextvalues * alive - values[t]
                advantages[t] = lastgaelam = delta + 0.9 * 0.9 * alive * lastgaelam
            returns = (advantages + values).flatten()
        for _ in range(4):
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(
                obs.flatten(0, 1),
                actions.long().flatten() if actions.ndim == 2 else actions.flatten(0, 1),
            )
            ratio = (newlogprob - logprobs.flatten()).exp()
            norm = (advantages.flatten() - advantages.mean()) / (advantages.std() + 1e-8)
            pg_loss = torch.max(-norm * ratio, -norm * ratio.clamp(0.8, 1.2)).mean()
            v_loss = 0.5 * ((newvalue.view(-1) - returns) ** 2).mean()
            loss = pg_loss - 0.01 * entropy.mean() + v_loss * 0.5
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    probe = torch.randn(1000, 1)
    assert correct(probe, agent.get_deterministic_action(probe)).mean() > 0.95


# Algorithm 1: what each iteration of train does.


def test_same_seed_same_weights(script, small, record_updates):
    """The seed is that of the first weights, too."""
    args = dataclasses.replace(small, total_timesteps=192)
    weights = []
    for seed in (7, 7, 8):
        result = script.train(dataclasses.replace(args, seed=seed, exp_name=f"run{len(weights)}"))
        weights.append(load(f"{result['run_dir']}/agent.pt")["agent"])
    initial = [call.weights for call in record_updates if not call.steps]
    for first, same, other in (weights, initial):
        assert_same_weights(first, same)
        assert not any(torch.equal(first[name], other[name]) for name in first if "weight" in name)


@pytest.mark.parametrize("total_timesteps", [256, 200])
def test_annealing_is_linear_over_whole_iterations(script, small, record_updates, total_timesteps):
    """The last of 4 learning rates is a quarter of the first, with a rounded total, too."""
    result = script.train(dataclasses.replace(small, total_timesteps=total_timesteps))
    rates = [call.rates for call in record_updates]
    expected = [[small.learning_rate * (1 - i / 4)] * len(rates[0]) for i in range(4)]
    np.testing.assert_allclose(rates, expected)
    assert result["global_step"] == 256
    logged = scalars(result["run_dir"], "charts/learning_rate")
    assert [step for step, _ in logged] == [64, 128, 192, 256]
    assert [rate for _, rate in logged] == pytest.approx([rate[0] for rate in expected])


@ONCE
def test_no_annealing(script, small, record_updates):
    script.train(dataclasses.replace(small, anneal_lr=False, total_timesteps=192))
    assert {rate for call in record_updates for rate in call.rates} == {small.learning_rate}


@WITH_PENALTY
def test_critic_learning_rate(script, small, record_updates, monkeypatch):
    """The critic's parameters have a rate of their own, annealed alike; 0 is a rate, too."""
    result = script.train(
        dataclasses.replace(small, critic_learning_rate=4e-3, total_timesteps=128)
    )
    actor, critic = small.learning_rate, 4e-3
    rates = [call.rates for call in record_updates]
    np.testing.assert_allclose(rates, [[actor, critic], [actor / 2, critic / 2]])
    assert load(f"{result['run_dir']}/agent.pt")["args"]["critic_learning_rate"] == 4e-3
    record_updates.clear()
    result = script.train(dataclasses.replace(small, critic_learning_rate=0.0, total_timesteps=64))
    final = load(f"{result['run_dir']}/agent.pt")["agent"]
    moved = {
        name.split(".")[0]
        for name, tensor in record_updates[0].weights.items()
        if not torch.equal(tensor, final[name])
    }
    assert "actor" in moved and "critic" not in moved


def test_normalizer_is_updated_after_the_policy(script, small, toy, record_updates):
    """The first rollout is neither normalised nor clipped; each update precedes its moments."""
    args = dataclasses.replace(small, **toy("FarAway"), norm_obs=True, total_timesteps=192)
    result = script.train(args)
    counts = [call.weights["normalize.count"].item() for call in record_updates]
    assert counts == [0, 64, 128]
    final = load(f"{result['run_dir']}/agent.pt")["agent"]
    seen = torch.cat([call.rollout.obs.flatten(0, 1) for call in record_updates]).double()
    assert final["normalize.count"] == 192
    torch.testing.assert_close(final["normalize.mean"], seen.mean(0))
    torch.testing.assert_close(final["normalize.var"], seen.var(0, correction=0))
    plain = script.make_env(args)
    plain = script.Agent(plain.observation_space, plain.action_space)
    first = record_updates[0]
    plain.load_state_dict({n: w for n, w in first.weights.items() if "normalize" not in n})
    torch.testing.assert_close(plain.get_value(first.rollout.obs), first.rollout.values)


@WITH_PENALTY
@pytest.mark.parametrize("target_kl", [1e-9, 1e9, None])
def test_kl_coefficient_adapts_after_each_iteration(script, small, record_updates, target_kl):
    args = dataclasses.replace(
        small, surrogate="kl-penalty", kl_coef=0.5, target_kl=target_kl, total_timesteps=256
    )
    path = f"{script.train(args)['run_dir']}/agent.pt"
    used = [call.rest[0] for call in record_updates]
    kls = [call.metrics["kl"] for call in record_updates]
    expected = [0.5]
    for kl in kls:
        expected.append(script.adapt_kl_coef(expected[-1], kl, target_kl or 0.01))
    assert used == expected[:-1]
    assert len(set(expected)) > 1
    assert load(path)["args"]["kl_coef"] == expected[-1]


def test_advantages_are_those_of_the_rollout(script, small, toy, record_updates):
    args = dataclasses.replace(small, **toy("Staggered"), total_timesteps=128)
    script.train(args)
    for call in record_updates:
        fields = ("rewards", "values", "next_values", "terminations", "truncations")
        inputs = [getattr(call.rollout, name) for name in fields]
        advantages, returns = script.compute_gae(*inputs, args.gamma, args.gae_lambda)
        torch.testing.assert_close(call.advantages, advantages)
        torch.testing.assert_close(call.returns, returns)


@ONCE
def test_weights_that_are_saved_are_those_of_the_last_update(script, small, record_updates):
    """The agent of iteration n + 1 is that of iteration n after its update."""
    saved = []
    for total_timesteps in (128, 192):
        args = dataclasses.replace(small, total_timesteps=total_timesteps, anneal_lr=False)
        saved.append(load(f"{script.train(args)['run_dir']}/agent.pt"))
    assert_same_weights(record_updates[-1].weights, saved[0]["agent"])
    assert not torch.equal(*[list(content["agent"].values())[-1] for content in saved])
    assert [content["progress"]["global_step"] for content in saved] == [128, 192]


def test_train_works_in_another_thread(script, small):
    results = []
    args = dataclasses.replace(small, total_timesteps=64)
    thread = threading.Thread(target=lambda: results.append(script.train(args)))
    thread.start()
    thread.join()
    assert results[0]["global_step"] == 64


# What a run leaves.


def test_files_of_a_run(script, trained):
    names = {path.name for path in trained.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    files = {"agent.pt", "agent.gif", "training.png", "result.json", f"{script.__name__}.py"}
    assert names - events == files and len(events) == 1
    env_id = trained.result["run_dir"].split("/")[1].split("__")
    assert env_id[1:3] == [script.__name__, "1"]
    gif = script.Image.open(trained.folder / "agent.gif")
    assert gif.n_frames > 1 and gif.width > 100, "the trained agent's frames"
    assert script.Image.open(trained.folder / "training.png").size == (1200, 700)


def test_result(script, trained):
    assert "--resume" not in trained.output, "it is finished"
    result = trained.result
    written = json.loads((trained.folder / "result.json").read_text())
    assert written == json.loads(json.dumps(result, default=str))
    assert {
        "run_dir", "global_step", "learning_seconds", "wall_seconds", "eval_returns", "eval_mean",
        "eval_std", "random_returns", "threshold", "solved", "curve", "args", "versions",
    } <= set(result)  # fmt: skip
    assert result["global_step"] == 512
    assert len(result["eval_returns"]) == 3 and len(result["random_returns"]) == 10
    assert result["eval_mean"] == pytest.approx(np.mean(result["eval_returns"]))
    assert result["eval_std"] == pytest.approx(np.std(result["eval_returns"]))
    assert 0 < result["learning_seconds"] < result["wall_seconds"]
    assert result["args"]["num_steps"] == 16
    assert result["versions"]["torch"] == torch.__version__
    agent, args = script.load_agent(trained.path, CPU)
    returns = script.evaluate(agent, args, 3, args.seed, CPU)
    assert returns.tolist() == pytest.approx(result["eval_returns"], rel=1e-4)
    assert script.evaluate(None, args, 10, args.seed, CPU).tolist() == result["random_returns"]


@ONCE
def test_plot(script, small, monkeypatch):
    """Axes have labels; points are marked, so that a single one can be seen."""
    figures, figure = [], script.Figure
    monkeypatch.setattr(
        script, "Figure", lambda *args, **kw: figures.append(figure(*args, **kw)) or figures[-1]
    )
    script.train(dataclasses.replace(small, total_timesteps=64))
    for axis in figures[0].axes:
        assert axis.get_xlabel() and axis.get_ylabel()
        (*_, curve) = axis.lines
        assert len(curve.get_xdata()) == 1 and curve.get_marker() not in ("", "None", None)


def test_script_is_in_the_run_folder(script, trained):
    source = Path(script.__file__).read_bytes()
    assert (trained.folder / f"{script.__name__}.py").read_bytes() == source
    digest = hashlib.sha256(source).hexdigest()
    assert digest in (trained.folder / "result.json").read_text()


def test_output(trained):
    lines = trained.output.splitlines()
    assert lines[0] == f"run folder {trained.result['run_dir']}"
    assert lines[-2].startswith("random agent ") and lines[-2].endswith("over 10 episodes")
    assert lines[-1].startswith("trained agent") and "over 3 episodes" in lines[-1]


@only("ppo_discrete")
def test_verdict(trained):
    assert trained.output.endswith(", not solved (threshold 475)\n")
    assert trained.result["threshold"] == 475 and trained.result["solved"] is False


def test_tensorboard(trained):
    curve = trained.result["curve"]
    steps = list(range(64, 513, 64))
    assert curve["step"] == steps
    assert curve["seconds"] == sorted(curve["seconds"])
    assert curve["seconds"][-1] == trained.result["learning_seconds"]
    for name in (
        "charts/SPS", "charts/learning_rate", "losses/policy_loss", "losses/value_loss",
        "losses/entropy", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance",
    ):  # fmt: skip
        assert [step for step, _ in scalars(trained.folder, name)] == steps, name
    assert len(scalars(trained.folder, "charts/episodic_length")) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_not_ignored(script, small):
    with pytest.raises((AssertionError, AttributeError, RuntimeError), match=r"cuda|CUDA|NVIDIA"):
        script.train(dataclasses.replace(small, cuda=True))


def test_explained_variance(script, small, record_updates):
    """1 - Var(return - V) / Var(return), of the values that the rollout was collected with."""
    result = script.train(dataclasses.replace(small, total_timesteps=128))
    logged = [value for _, value in scalars(result["run_dir"], "losses/explained_variance")]
    expected = [
        1 - ((call.returns - call.rollout.values).var() / call.returns.var()).item()
        for call in record_updates
    ]
    assert logged == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_episodes_are_logged_at_steps_of_their_own(script, small, toy):
    """Environment i ends its n-th episode of 7 steps, worth 7, with transition 28 n - 4 + i + 1."""
    result = script.train(dataclasses.replace(small, **toy("Terminating")))
    expected = [28 * n - 4 + i + 1 for n in range(1, 512 // 28 + 1) for i in range(4)]
    for name in ("charts/episodic_return", "charts/episodic_length"):
        assert scalars(result["run_dir"], name) == [(step, 7.0) for step in expected]
    assert result["curve"]["episodic_return"][-1] == 7.0


def test_returns_are_those_of_each_environment(script, small, toy, record_updates):
    """Episodes of 3 to 7 steps, worth 2 each, in 4 environments: as many points."""
    result = script.train(dataclasses.replace(small, **toy("Staggered")))
    rollouts = [call.rollout for call in record_updates]
    labels = torch.cat([rollout.obs[:, :, 0] for rollout in rollouts])
    dones = torch.cat([rollout.terminations | rollout.truncations for rollout in rollouts])
    expected = [
        (4 * t + i + 1, 3.0 + labels[t, i].item() // 2 % 5) for t, i in dones.nonzero().tolist()
    ]
    assert scalars(result["run_dir"], "charts/episodic_length") == expected
    expected = [(step, 2 * length) for step, length in expected]
    assert scalars(result["run_dir"], "charts/episodic_return") == expected
    last = [value for _, value in expected][-100:]
    assert result["curve"]["episodic_return"][-1] == pytest.approx(np.mean(last))


@pytest.mark.parametrize("checkpoint_interval", [1, 50])
def test_long_episodes_reach_their_limit(script, small, toy, checkpoint_interval):
    """Saving a file does not end episodes: a limit of 60 steps is reached in 4 iterations of 16.

    The curve has gaps where no episode ended.
    """
    game = toy("Endless", "max_episode_steps=60")
    args = dataclasses.replace(
        small, **game, total_timesteps=320, checkpoint_interval=checkpoint_interval
    )
    result = script.train(args)
    lengths = [length for _, length in scalars(result["run_dir"], "charts/episodic_length")]
    assert lengths == [60] * 4
    assert result["curve"]["episodic_return"] == [None, None, None, 60.0, None]


@ONCE
def test_no_evaluation(script, small, monkeypatch):
    """--eval-episodes 0: neither episodes nor GIF, but all else."""
    monkeypatch.setattr(script, "evaluate", None)
    result = script.train(dataclasses.replace(small, total_timesteps=64))
    names = {path.name for path in Path(result["run_dir"]).iterdir()}
    assert {"agent.pt", "training.png", "result.json"} <= names and "agent.gif" not in names
    assert result["eval_returns"] == result["random_returns"] == []
    assert result["eval_mean"] is None and result["solved"] is None


# Crashes: the state of the last whole iteration stays.


@pytest.fixture
def three_iterations(script, small):
    """The checkpoint of a run of 3 iterations, and Args for one that would be of 8."""
    small = dataclasses.replace(small, anneal_lr=False, checkpoint_interval=50)
    args = dataclasses.replace(small, total_timesteps=192, exp_name="short")
    return load(f"{script.train(args)['run_dir']}/agent.pt"), small


def crash(script, monkeypatch, fault):
    """Make the fourth update fail."""
    update, calls = script.update, []

    def failing(agent, *args):
        calls.append(agent)
        metrics = update(agent, *args)
        return fault(agent, metrics) if len(calls) == 4 else metrics

    monkeypatch.setattr(script, "update", failing)


def interrupt(agent, metrics):
    raise KeyboardInterrupt


@ONCE
def test_crash_while_logging_leaves_a_whole_iteration(script, three_iterations, monkeypatch):
    """Weights and counters of the checkpoint are of the same iteration."""
    expected, args = three_iterations
    log_iteration, calls = script.log_iteration, []

    def failing(*inputs):
        calls.append(inputs)
        if len(calls) == 4:
            raise OSError("no space left")
        return log_iteration(*inputs)

    monkeypatch.setattr(script, "log_iteration", failing)
    with pytest.raises(OSError, match="no space left"):
        script.train(dataclasses.replace(args, exp_name="crashed"))
    (path,) = Path("runs").glob("*__crashed__*/agent.pt")
    assert_same_weights(load(path)["agent"], expected["agent"])
    assert load(path)["progress"]["global_step"] == expected["progress"]["global_step"] == 192


@ONCE
def test_history_of_a_checkpoint_is_of_whole_iterations(script, three_iterations, monkeypatch):
    """TensorBoard's disk is full when the fourth iteration has been logged in part."""
    expected, args = three_iterations
    add_scalar, names = script.SummaryWriter.add_scalar, []

    def failing(writer, name, value, step):
        if step > 192:
            names.append(name)
        if step == 256 and not name.startswith("charts/episodic"):
            raise OSError("no space left")
        add_scalar(writer, name, value, step)

    monkeypatch.setattr(script.SummaryWriter, "add_scalar", failing)
    with pytest.raises(OSError, match="no space left"):
        script.train(dataclasses.replace(args, exp_name="crashed"))
    assert "charts/episodic_return" in names
    (path,) = Path("runs").glob("*__crashed__*/agent.pt")
    progress, expected = load(path)["progress"], expected["progress"]
    assert progress["episodes"] == expected["episodes"]
    assert progress["curve"].keys() == expected["curve"].keys() >= {"step", "entropy"}
    assert {len(values) for values in progress["curve"].values()} == {3}


def fail(agent, metrics):
    raise RuntimeError("no track")


def spoil_weights(agent, metrics):
    with torch.no_grad():
        next(agent.parameters()).view(-1)[0] = math.nan
    return metrics


def spoil_metrics(agent, metrics):
    return metrics | {"value_loss": math.inf}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (fail, RuntimeError),
        (interrupt, KeyboardInterrupt),
        (spoil_weights, FloatingPointError),
        (spoil_metrics, FloatingPointError),
    ],
)
def test_crash_leaves_the_last_whole_iteration(script, three_iterations, monkeypatch, fault, error):
    expected, args = three_iterations
    crash(script, monkeypatch, fault)
    with pytest.raises(error) as caught:
        script.train(dataclasses.replace(args, exp_name="crashed"))
    (path,) = Path("runs").glob("*__crashed__*/agent.pt")
    saved = load(path)
    assert_same_weights(saved["agent"], expected["agent"])
    for theirs, ours in zip(
        saved["optimizer"]["state"].values(), expected["optimizer"]["state"].values(), strict=True
    ):
        assert_same_weights(theirs, ours)
    for name in ("global_step", "iteration", "episodes"):
        assert saved["progress"][name] == expected["progress"][name]
    if error is FloatingPointError:
        assert "not finite" in str(caught.value)
    assert any("after step 192" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NanObservation", "obs"),
        ("HugeObservation", "obs"),
        ("NanReward", "rewards"),
        ("NanFinal", "next_values"),
    ],
)
def test_not_finite_stops_the_run(script, main, flags, toy, in_tmp, name, what):
    code, output, errors = main(*flags(**toy(name)))
    assert code == 1 and output.startswith("run folder ") and output.count("\n") == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and "not finite" in last and "step" in last and what in last
    assert "Traceback" not in errors
    assert not list(in_tmp.glob("runs/*/agent.pt"))


# Resuming.


@pytest.fixture
def half(script, small, record_updates):
    """The checkpoint of a run of 4 iterations; record_updates is empty again."""
    args = dataclasses.replace(small, total_timesteps=256, norm_obs=True)
    path = Path(script.train(args)["run_dir"], "agent.pt").absolute()
    record_updates.clear()
    return path


def newest():
    """The checkpoint of the run that was started last; names of run folders end with the time."""
    return max(Path().glob("runs/*/agent.pt"), key=lambda path: path.parent.name.split("__")[-1])


def test_resume_continues_with_the_saved_state(script, half, main, record_updates):
    """In a run folder of its own: nothing that is there is overwritten."""
    saved, before = load(half), {path: path.read_bytes() for path in half.parent.iterdir()}
    code, _, errors = main("--resume", half, "--total-timesteps", 512)
    assert code == 0, errors
    first = record_updates[0]
    assert_same_weights(first.weights, saved["agent"])
    assert first.steps == {4 * 2 * 4}, "4 iterations of 2 epochs of 4 minibatches"
    assert first.rates[0] == pytest.approx(2e-3 / 2)
    assert len(record_updates) == 4
    after = load(newest())
    assert after["progress"]["global_step"] == 512 and after["progress"]["iteration"] == 8
    assert after["agent"]["normalize.count"] == 512
    earlier = len(saved["progress"]["episodes"])
    assert after["progress"]["episodes"][:earlier] == saved["progress"]["episodes"]
    assert after["args"]["total_timesteps"] == 512 and after["args"]["resume"] is None
    assert after["progress"]["resumes"] == 1 and saved["progress"]["resumes"] == 0
    assert before == {path: path.read_bytes() for path in half.parent.iterdir()}
    steps = [step for step, _ in scalars(newest().parent, "losses/entropy")]
    assert steps == list(range(320, 513, 64))
    result = json.loads((newest().parent / "result.json").read_text())
    assert result["resumes"] == 1
    seconds, earlier = result["curve"]["seconds"], saved["progress"]["learning_seconds"]
    assert seconds[3] == earlier < seconds[4] and seconds == sorted(seconds)
    assert result["learning_seconds"] == seconds[-1]


def test_resume_of_a_finished_run_evaluates_it(half, main, record_updates):
    saved = load(half)
    code, _, errors = main("--resume", half)
    assert code == 0 and not record_updates, errors
    assert_same_weights(load(newest())["agent"], saved["agent"])
    assert newest() != half and (newest().parent / "result.json").exists()


def test_resume_draws_new_noise(script, small, toy, main, record_updates):
    """The environments of a resumed run are not those that the run began with."""
    args = dataclasses.replace(small, **toy("Toy"), total_timesteps=64)
    path = Path(script.train(args)["run_dir"], "agent.pt")
    main("--resume", path, "--total-timesteps", 128)
    first, second = (call.rollout for call in record_updates)
    assert not torch.equal(first.obs[0], second.obs[0])
    assert not torch.equal(first.actions, second.actions)


@ONCE
@pytest.mark.parametrize(
    ("flags_beside", "rate", "num_envs"),
    [
        (("--learning-rate", "0.1"), 0.05, 4),
        (("--learning-rate", "0.1", "--no-anneal-lr"), 0.1, 4),
        (("--num-envs", "8"), 1e-3, 8),
        (("--total-timesteps", "320"), 2e-3 / 5, 4),
    ],
)
def test_flags_beside_resume_are_in_force_at_once(
    half, main, record_updates, flags_beside, rate, num_envs
):
    code, _, errors = main("--resume", half, "--total-timesteps", 512, *flags_beside)
    assert code == 0, errors
    assert record_updates[0].rates[0] == pytest.approx(rate)
    assert record_updates[0].rollout.rewards.shape == (16, num_envs)


@WITH_PENALTY
def test_kl_coefficient_of_a_resumed_run(script, small, main, record_updates):
    """The adapted one, or that of the flag beside --resume."""
    args = dataclasses.replace(
        small, surrogate="kl-penalty", target_kl=1e9, total_timesteps=64, kl_coef=0.5
    )
    path = Path(script.train(args)["run_dir"], "agent.pt")
    main("--resume", path, "--total-timesteps", 128)
    assert [call.rest[0] for call in record_updates] == [0.5, 0.25]
    code, _, _ = main("--resume", newest(), "--total-timesteps", 192, "--kl-coef", 3)
    assert code == 0 and record_updates[-1].rest[0] == 3.0
    assert load(newest())["args"]["kl_coef"] == 1.5


@WITH_PENALTY
def test_critic_learning_rate_beside_resume(half, main, record_updates):
    code, _, _ = main("--resume", half, "--total-timesteps", 512, "--critic-learning-rate", 0.02)
    assert code == 0 and record_updates[0].rates == pytest.approx([1e-3, 0.01])


def test_what_cannot_change_beside_resume_is_refused(script, half, main, record_updates):
    before = {path: path.read_bytes() for path in half.parent.iterdir()}
    for flags_beside in (
        ("--no-norm-obs",), ("--hidden-size", 32),
        ("--env-kwargs", "max_episode_steps=3"), ("--surrogate", "kl-penalty"),
        ("--log-std-init", -1),
    ):  # fmt: skip
        setting = flags_beside[0].replace("--no-", "--")[2:].replace("-", "_")
        if not hasattr(script.Args, setting):
            continue
        code, output, errors = main("--resume", half, "--total-timesteps", 512, *flags_beside)
        flag = flags_beside[0].replace("--no-", "--")
        assert code == 2 and output == "" and errors.count("\n") == 1, flags_beside
        assert errors.startswith("error: ") and flag in errors
    code, _, errors = main("--resume", half, "--env-id", "Acrobot-v1")
    assert code == 2 and "--env-id" in errors and "Acrobot-v1" in errors and errors.count("\n") == 1
    assert before == {path: path.read_bytes() for path in half.parent.iterdir()}
    assert not record_updates


@ONCE
def test_evaluate_and_resume_exclude_each_other(half, main):
    code, _, errors = main("--resume", half, "--evaluate", half, "--eval-episodes", 1)
    assert code == 2 and "--evaluate" in errors and "--resume" in errors
    assert errors.count("\n") == 1
