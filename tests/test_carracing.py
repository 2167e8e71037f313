"""CarRacing: the same pixels as Gymnasium's, what the agent sees of them, Beta, and processes."""

import contextlib
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.box2d.car_racing import CarRacing
from test_update import SETTINGS, written_out
from torch import nn

import ppo_carracing_cnn as script

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def controls(style, rng):
    """Steering, gas and brake for eight frames: straight ahead leaves road and field."""
    if style == "straight":
        return np.array([0.0, 1.0, 0.0])
    if style == "wild":
        return rng.uniform([-1, 0, 0], [1, 1, 0.3])
    return np.array([rng.uniform(-0.3, 0.3), 0.4, 0.0])


@pytest.mark.parametrize("domain_randomize", [False, True])
@pytest.mark.parametrize(
    ("style", "seed", "steps"), [("wild", 1, 150), ("road", 2, 150), ("straight", 6, 300)]
)
def test_pixels_rewards_and_flags_equal_gymnasiums(style, seed, steps, domain_randomize):
    """From the zooming first second on, on and off the road, up to and over the field's edge."""
    envs = [cls(domain_randomize=domain_randomize) for cls in (CarRacing, script.LazyCarRacing)]
    frames = [env.reset(seed=seed)[0] for env in envs]
    assert np.array_equal(*frames)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        if step % 8 == 0:
            action = controls(style, rng)
        (frame, *rest), (same_frame, *same_rest) = (env.step(action) for env in envs)
        assert rest == same_rest
        assert np.array_equal(frame, same_frame), f"step {step}"
        if rest[1]:
            break
    assert (style == "straight") == rest[1], "the straight drive ends over the edge"
    # another episode of the same objects: nothing is kept that should not be
    frames = [env.reset(seed=seed + 1)[0] for env in envs]
    assert np.array_equal(*frames)


def test_view_is_the_same_on_both_renderers():
    """Every fourth frame, stacked, and the last one of an episode that ends within a repeat."""
    stock, lazy = (
        script.make_env(script.Args(stock_renderer=stock), training=False)
        for stock in (True, False)
    )
    assert isinstance(lazy.unwrapped, script.LazyCarRacing)
    assert not isinstance(stock.unwrapped, script.LazyCarRacing)
    assert np.array_equal(stock.reset(seed=8)[0], lazy.reset(seed=8)[0])
    for _ in range(60):
        action = np.array([0.5, 1.0], np.float32)  # straight over the edge, on frame 191
        (obs, *rest), (same_obs, *same_rest) = stock.step(action), lazy.step(action)
        assert np.array_equal(obs, same_obs) and rest == same_rest
        if rest[1]:
            break
    assert rest[1] and rest[0] < -90


