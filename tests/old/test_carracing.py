"""CarRacing: the same pixels as Gymnasium's, what the agent sees of them, and the Beta policy."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.box2d.car_racing import CarRacing

import ppo_carracing_cnn as script_module
from old.conftest import SCRIPTS

CPU = torch.device("cpu")
ONLY_CARRACING = pytest.mark.parametrize("script", ["ppo_carracing_cnn"], indirect=True)
assert "ppo_carracing_cnn" in SCRIPTS


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
    envs = [
        cls(domain_randomize=domain_randomize) for cls in (CarRacing, script_module.LazyCarRacing)
    ]
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


def make_views(args, **kwargs):
    stock = gym.make("CarRacing-v3")
    lazy = gym.wrappers.TimeLimit(script_module.LazyCarRacing(), 1000)
    return [script_module.AgentView(env, args, **kwargs) for env in (stock, lazy)]


def test_view_is_the_same_on_both_renderers():
    """Every fourth frame, stacked, and the last one of an episode that ends within a repeat."""
    stock, lazy = make_views(script_module.Args())
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

    @property
    def tile_visited_count(self):
        return self.count

    track = range(20)

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
    args = script_module.Args()
    view = script_module.AgentView(Counting(ends_at=10), args)
    obs, _ = view.reset()
    assert obs.shape == (97, 96, 4) and obs.dtype == np.uint8 and not obs.any()
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
    assert (last[96] == 255 * 10 // 20).all() and (second[96] == 255 * 8 // 20).all()
    assert first[0, 0].tolist() == [0, 0, 0, 4], "what was returned stays as it was"
    obs, _ = view.reset()
    assert not obs.any(), "no frame of the last episode is left"


def test_lost_car_is_truncated_not_terminated():
    view = script_module.make_training_env(script_module.Args(lost_after=10))
    view.reset(seed=1)
    view.step(np.array([0.5, 0.5]))
    flags = [view.step(np.array([0.5, 0.5]))[2:4] for _ in range(30)]  # standing still
    first = [truncated for _, truncated in flags].index(True)
    assert first < 12 and not any(terminated for terminated, _ in flags)


def make_agent():
    torch.manual_seed(0)
    return script_module.Agent(spaces.Box(0, 255, (97, 96, 4), np.uint8), spaces.Box(0, 1, (2,)))


def random_obs(batch):
    return torch.randint(0, 256, (batch, 97, 96, 4), dtype=torch.uint8)


def test_policy_is_blind_to_the_row_of_the_critic():
    agent, obs = make_agent(), random_obs(8)
    agent.actor[-1].weight.data.mul_(100)
    changed = obs.clone()
    changed[:, 96] = 255 - changed[:, 96]
    assert torch.equal(agent.get_features(obs), agent.get_features(changed))
    assert torch.equal(*map(agent.get_deterministic_action, (obs, changed)))
    assert not torch.isclose(agent.get_value(obs), agent.get_value(changed)).any()
    for index in (np.s_[:, 0], np.s_[:, 95], np.s_[:, :96, 0], np.s_[:, :96, 95]):
        changed = obs.clone()
        changed[index] = 255 - changed[index]
        assert not torch.equal(agent.get_features(obs), agent.get_features(changed)), "seen whole"


def test_pixels_are_divided_by_255():
    agent, obs = make_agent(), random_obs(8)
    pixels = obs[:, :96].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(
        agent.get_features(obs), agent.body(agent.first(pixels)), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(agent.get_features(obs), agent.get_features(obs.float()))


def test_beta_equals_its_closed_form():
    torch.manual_seed(0)
    agent = make_agent()
    agent.actor[-1].weight.data.mul_(100)
    obs = random_obs(64)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    policy = agent.get_policy(agent.get_features(obs))
    a, b = policy.concentration1.double(), policy.concentration0.double()
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
    mean = agent.get_deterministic_action(obs).double()
    torch.testing.assert_close(mean, a / (a + b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(agent.get_value(obs), value)


@ONLY_CARRACING
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "CartPole-v1"), ("--env-id", "CarRacing-v3", "CartPole-v1")),
        (("--env-kwargs", "continuous=False"), ("--env-kwargs", "continuous")),
        (("--env-kwargs", "no_such_argument=1"), ("no_such_argument",)),
        (("--env-kwargs", "max_episode_steps=-1"), ("--env-id", "max_episode_steps")),
        (("--action-repeat", "0"), ("--action-repeat", "at least 1")),
        (("--reward-scale", "nan"), ("--reward-scale", "at least 0")),
        (("--num-minibatches", "2049"), ("--num-minibatches", "from 1 to 2048")),
        (("--resume", "nowhere.pt"), ("nowhere.pt",)),
    ],
)
def test_settings_that_cannot_work(script, main, in_tmp, flags, words):
    code, output, errors = main(*flags)
    assert code == 2 and output == "" and errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert list(in_tmp.iterdir()) == []


@pytest.fixture
def tiny(in_tmp):
    """Args of a run of 6 iterations of 2 x 8 actions."""
    return script_module.Args(
        num_envs=2, num_steps=8, total_timesteps=96, num_minibatches=2, update_epochs=2,
        checkpoint_interval=2, eval_episodes=1, lost_after=5,
    )  # fmt: skip


def test_renderers_train_alike(tiny):
    rollouts = []
    for stock_renderer in (False, True):
        args = dataclasses.replace(tiny, stock_renderer=stock_renderer, num_steps=24, lost_after=3)
        envs = script_module.make_vector_env(args)
        torch.manual_seed(0)
        agent = script_module.Agent(envs.single_observation_space, envs.single_action_space)
        next_obs = script_module.start_episodes(envs, args, 0)
        rollout, _ = script_module.collect_rollout(agent, envs, next_obs, args, CPU)
        rollouts.append(rollout)
        envs.close(terminate=True)
    for first, second in zip(*rollouts, strict=True):
        assert torch.equal(first, second)
    assert rollouts[0].truncations.any() and rollouts[0].obs.float().std() > 10


def train_without_report(args, monkeypatch):
    """The finished run's checkpoint."""
    monkeypatch.setattr(script_module, "report", lambda args, agent, log, device: log.run_dir)
    run_dir = script_module.train(args)
    return torch.load(run_dir / "agent.pt", weights_only=True)