class Counting(gym.Env):
    """Shows the number of frames since reset; pays 1, 10, 100 ... for them; ends when told."""

    observation_space = spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (3,))
    metadata = {"render_fps": 50, "render_modes": []}  # noqa: RUF012

    def __init__(self, ends_at=None):
        self.ends_at, self.controls = ends_at, []

    car = SimpleNamespace(hull=SimpleNamespace(position=(3.2, 0.1)))
    track = [(0.0, 0.0, float(x), 0.0) for x in range(20)]  # noqa: RUF012

    @property
    def road(self):
        return [SimpleNamespace(road_visited=i < self.count) for i in range(20)]

    @property
    def t(self):
        return self.count / 50

    def show(self):
        return np.full((96, 96, 3), self.count, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self.show(), {}

    def step(self, action):
        self.controls.append(action)
        self.count += 1
        return self.show(), 10.0**self.count, self.count == self.ends_at, False, {}


def test_repeat_and_stack():
    view = script.AgentView(Counting(ends_at=10), script.Args(), np.inf)
    obs, _ = view.reset()
    assert obs.shape == (97, 96, 4) and obs.dtype == np.uint8 and not obs[:96].any()
    first, reward, *_ = view.step(np.array([1.0, 0.75]))
    assert first[0, 0].tolist() == [0, 0, 0, 4] and reward == 11110
    assert len(view.env.controls) == 4
    assert view.env.controls[0].tolist() == [1.0, 0.5, 0.0]
    second, reward, terminated, *_ = view.step(np.array([0.0, 0.0]))
    assert second[0, 0].tolist() == [0, 0, 4, 8] and not terminated
    assert view.env.controls[-1].tolist() == [-1.0, 0.0, 1.0]
    last, reward, terminated, *_ = view.step(np.array([0.5, 0.5]))
    assert terminated and reward == 10**9 + 10**10 and len(view.env.controls) == 10
    assert last[0, 0].tolist() == [0, 4, 8, 10]
    assert (last[96, 0] == 255 * 10 // 20).all() and (second[96, 0] == 255 * 8 // 20).all()
    assert (last[96, 1] == 255 * 10 // 1000).all() and not last[96, 6:].any()
    assert first[0, 0].tolist() == [0, 0, 0, 4], "what was returned stays as it was"
    obs, _ = view.reset()
    assert not obs[:96].any(), "no frame of the last episode is left"


def test_lap_state():
    """Of a car that has missed tiles 3 and 5, and visited all others up to its place."""
    env = script.make_env(script.Args(), training=False)
    env.reset(seed=1)
    env = env.unwrapped
    tiles, env.t = len(env.track), 250 / 50
    for i, tile in enumerate(env.road):
        tile.road_visited = i <= 100 and i not in (3, 5)
    env.car = SimpleNamespace(hull=SimpleNamespace(position=env.track[100][2:]))
    expected = [99 / tiles, 0.25, 1.0, 1 / tiles, 100 / tiles, 0.2]
    assert script.lap_state(env) == pytest.approx(expected)
    for tile in env.road[101:]:
        tile.road_visited = True
    expected = [(tiles - 2) / tiles, 0.25, 0.2, (tiles - 97) / tiles, 100 / tiles, 0.2]
    assert script.lap_state(env) == pytest.approx(expected)
    env.road[3].road_visited, env.road[5].road_visited, env.t = True, True, 30.0
    assert script.lap_state(env) == pytest.approx([1, 1, 0, 0, 100 / tiles, 0])


def test_lost_car_is_truncated_in_training_alone():
    args = script.Args(max_steps_without_progress=10)
    standing = np.array([0.5, 0.5])
    for training in (True, False):
        view = script.make_env(args, training)
        view.reset(seed=1)
        flags = [view.step(standing)[2:4] for _ in range(31)]
        assert not any(terminated for terminated, _ in flags)
        truncations = [truncated for _, truncated in flags]
        # The first tiles lie under the car: the count starts a few steps later.
        assert truncations.index(True) in range(9, 13) if training else not any(truncations)


def test_a_blind_view_earns_the_same():
    """A random agent's pictures are not drawn; rewards, flags and the lap do not depend on them."""
    seeing, blind = script.make_env(script.Args()), script.make_env(script.Args())
    blind.blind, rng = True, np.random.default_rng(0)
    seeing.reset(seed=3), blind.reset(seed=3)
    drawn = blind.unwrapped.observe
    blind.unwrapped.observe = lambda: pytest.fail("a frame was drawn") or drawn()
    for _ in range(20):
        action = rng.uniform(size=2)
        (obs, *rest), (same_obs, *same_rest) = seeing.step(action), blind.step(action)
        assert rest == same_rest and np.array_equal(obs[96], same_obs[96])


def make_agent():
    torch.manual_seed(0)
    agent = script.Agent(spaces.Box(0, 255, (97, 96, 4), np.uint8), spaces.Box(0, 1, (2,)))
    agent.actor[-1].weight.data.mul_(100)  # away from the nearly uniform policy of the start
    return agent


def random_obs(batch):
    return torch.randint(0, 256, (batch, 97, 96, 4), dtype=torch.uint8)


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (9, 4), (5, 1), (7, 5), (3, 2)])
def test_policy_is_blind_to_the_rows_of_the_critic(kernel, stride):
    """Whatever the first layer: a larger kernel must not reach below the frames."""
    agent, obs = make_agent(), random_obs(4)
    agent.body = nn.Sequential(
        nn.Conv2d(4, 64, kernel, stride), nn.AdaptiveAvgPool2d(5), nn.Flatten()
    )
    changed = obs.clone()
    changed[:, 96] = 255 - changed[:, 96]
    policy, same_policy = agent.get_policy(obs), agent.get_policy(changed)
    torch.testing.assert_close(policy.mean, same_policy.mean, rtol=0, atol=0)
    assert not torch.isclose(agent.get_value(obs), agent.get_value(changed)).any()
    for i in range(6):  # each number of lap_state
        changed = obs.clone()
        changed[:, 96, i] = 255 - changed[:, 96, i]
        assert not torch.isclose(agent.get_value(obs), agent.get_value(changed)).any()
    changed = obs.clone()
    changed[:, :96] = 255 - changed[:, :96]
    assert not torch.isclose(policy.mean, agent.get_policy(changed).mean).any(), "frames are seen"


def test_each_edge_of_the_frames_is_seen():
    agent, obs = make_agent(), random_obs(8)
    agent.body[0] = nn.Conv2d(4, 16, 8, 4)
    mean = agent.get_policy(obs).mean
    for index in (np.s_[:, :4], np.s_[:, 92:96], np.s_[:, :96, :4], np.s_[:, :96, 92:]):
        changed = obs.clone()
        changed[index] = 255 - changed[index]
        assert not torch.equal(mean, agent.get_policy(changed).mean)


def test_pixels_are_divided_by_255_and_inputs_left_alone():
    agent, obs = make_agent(), random_obs(8)
    seen = []
    agent.body[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    for inputs in (obs, obs.float()):
        before = inputs.clone()
        agent.get_policy(inputs)
        assert torch.equal(inputs, before)
        torch.testing.assert_close(seen[-1], obs[:, :96].permute(0, 3, 1, 2) / 255)
    assert len(seen) == 2, "hooks are called"


def test_the_critics_numbers_are_scaled():
    """From 0 to 255, to -4 to 4; the frames' features come before them."""
    agent, seen = make_agent(), []
    agent.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs = random_obs(2)
    obs[0, 96], obs[1, 96] = 0, 255
    agent.get_value(obs)
    assert seen[0].shape == (2, 1606)
    assert seen[0][:, -6:].tolist() == [[-4.0] * 6, [255 / 32 - 4] * 6]


def test_forward_runs_the_body_once():
    agent, calls = make_agent(), []
    agent.body.register_forward_hook(lambda *_: calls.append(1))
    agent.get_action_and_value(random_obs(2))
    assert len(calls) == 1


def test_beta_equals_its_closed_form():
    agent, obs = make_agent(), random_obs(64)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    beta = agent.get_policy(obs).base_dist
    a, b = beta.concentration1.double(), beta.concentration0.double()
    assert (a > 1).all() and (b > 1).all()
    x = action.double()
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    expected = ((a - 1) * x.log() + (b - 1) * (1 - x).log() - log_beta).sum(-1)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-4, atol=1e-4)
    digamma = torch.digamma
    terms = log_beta - (a - 1) * digamma(a) - (b - 1) * digamma(b) + (a + b - 2) * digamma(a + b)
    torch.testing.assert_close(entropy.double(), terms.sum(-1), rtol=1e-4, atol=1e-4)
    assert action.shape == (64, 2) and ((action > 0) & (action < 1)).all()
    assert value.shape == logprob.shape == entropy.shape == (64,)
    mode = agent.get_deterministic_action(obs).double()
    torch.testing.assert_close(mode, (a - 1) / (a + b - 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.get_value(obs), value)


def test_samples_stay_where_the_density_is_finite(monkeypatch):
    agent = make_agent()
    samples = iter((0.0, 1.0))
    monkeypatch.setattr(
        torch.distributions.Beta, "rsample", lambda self, shape: self.mean * 0 + next(samples)
    )
    for expected in (1e-6, 1 - 1e-6):
        action, logprob, *_ = agent.get_action_and_value(random_obs(2))
        torch.testing.assert_close(action, torch.full((2, 2), expected), rtol=0, atol=1e-7)
        assert logprob.isfinite().all()


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    def main(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ppo_carracing_cnn", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        return stop.value.code, *capsys.readouterr()

    return main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "CartPole-v1"), ("--env-id", "CarRacing-v3", "CartPole-v1")),
        (("--env-kwargs", "continuous=False"), ("--env-kwargs", "continuous")),
        (("--env-kwargs", "no_such_argument=1"), ("--env-kwargs", "no_such_argument")),
        (("--action-repeat", "0"), ("--action-repeat", "from 1")),
        (("--step-timeout", "10000000"), ("--step-timeout", "from 0.1 to 1000000")),
        (("--reward-scale", "nan"), ("--reward-scale", "from 0")),
        (("--num-minibatches", "2049"), ("--num-minibatches", "from 1 to 2048")),
        (("--resume", "nowhere.pt"), ("nowhere.pt",)),
    ],
)
def test_settings_that_cannot_work(main, tmp_path, flags, words):
    code, output, errors = main(*flags)
    assert code == 2 and output == "" and errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert list(tmp_path.iterdir()) == []


TINY = script.Args(
    num_envs=2, num_steps=8, total_timesteps=48, num_minibatches=2, update_epochs=2,
    checkpoint_interval=2, eval_episodes=0, max_steps_without_progress=5,
)  # fmt: skip


def collect(args):
    envs = script.make_vector_env(args)
    agent = make_agent()
    next_obs = script.reset_envs(envs, args, 0)
    rollout, _ = script.collect_rollout(agent, envs, next_obs, args, CPU)
    envs.close()
    return agent, rollout


def test_rollouts_of_both_renderers_are_the_same():
    rollouts = []
    for stock_renderer in (False, True):
        args = dataclasses.replace(
            TINY, stock_renderer=stock_renderer, num_steps=24, max_steps_without_progress=3
        )
        agent, rollout = collect(args)
        rollouts.append(rollout)
    for first, second in zip(*rollouts, strict=True):
        torch.testing.assert_close(first, second)
    assert torch.equal(rollouts[0].obs, rollouts[1].obs)
    assert rollouts[0].truncations.any() and rollouts[0].obs.float().std() > 10
    # What is stored is what the agent that acted says of it.
    flat = [tensor.flatten(0, 1) for tensor in rollouts[0]]
    _, logprobs, _, values = agent.get_action_and_value(flat[0], flat[1])
    torch.testing.assert_close(flat[2], logprobs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flat[3], values, rtol=1e-3, atol=1e-4)
    # Within an episode the next value is that of the next step; a cut has a value of its own.
    ended = rollouts[0].truncations[:-1]
    following = torch.isclose(rollouts[0].next_values[:-1], rollouts[0].values[1:])
    assert following[~ended].all() and not following[ended].any()