def test_resumed_run_equals_straight_run(tiny, monkeypatch):
    straight = train_without_report(tiny, monkeypatch)
    save_checkpoint, saves = script_module.save_checkpoint, []

    def save_then_die(*inputs):
        save_checkpoint(*inputs)
        saves.append(inputs[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(script_module, "save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        script_module.train(dataclasses.replace(tiny, exp_name="killed"))
    monkeypatch.setattr(script_module, "save_checkpoint", save_checkpoint)
    _, saved = script_module.read_checkpoint(saves[0])
    resumed = train_without_report(dataclasses.replace(saved, resume=saves[0]), monkeypatch)
    assert straight["progress"]["iteration"] == resumed["progress"]["iteration"] == 6
    for name, tensor in straight["agent"].items():
        assert torch.equal(tensor, resumed["agent"][name]), name
    assert straight["progress"]["episodes"] == resumed["progress"]["episodes"]


def test_evaluation_is_whole_stock_episodes(tiny):
    """Played in processes of their own, episodes are what they are here, frame by frame."""
    tiny.env_kwargs = ("max_episode_steps=150",)
    (total,) = script_module.evaluate(None, tiny, 1, 5, CPU)
    seeds = np.random.default_rng(5).integers(2**31, 2**32, (1, 2)).tolist()[0]
    actions = spaces.Box(0.0, 1.0, (2,), np.float32)
    actions.seed(seeds[1])
    env = gym.make("CarRacing-v3", max_episode_steps=150)
    env.reset(seed=seeds[0])
    expected, ended = 0.0, False
    while not ended:
        steering, pedal = 2 * actions.sample().astype(np.float64) - 1
        for _ in range(4):
            controls = np.array([steering, max(pedal, 0), max(-pedal, 0)])
            _, reward, terminated, truncated, _ = env.step(controls)
            expected += reward
            if ended := terminated or truncated:
                break
    assert total == pytest.approx(expected, abs=1e-9)


def children_of(pid):
    output = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(line) for line in output.stdout.split()]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


RUN = (
    "--num-envs",
    "2",
    "--num-steps",
    "8",
    "--total-timesteps",
    "1000000",
    "--num-minibatches",
    "2",
    "--num-workers",
    "2",
)


@ONLY_CARRACING
@pytest.mark.parametrize("victim", ["worker", "main"])
def test_death_leaves_no_orphans(script, in_tmp, start, victim):
    process = start(*RUN)
    wait_until(lambda: list(in_tmp.glob("runs/*/events*")), 60)
    time.sleep(1)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    if victim == "worker":
        last = errors.strip().splitlines()[-1]
        assert process.returncode == 1 and last == "error: the process of an environment died"
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 10)


@ONLY_CARRACING
def test_interrupt_from_the_keyboard_saves(script, in_tmp):
    """Ctrl-C reaches every process of the terminal's group: the environments must not mind."""
    path = os.path.abspath(script.__file__)
    process = subprocess.Popen(
        [sys.executable, path, *RUN], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: list(in_tmp.glob("runs/*/events*")), 60)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (saved,) = in_tmp.glob("runs/*/agent.pt")
    script.load_agent(saved, CPU)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
def test_update_is_the_same_on_every_device(tiny, device):
    """From one state, over whole batches (minibatches are drawn in another order on a GPU)."""
    args = dataclasses.replace(tiny, num_minibatches=1, update_epochs=3, num_workers=0)
    envs = script_module.make_vector_env(args)
    next_obs = script_module.start_episodes(envs, args, 0)
    rollout, _ = script_module.collect_rollout(make_agent(), envs, next_obs, args, CPU)
    advantages, returns = torch.randn(2, args.num_steps, args.num_envs)
    results = []
    for place in ("cpu", device):
        agent = make_agent().to(place)
        weights = script_module.flatten_parameters(agent)
        optimizer = torch.optim.Adam([weights], args.learning_rate, eps=1e-5, fused=True)
        moved = script_module.Rollout(*(tensor.to(place) for tensor in rollout))
        metrics = script_module.update(
            agent, weights, optimizer, moved, advantages.to(place), returns.to(place), args
        )
        results.append((weights.detach().cpu(), metrics))
    (first, metrics), (second, same_metrics) = results
    assert not torch.equal(first, torch.nn.utils.parameters_to_vector(make_agent().parameters()))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-4)  # Adam's step is 4e-4
    assert metrics == pytest.approx(same_metrics, rel=1e-2, abs=1e-4)


@ONLY_CARRACING
def test_death_of_an_episodes_process_is_told(script, in_tmp, start):
    args = script.Args()
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.parameters())
    script.save_checkpoint(in_tmp / "agent.pt", args, agent, optimizer, script.Progress())
    process = start("--evaluate", "agent.pt", "--eval-episodes", "100")
    wait_until(lambda: len(children_of(process.pid)) >= 2, 60)
    time.sleep(3)
    players = [
        pid for pid in children_of(process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(players[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == "error: the process of an episode died"