class Scripted:
    """Two environments without processes: the first ends after 3 steps, the second after 5.

    The first is truncated, the second terminates; a step is worth its number, and its pictures are
    of one color, which no two steps share.
    """

    num_envs, blind = 2, None
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space = spaces.Box(0, 255, (97, 96, 4), np.uint8)
    single_action_space = spaces.Box(0, 1, (2,))

    def __init__(self, *_, **settings):
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, 2)
        self.actions, self.total = [], 0

    def set_attr(self, name, value):
        assert name == "blind"
        self.blind = value

    def observe(self):
        self.total += 1
        obs = np.zeros((2, 97, 96, 4), np.uint8)
        obs[:] = np.array([2 * self.total, 2 * self.total + 1]).reshape(2, 1, 1, 1)
        return obs

    def reset(self, *, seed):
        self.steps = np.zeros(2, int)
        return self.observe(), {}

    def step(self, actions):
        self.actions.append(actions.copy())
        actions[:] = 7  # an environment may, and what is stored must not change
        self.steps += 1
        rewards, ended = self.steps.astype(float), self.steps == (3, 5)
        terminated, truncated = ended & (False, True), ended & (True, False)
        infos = {"final_obs": self.observe(), "_final_obs": ended}
        self.steps[ended] = 0
        obs = np.where(ended.reshape(2, 1, 1, 1), self.observe(), infos["final_obs"])
        return obs, rewards, terminated, truncated, infos

    def close(self):
        pass


def test_rollout_holds_what_was_seen_and_reached():
    """And next values are of the observation reached: the final one where it was truncated."""
    agent, envs = make_agent(), Scripted()
    rollout, _ = script.collect_rollout(agent, envs, envs.reset(seed=[1, 2])[0], TINY, CPU)
    again = Scripted()
    obs, _ = again.reset(seed=[1, 2])
    for t in range(8):
        assert np.array_equal(rollout.obs[t].numpy(), obs)
        assert np.array_equal(rollout.actions[t].numpy(), envs.actions[t])
        obs, rewards, terminated, truncated, infos = again.step(envs.actions[t])
        assert rollout.rewards[t].tolist() == rewards.tolist()
        assert rollout.terminations[t].tolist() == terminated.tolist()
        assert rollout.truncations[t].tolist() == truncated.tolist()
        reached = np.where(truncated.reshape(2, 1, 1, 1), infos["final_obs"], obs)
        with torch.no_grad():
            _, logprobs, _, values = agent.get_action_and_value(rollout.obs[t], rollout.actions[t])
            next_values = agent.get_value(torch.from_numpy(reached))
        torch.testing.assert_close(rollout.logprobs[t], logprobs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.values[t], values, rtol=1e-4, atol=1e-5)
        used = ~rollout.terminations[t]
        torch.testing.assert_close(
            rollout.next_values[t][used], next_values[used], rtol=1e-4, atol=1e-5
        )
    assert rollout.truncations.sum() == 2 and rollout.terminations.sum() == 1


@pytest.mark.parametrize("plays", ["agent", "nobody"])
def test_evaluation_counts_each_episode_once(monkeypatch, plays):
    """Not what follows in the environment that ended first; nobody looks at no pictures."""
    made = []
    monkeypatch.setattr(
        script, "make_vector_env", lambda *_, **__: made.append(Scripted()) or made[0]
    )
    agent = make_agent() if plays == "agent" else None
    assert script.evaluate(agent, TINY, 2, 1, CPU).tolist() == [1 + 2 + 3, 1 + 2 + 3 + 4 + 5]
    (envs,) = made
    assert envs.blind is (agent is None)
    if agent is not None:
        seen = Scripted()
        obs, _ = seen.reset(seed=[1, 2])
        for actions in envs.actions:
            with torch.no_grad():
                expected = agent.get_deterministic_action(torch.from_numpy(obs)).numpy()
            np.testing.assert_allclose(actions, expected, atol=1e-5)
            obs = seen.step(actions)[0]


def random_rollout(agent):
    """A rollout of 3 x 4 transitions, with the agent's own probabilities and values."""
    obs = torch.randint(0, 256, (3, 4, 97, 96, 4), dtype=torch.uint8)
    with torch.no_grad():
        actions, logprobs, _, values = agent.get_action_and_value(obs.flatten(0, 1))
    rest = torch.zeros(3, 4), torch.zeros(3, 4), *torch.zeros(2, 3, 4, dtype=torch.bool)
    tensors = (tensor.unflatten(0, (3, 4)) for tensor in (actions, logprobs, values))
    return script.Rollout(obs, *tensors, *rest)


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_grad_norm=1e9),
        dict(max_grad_norm=0.1),
        dict(norm_adv=False, max_grad_norm=1e9),
        dict(clip_vloss=True, max_grad_norm=1e9, clip_coef=0.02),
    ],
)
def test_update_equals_the_one_written_out(changes):
    args = dataclasses.replace(TINY, **SETTINGS | changes)
    agent = make_agent()
    expected, rollout = copy.deepcopy(agent), random_rollout(agent)
    advantages, returns = torch.randn(2, 3, 4) + 1
    lr = 0.01 / min(args.max_grad_norm, 1)
    optimizers = [torch.optim.SGD(a.parameters(), lr) for a in (agent, expected)]
    written_out(expected, optimizers[1], rollout, advantages, returns, args, 1.0)
    means = script.update(agent, optimizers[0], rollout, advantages, returns, args)
    moved = False
    start = make_agent().parameters()
    for ours, theirs, before in zip(agent.parameters(), expected.parameters(), start, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        moved |= (ours - before).abs().max().item() > 2e-4
    assert moved
    explained = 1 - ((returns - rollout.values).var() / returns.var()).item()
    assert means["explained_variance"] == pytest.approx(explained, rel=1e-4, abs=1e-4)


def test_target_kl_stops_before_the_step():
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.parameters(), 0.01)
    args = dataclasses.replace(TINY, target_kl=1e-4, num_minibatches=1, update_epochs=5)
    advantages, returns = torch.randn(2, 3, 4)
    script.update(agent, optimizer, random_rollout(agent), advantages, returns, args)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """`train` and `main` on the scripted environments; the list of what `update` was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_vector_env", Scripted)
    calls, update = [], script.update

    def spy(agent, optimizer, rollout, advantages, returns, args):
        weights = copy.deepcopy(agent.state_dict())
        calls.append((weights, optimizer.param_groups[0]["lr"], rollout, args))
        return update(agent, optimizer, rollout, advantages, returns, args)

    monkeypatch.setattr(script, "update", spy)
    return calls


def test_same_seed_same_weights(scripted):
    weights = [
        script.load_agent(f"{script.train(args)['run_dir']}/agent.pt", CPU)[0].actor[-1].weight
        for args in (TINY, TINY, dataclasses.replace(TINY, seed=2))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    rates = [rate for _, rate, *_ in scripted]
    assert rates[:3] == pytest.approx([TINY.learning_rate * left / 3 for left in (3, 2, 1)])
    script.train(dataclasses.replace(TINY, anneal_lr=False))
    assert {rate for _, rate, *_ in scripted[-3:]} == {TINY.learning_rate}


def test_weights_that_are_no_numbers_are_not_saved(scripted, monkeypatch):
    update = script.update

    def spoil(agent, *inputs):
        means = update(agent, *inputs)
        if len(scripted) == 2:
            agent.critic[-1].weight.data.fill_(torch.nan)
        return means

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(FloatingPointError, match="critic"):
        script.train(TINY)
    (path,) = Path().glob("runs/*/agent.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["progress"]["iteration"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["agent"].values())


def test_resume_goes_on_with_the_settings_of_the_checkpoint(scripted, monkeypatch, capsys):
    args = dataclasses.replace(TINY, learning_rate=0.003, anneal_lr=False, seed=7)
    path = f"{script.train(args)['run_dir']}/agent.pt"
    saved = torch.load(path, weights_only=True)
    scripted.clear()

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo_carracing_cnn", *map(str, flags)])
        script.main()

    command("--resume", path, "--total-timesteps", 80)
    assert len(scripted) == 2
    weights, rate, _, resumed = scripted[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved["agent"].items())
    assert rate == 0.003 and resumed.seed == 7 and resumed.num_steps == 8
    for flags in (("--action-repeat", 5), ("--frame-stack", 3), ("--env-kwargs", "verbose=True")):
        with pytest.raises(SystemExit) as stop:
            command("--resume", path, *flags)
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err
    played = []
    monkeypatch.setattr(
        script, "evaluate", lambda agent, args, n, seed, _: played.append((n, seed)) or np.ones(n)
    )
    command("--evaluate", path)
    command("--evaluate", path, "--eval-episodes", 3)
    assert played == [(100, 7), (3, 7)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_not_ignored(scripted):
    with pytest.raises((AssertionError, AttributeError, RuntimeError), match=r"cuda|CUDA|NVIDIA"):
        script.train(dataclasses.replace(TINY, cuda=True))


def test_flags_reach_the_environment():
    env = script.make_env(dataclasses.replace(TINY, domain_randomize=True))
    assert env.unwrapped.domain_randomize and not script.make_env(TINY).unwrapped.domain_randomize
    assert env.max_steps_without_progress == 5
    assert script.make_env(TINY, training=False).max_steps_without_progress == np.inf


def test_run_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    """Trains, evaluates, films; scaled rewards are learned from, raw ones are logged."""
    monkeypatch.chdir(tmp_path)
    updates, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *inputs: updates.append(inputs) or update(*inputs))
    kwargs = ("max_episode_steps=40",)
    args = dataclasses.replace(TINY, eval_episodes=3, env_kwargs=kwargs)
    result = script.train(args)
    assert result["global_step"] == 48 and len(result["eval_returns"]) == 3
    folder = Path(result["run_dir"])
    assert {"agent.pt", "agent.gif", "result.json", "training.png"} <= set(os.listdir(folder))
    assert json.loads((folder / "result.json").read_text())["eval_mean"] == result["eval_mean"]
    _, optimizer, rollout, advantages, returns, _ = updates[0]
    expected, _ = script.compute_gae(
        args.reward_scale * rollout.rewards, rollout.values, rollout.next_values,
        rollout.terminations, rollout.truncations, args.gamma, args.gae_lambda,
    )  # fmt: skip
    torch.testing.assert_close(advantages, expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(args.learning_rate / 3)
    episodes = torch.load(folder / "agent.pt", weights_only=True)["progress"]["episodes"]
    assert episodes and {length for _, _, length in episodes} <= {5, 6, 7, 8, 9, 10}
    agent, loaded = script.load_agent(folder / "agent.pt", CPU)
    returns = script.evaluate(agent, loaded, 3, args.seed, CPU)
    assert returns == pytest.approx(np.array(result["eval_returns"]), abs=1e-3)


def test_evaluation_is_whole_episodes_of_gymnasiums():
    """No truncation of training's; two at a time, in processes, as they are played here alone."""
    args = dataclasses.replace(TINY, env_kwargs=("max_episode_steps=150",))
    totals = script.evaluate(None, args, 2, 5, CPU)
    rng = np.random.default_rng(5)
    seeds = rng.integers(2**31, 2**32, 2).tolist()
    actions = gym.vector.utils.batch_space(spaces.Box(0.0, 1.0, (2,), np.float32), 2)
    actions.seed(int(rng.integers(2**31)))
    controls = [2 * actions.sample().astype(np.float64) - 1 for _ in range(38)]
    for i, seed in enumerate(seeds):
        env = gym.make("CarRacing-v3", max_episode_steps=150)
        env.reset(seed=seed)
        expected, frames = 0.0, 0
        for control in controls:
            steering, pedal = control[i]
            for _ in range(4):
                *_, reward, terminated, truncated, _ = env.step(
                    np.array([steering, max(pedal, 0), max(-pedal, 0)])
                )
                expected, frames = expected + reward, frames + 1
                if terminated or truncated:
                    break
            if terminated or truncated:
                break
        assert frames == 150 and totals[i] == pytest.approx(expected, abs=1e-9)


def children_of(pid):
    output = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(line) for line in output.stdout.split()]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path, start_script):
    """Starts a run without an end, and waits for its first checkpoint."""

    def start(*flags):
        run = (
            "--num-envs", "2", "--num-steps", "8", "--total-timesteps", "1000000",
            "--num-minibatches", "2", "--update-epochs", "1", "--checkpoint-interval", "1",
        )  # fmt: skip
        process = start_script(ROOT / "ppo_carracing_cnn.py", *run, *flags)
        wait_until(lambda: list(tmp_path.glob("runs/*/agent.pt")) or process.poll(), 60)
        assert process.poll() is None, process.read("stderr")
        return process, children_of(process.pid)

    return start


@pytest.mark.parametrize("fate", ["killed", "hanging", "orphaned"])
def test_a_process_that_fails_ends_the_run(start, tmp_path, fate):
    process, workers = start("--step-timeout", "1")
    assert len(workers) == 2
    if fate == "orphaned":
        process.kill()
    else:
        os.kill(workers[0], signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    code, _, errors = process.communicate()
    if fate != "orphaned":
        problem = "died" if fate == "killed" else "gave no answer in 1 s"
        assert code == 1 and "Traceback" not in errors
        assert f"error: the process of an environment {problem}" in errors.splitlines()[-1]
        (saved,) = tmp_path.glob("runs/*/agent.pt")
        script.load_agent(saved, CPU)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 15)


def test_a_process_that_raises_is_told(monkeypatch):
    envs = script.make_vector_env(dataclasses.replace(TINY, num_envs=1))
    envs.reset(seed=[1])
    with pytest.raises(ChildProcessError, match="process of an environment raised"):
        envs.step(np.array([["no", "number"]]))
    assert not any(worker.is_alive() for worker in envs.processes)


def test_environments_of_which_one_died_can_be_closed():
    with contextlib.closing(script.make_vector_env(dataclasses.replace(TINY, num_envs=2))) as envs:
        envs.processes[0].kill()
        envs.processes[0].join()
    assert not any(worker.is_alive() for worker in envs.processes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_run_after_the_iteration(start, tmp_path, number, code):
    """They may reach every process of the group (Ctrl-C does): the environments must not mind."""
    process, workers = start()
    os.killpg(process.pid, number)
    ended, output, errors = process.communicate()
    assert ended == code, errors
    assert "Traceback" not in errors and "--resume" in output
    (saved,) = tmp_path.glob("runs/*/agent.pt")
    script.load_agent(saved, CPU)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_training_goes_on_off_the_main_thread(tmp_path, monkeypatch):
    import threading

    monkeypatch.chdir(tmp_path)
    results = []
    thread = threading.Thread(target=lambda: results.append(script.train(TINY)))
    thread.start()
    thread.join()
    assert results[0]["global_step"] == 48
