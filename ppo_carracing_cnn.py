# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "gymnasium[box2d]>=1.1",
#     "matplotlib",
#     "numpy",
#     "tensorboard",
#     "torch>=2.6",
#     "tqdm",
#     "tyro",
# ]
# ///
"""Proximal Policy Optimization from pixels: PPO-Clip learns to drive, whole in this file.

One convolutional body with two heads, the policy (Beta distributions over steering and pedal) and
the value, learns Gymnasium's CarRacing-v3 from four gray frames. Physics, rewards and pixels are
Gymnasium's, but a frame is drawn only if the agent sees it, and of it only what is in sight.

    python ppo_carracing_cnn.py                                          # on the CPU
    python ppo_carracing_cnn.py --cuda                                   # on a GPU
    python ppo_carracing_cnn.py --evaluate runs/<run>/agent.pt --render  # watch a trained agent

The comments cite
    PPO          Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    GAE          Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized
                 Advantage Estimation, arXiv:1506.02438
    time limits  Pardo et al. 2018, Time Limits in Reinforcement Learning, arXiv:1712.00378
    Beta         Chou et al. 2017, Improving Stochastic Policy Gradients in Continuous Control with
                 Deep Reinforcement Learning using the Beta Distribution, ICML
    asymmetric   Pinto et al. 2018, Asymmetric Actor Critic for Image-Based Robot Learning, RSS
    detail 1-13  Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization,
                 ICLR blog track: the thirteen that concern every PPO
    Atari 1-9    there, the nine for learning from pixels
"""

import ast
import atexit
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pygame
import pygame.gfxdraw
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from gymnasium.envs.box2d import car_racing
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributions import Beta
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train PPO to drive CarRacing-v3 from pixels."""

    exp_name: str = "ppo_carracing_cnn"
    """name of the experiment, a part of the run folder's name"""
    seed: int = 1
    """all randomness of the run follows from it"""
    cuda: bool = False
    """compute on the GPU"""

    env_id: str = "CarRacing-v3"
    """the environment; this script is for CarRacing-v3 alone"""
    env_kwargs: tuple[str, ...] = ()
    """arguments of the environment, such as `--env-kwargs max_episode_steps=500`"""
    domain_randomize: bool = False
    """other colours of road, grass and background in every episode"""
    stock_renderer: bool = False
    """train on Gymnasium's own drawing, several times slower: the same pixels"""
    action_repeat: int = 4
    """frames for which an action is held; steps are counted in actions"""
    frame_stack: int = 4
    """frames that the agent sees, one after each of its last actions"""
    lost_after: int = 75
    """in training, an episode is truncated after this many actions without a new tile"""
    reward_scale: float = 0.025
    """rewards are multiplied by this in training"""
    total_timesteps: int = 2_000_000
    """actions to train for, all environments together, rounded up to whole iterations"""
    num_envs: int = 8
    """environments that run side by side (the paper's N)"""
    num_steps: int = 512
    """actions in each environment per iteration (the paper's T)"""
    num_workers: int | None = None
    """processes that step the environments, 0 for none but this (None: one a core)"""
    worker_timeout: float = 300.0
    """seconds after which a step of the environments that does not end ends the run"""

    learning_rate: float = 4e-4
    """step size of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall to 0, linearly"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation: 0 is one-step TD, 1 is Monte Carlo"""
    num_minibatches: int = 16
    """minibatches an epoch; num_envs * num_steps / num_minibatches is the paper's M"""
    update_epochs: int = 6
    """epochs an iteration (the paper's K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """how far from 1 the ratio of new to old probability pays (the paper's epsilon)"""
    clip_vloss: bool = False
    """clip the value loss too (Engstrom et al. 2020 and Andrychowicz et al. 2021 found no gain)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (the paper's c_2)"""
    vf_coef: float = 0.5
    """weight of the value loss (the paper's c_1)"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm if it is larger"""
    target_kl: float | None = None
    """the iteration's updates end when the KL passes 1.5 times this (None: never)"""

    checkpoint_interval: int = 20
    """iterations between checkpoints, at which all environments start new episodes"""
    eval_episodes: int = 100
    """episodes of the evaluation"""
    evaluate: Path | None = None
    """checkpoint (agent.pt) to evaluate instead of training"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""
    resume: Path | None = None
    """checkpoint (agent.pt) to go on from; flags given beside it override the saved ones"""


def check_args(args: Args) -> None:
    """Raise ValueError, one sentence that names the flag, if the run cannot work with `args`."""
    if args.num_envs == args.num_steps == 1:
        raise ValueError("--num-envs times --num-steps must be at least 2, not 1")
    least = {"seed": 0, "num_workers": 0}
    most = {
        "seed": 2**63 - 1,
        "gamma": 1,
        "gae_lambda": 1,
        "num_minibatches": args.num_envs * args.num_steps // 2,
        "worker_timeout": 1e6,
    }
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = least.get(name, 1 if isinstance(value, int) else 0)
        high = most.get(name, math.inf)
        if not (low <= value <= high and value < math.inf):
            allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, not {value}")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that PyTorch can use, and finds none; give --no-cuda")
    if args.render and not args.evaluate:
        raise ValueError("--render needs --evaluate PATH")
    if args.env_id != "CarRacing-v3":
        raise ValueError(f"--env-id must be CarRacing-v3, not {args.env_id}")
    if args.evaluate and args.resume:
        raise ValueError("--evaluate and --resume exclude each other")
    parse_env_kwargs(args)
    try:
        make_training_env(args).close()
        env = make_env(args, "human" if args.render else None)
        env.reset()
    except Exception as error:  # whatever --env-kwargs make CarRacing raise
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"--env-id {args.env_id} does not start: {reason}") from error
    env.close()
    if not env.unwrapped.continuous:
        raise ValueError("--env-kwargs continuous=False: this script takes continuous actions")


class LazyCarRacing(car_racing.CarRacing):
    """CarRacing that draws observations on demand, several times faster, to the same pixels.

    Gymnasium draws at every step. Here `step` returns None for the observation while `lazy` is set,
    and `observe` draws the one that it would have returned.
    """

    lazy = False

    def reset(self, **kwargs):
        self.polygons = None
        return super().reset(**kwargs)

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        self.shown_score = self.reward  # `step` charges for the frame after it has drawn it
        return None if self.lazy else self.observe()

    def observe(self) -> np.ndarray:
        """The frame (96, 96, 3), uint8: what CarRacing._render draws, in its order.

        It turns the finished scene upside down, hides an eighth of it behind the indicators, and
        scales it, first in x, then in y. Here the hidden part is not drawn, and the scene is turned
        between the two, when it is a tenth of the size.
        """
        width, height, small = car_racing.WINDOW_W, car_racing.WINDOW_H, car_racing.STATE_W
        scene, indicators = make_canvases()
        angle, (x, y) = -self.car.hull.angle, self.car.hull.position
        zoom = 0.1 * car_racing.SCALE * max(1 - self.t, 0)
        zoom += car_racing.ZOOM * car_racing.SCALE * min(self.t, 1)
        scroll = pygame.math.Vector2((-x * zoom, -y * zoom)).rotate_rad(angle)
        translation = (width / 2 + scroll[0], height / 4 + scroll[1])
        self.surf = scene
        self._render_road(zoom, translation, angle)
        self.car.draw(scene, zoom, translation, angle, False)
        self.surf = indicators
        self._render_indicators(width, height)
        score = draw_score(f"{self.shown_score:04.0f}")
        indicators.blit(score, score.get_rect(center=(60, height - height * 2.5 / 40.0)))

        split = height - height // 8
        frame = pygame.Surface((small, height))
        part = scene.subsurface((0, height - split, width, split))
        part = pygame.transform.smoothscale(part, (small, split))
        frame.blit(pygame.transform.flip(part, False, True), (0, 0))
        part = indicators.subsurface((0, split, width, height - split))
        frame.blit(pygame.transform.smoothscale(part, (small, height - split)), (0, split))
        return self._create_image_array(frame, (small, car_racing.STATE_H))

    def _render_road(self, zoom, translation, angle):
        """Draw grass and road as CarRacing does, without the polygons that are out of sight."""
        if self.polygons is None:
            grass = [(corners, self.grass_color) for corners in grass_squares()]
            self.polygons = grass + self.road_poly
            self.corners = np.array([corners for corners, _ in self.polygons]).transpose(2, 0, 1)
            self.centers = self.corners.mean(2)
            self.radii = np.hypot(*(self.corners - self.centers[..., None])).max(1)
        width, height = car_racing.WINDOW_W, car_racing.WINDOW_H
        hidden = height // 8
        cos, sin = math.cos(angle), math.sin(angle)

        def to_pixels(x, y):
            x, y = x * cos - y * sin, x * sin + y * cos
            return x * zoom + translation[0], y * zoom + translation[1]

        edge = car_racing.PLAYFIELD
        field = [(edge, edge), (edge, -edge), (-edge, -edge), (-edge, edge)]
        # The car is at (1/2, 1/4) of the window: nothing farther than this from the origin shows.
        far = max(map(abs, self.car.hull.position)) + math.hypot(width / 2, height * 3 / 4) / zoom
        color = [int(c) for c in self.bg_color] if far < edge else (0, 0, 0)
        # Surface.fill would write past the cache, and all that follows wait for the memory.
        pygame.surfarray.pixels2d(self.surf)[:, hidden:] = self.surf.map_rgb(color)
        if far >= edge:  # the edge may be in sight
            self._draw_colored_polygon(
                self.surf, field, self.bg_color, zoom, translation, angle, clip=False
            )
        x, y = to_pixels(*self.centers)
        reach = self.radii * zoom + 2  # in pixels; 2 allow for rounding
        x, y = np.abs(x - width / 2) - reach, np.abs(y - (hidden + height) / 2) - reach
        in_sight = np.flatnonzero((x < width / 2) & (y < (height - hidden) / 2))
        corners = np.stack(to_pixels(*self.corners[:, in_sight]), -1).tolist()
        for i, points in zip(in_sight, corners, strict=True):
            color = [int(c) for c in self.polygons[i][1]]  # a tile's changes when it is visited
            pygame.gfxdraw.aapolygon(self.surf, points, color)
            pygame.gfxdraw.filled_polygon(self.surf, points, color)


@functools.cache
def make_canvases() -> tuple[pygame.Surface, pygame.Surface]:
    """Two surfaces to draw on, the same for all environments: more would outgrow the cache."""
    size = (car_racing.WINDOW_W, car_racing.WINDOW_H)
    return pygame.Surface(size), pygame.Surface(size)


@functools.cache
def grass_squares() -> list:
    """The corners of the light squares in the grass, in CarRacing's order."""
    size = car_racing.GRASS_DIM
    squares = [(size * x, size * y) for x in range(-20, 20, 2) for y in range(-20, 20, 2)]
    return [[(x + size, y), (x, y), (x, y + size), (x + size, y + size)] for x, y in squares]


@functools.cache
def draw_score(text: str) -> pygame.Surface:
    """The score as CarRacing writes it."""
    pygame.font.init()
    font = pygame.font.Font(pygame.font.get_default_font(), 42)
    return font.render(text, True, (255, 255, 255), (0, 0, 0))


class AgentView(gym.Wrapper):
    """What the agent sees and does (Atari 2, 5, 7).

    Observations are uint8, (97, 96, frame_stack): the last gray frames, and below them a row that
    says how much of the lap is done, from 0 to 255, for the critic alone (asymmetric). Actions are
    (steering, pedal) in [0, 1]: left to right, and full brake to full gas, so that the two are not
    pressed at once. An action is held for `action_repeat` frames, and its reward is their sum.
    """

    def __init__(self, env: gym.Env, args: Args, lost_after: float = math.inf):
        super().__init__(env)
        self.action_repeat, self.lost_after = args.action_repeat, lost_after
        self.obs = np.zeros((97, 96, args.frame_stack), np.uint8)
        self.frames, self.lap = self.obs[:96], self.obs[96]
        self.observation_space = spaces.Box(0, 255, self.obs.shape, np.uint8)
        self.action_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.metadata = env.metadata | {
            "render_fps": env.metadata["render_fps"] / self.action_repeat
        }

    def reset(self, **kwargs):
        self.env.unwrapped.lazy = False
        frame, info = self.env.reset(**kwargs)
        self.frames[:] = gray(frame)[..., np.newaxis]
        self.lap[:] = 0
        self.steps_without_tile = 0
        return self.obs.copy(), info

    def step(self, action):
        steering, pedal = 2 * np.asarray(action, np.float64) - 1
        controls = np.array([steering, max(pedal, 0.0), max(-pedal, 0.0)])
        total = 0.0
        for i in range(self.action_repeat):
            self.env.unwrapped.lazy = i < self.action_repeat - 1
            frame, reward, terminated, truncated, info = self.env.step(controls)
            total += reward
            if terminated or truncated:
                break
        if frame is None:  # the episode ended on a frame that was not to be drawn
            frame = self.env.unwrapped.observe()
        self.frames[..., :-1] = self.frames[..., 1:]
        self.frames[..., -1] = gray(frame)
        env = self.env.unwrapped
        self.lap[:] = 255 * env.tile_visited_count // len(env.track)
        self.steps_without_tile = 0 if total > 0 else self.steps_without_tile + 1
        truncated = truncated or self.steps_without_tile >= self.lost_after
        return self.obs.copy(), total, terminated, truncated, info


def gray(frame: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of a frame (96, 96, 3), uint8: (96, 96)."""
    return (frame @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)


def parse_env_kwargs(args: Args) -> dict:
    """The environment's arguments by name, from NAME=VALUE each."""
    try:
        kwargs = dict(item.split("=", 1) for item in args.env_kwargs)
        return {name: ast.literal_eval(value) for name, value in kwargs.items()}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            "--env-kwargs takes NAME=VALUE, each value a Python literal, not "
            + " ".join(args.env_kwargs)
        ) from error


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment as Gymnasium makes it, seen and driven as by the agent."""
    kwargs = {"domain_randomize": args.domain_randomize} | parse_env_kwargs(args)
    if render_mode:
        kwargs["render_mode"] = render_mode
    return AgentView(gym.make(args.env_id, **kwargs), args)


def make_training_env(args: Args) -> gym.Env:
    """One environment to train in: drawn on demand, and cut when the car is lost."""
    kwargs = {"domain_randomize": args.domain_randomize} | parse_env_kwargs(args)
    if args.stock_renderer:
        env = gym.make(args.env_id, **kwargs)
    else:
        limit = kwargs.pop("max_episode_steps", gym.spec(args.env_id).max_episode_steps)
        env = gym.wrappers.TimeLimit(LazyCarRacing(**kwargs), limit)
    return AgentView(env, args, args.lost_after)


class FreshEnv(gym.Wrapper):
    """An environment that each reset with a seed makes anew, so that all follows from the seed.

    (BipedalWalker's Box2D world, for one, outlives a reset, and what was in it changes the next
    episode's digits.)
    """

    def __init__(self, env_fn):
        super().__init__(env_fn())
        self.env_fn = env_fn

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env.close()
            self.env = self.env_fn()
        return self.env.reset(seed=seed, options=options)


def make_vector_env(args: Args) -> gym.vector.VectorEnv:
    """`args.num_envs` environments that step together (detail 1), in worker processes."""
    env_fns = [functools.partial(make_training_env, args)] * args.num_envs
    num_workers = count_cores() if args.num_workers is None else args.num_workers
    if num_workers == 0:
        return make_sync_vector_env(env_fns)
    return WorkerVectorEnv(env_fns, num_workers, args.worker_timeout)


def make_sync_vector_env(env_fns: list) -> gym.vector.VectorEnv:
    """Environments that step one after the other, in this process.

    SAME_STEP: the step that ends an episode already returns the next one's first observation, with
    the final one in `infos["final_obs"]`, so every stored transition is one that happened. (In
    Gymnasium's default mode a step follows whose action is ignored.)
    """
    return gym.vector.SyncVectorEnv(
        [functools.partial(FreshEnv, env_fn) for env_fn in env_fns],
        copy=False,  # observations come in one buffer, which the next step overwrites
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # where the system can hold a process to some of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerVectorEnv(gym.vector.VectorEnv):
    """What `make_sync_vector_env` makes, shared out over processes; it steps to the same numbers.

    (But for environments that draw from np.random or random, which each process has for itself.)
    Each worker steps several environments and answers once a step; all arrays lie in shared memory.
    (Gymnasium's AsyncVectorEnv has a process for each environment. Where these outnumber the cores,
    switching between them costs more than it brings.) What is returned is overwritten by the next
    step. ChildProcessError tells that a worker died, raised, or took longer than `timeout` seconds.
    """

    def __init__(self, env_fns: list, num_workers: int, timeout: float):
        env = env_fns[0]()
        self.num_envs, self.timeout = len(env_fns), timeout
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.metadata = env.metadata | {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        env.close()
        # All that is exchanged in a step, for each environment.
        space = spaces.Dict(
            obs=env.observation_space, final_obs=env.observation_space, action=env.action_space,
            reward=spaces.Box(-np.inf, np.inf, (), np.float64),
            terminated=spaces.Discrete(2), truncated=spaces.Discrete(2),
            reset_seed=spaces.Box(0, 2**63 - 1, (), np.int64),
        )  # fmt: skip
        # An attribute, so that it lives until a worker that is spawned, not forked, opens it.
        self.memory = create_shared_memory(space, self.num_envs)
        self.arrays = read_from_shared_memory(space, self.memory, self.num_envs)
        self.workers, self.connections = [], []
        # Otherwise multiprocessing would, at exit, wait for ever for workers that ignore SIGTERM.
        atexit.register(self.close)
        for indices in np.array_split(range(self.num_envs), min(num_workers, self.num_envs)):
            part = slice(int(indices[0]), int(indices[-1]) + 1)
            connection, theirs = multiprocessing.Pipe()
            self.connections.append(connection)
            inputs = (theirs, self.connections, env_fns, space, self.memory, part)
            worker = multiprocessing.Process(target=run_worker, args=inputs, daemon=True)
            worker.start()
            theirs.close()  # so that the connection ends with the worker
            self.workers.append(worker)

    def reset(self, *, seed: list[int], options=None):
        """Start new episodes, one with each seed."""
        self.arrays["reset_seed"][:] = seed
        self.exchange(b"reset")
        return self.arrays["obs"], {}

    def step(self, actions: np.ndarray):
        self.arrays["action"][:] = actions
        self.exchange(b"step")
        terminated, truncated = (self.arrays[name] > 0 for name in ("terminated", "truncated"))
        ended = terminated | truncated
        infos = {"final_obs": self.arrays["final_obs"], "_final_obs": ended} if ended.any() else {}
        return self.arrays["obs"], self.arrays["reward"], terminated, truncated, infos

    def exchange(self, message):
        """Send all workers a message, bytes; wait until they have done what it says."""
        for connection in self.connections:
            with contextlib.suppress(ConnectionError):  # the worker ended: hear why, below
                connection.send_bytes(message)
        try:
            for connection in self.connections:
                # In two halves: time for which all was suspended (Ctrl-Z) uses up only one.
                if not any(connection.poll(self.timeout / 2) for _ in range(2)):
                    raise ChildProcessError(f"no answer of an environment in {self.timeout:g} s")
                if problem := connection.recv_bytes():
                    raise ChildProcessError(f"an environment raised {problem.decode()}")
        except (EOFError, ConnectionError) as error:
            raise ChildProcessError("the process of an environment died") from error

    def close_extras(self, **kwargs):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"close")
        for worker in self.workers:
            worker.join(timeout=1)
            worker.kill()
            worker.join()


def run_worker(connection, others, env_fns, space, memory, part) -> None:
    """A worker of WorkerVectorEnv: step the environments in the slice `part`, as told."""
    for other in others:
        other.close()  # so that the connection ends with the main process
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    arrays = read_from_shared_memory(space, memory, len(env_fns))
    mine = {name: array[part] for name, array in arrays.items()}
    try:
        envs = [FreshEnv(env_fn) for env_fn in env_fns[part]]
        while (message := await_message(connection)) != b"close":
            if message == b"step":
                for i, env in enumerate(envs):
                    obs, mine["reward"][i], terminated, truncated, _ = env.step(mine["action"][i])
                    if terminated or truncated:
                        mine["final_obs"][i] = obs
                        obs, _ = env.reset()
                    mine["obs"][i] = obs
                    mine["terminated"][i], mine["truncated"][i] = terminated, truncated
            else:
                seeds = mine["reset_seed"].tolist()
                np.random.seed(seeds[0])  # this and the next for environments that use them
                random.seed(seeds[0])
                for i, (env, seed) in enumerate(zip(envs, seeds, strict=True)):
                    mine["obs"][i], _ = env.reset(seed=seed)
            connection.send_bytes(b"")
        for env in envs:
            env.close()
    except Exception as error:  # whatever a user's own environment raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__} {error}".split())
        with contextlib.suppress(ConnectionError):  # the main process is gone
            connection.send_bytes(f"{text} ({place.filename}, line {place.lineno})".encode())


def await_message(connection):
    """The next message. A process that sleeps takes long to wake: ask for 2 ms before sleeping."""
    deadline = time.perf_counter() + 0.002
    while not connection.poll() and time.perf_counter() < deadline:
        if hasattr(os, "sched_yield"):
            os.sched_yield()  # lets the other processes of this core run
    return connection.recv_bytes()


def start_episodes(envs: gym.vector.VectorEnv, args: Args, iteration: int) -> np.ndarray:
    """Start new episodes, with every random stream seeded by (seed, iteration).

    This happens at each scheduled checkpoint too. So a run resumed from one equals a run that was
    never stopped, to the bit on a CPU, although the state of an environment cannot be saved.
    """
    rng = np.random.default_rng([args.seed, iteration])
    torch.manual_seed(int(rng.integers(2**63)))
    np.random.seed(rng.integers(2**32))  # this and the next for environments that use them
    random.seed(int(rng.integers(2**32)))
    obs, _ = envs.reset(seed=rng.integers(2**31, size=args.num_envs).tolist())
    return obs


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights scaled by `std`, biases 0 (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy pi(a|s) and the value V(s), two heads on one body (detail 13, Atari 8).

    Observations are (batch, 97, 96, frame_stack), of AgentView; actions (batch, 2), in (0, 1). The
    policy sees the frames alone. The critic, which only training needs, also knows how much of the
    lap is done: what there is left to win depends on it, and the frames hardly show it.
    """

    def __init__(self, obs_space: spaces.Box, action_space: spaces.Box):
        super().__init__()
        self.first = layer_init(nn.Conv2d(obs_space.shape[-1], 16, kernel_size=8, stride=4))
        self.body = nn.Sequential(
            nn.ReLU(),
            layer_init(nn.Conv2d(16, 32, kernel_size=3, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, kernel_size=3, stride=2)),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.actor = nn.Sequential(
            layer_init(nn.Linear(64 * 5 * 5, 128)),
            nn.ReLU(),
            layer_init(nn.Linear(128, 2 * action_space.shape[0]), std=0.01),
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(64 * 5 * 5 + 1, 128)),
            nn.ReLU(),
            layer_init(nn.Linear(128, 1), std=1.0),
        )

    def get_features(self, obs: torch.Tensor) -> torch.Tensor:
        """What both heads work on: (batch, 1600). The windows of `first` end above the last row."""
        # With the channels last in memory, convolutions take half the time on a CPU.
        pixels = obs.float().permute(0, 3, 1, 2)
        # Pixels are scaled to [0, 1] (Atari 9) by way of the weights: dividing them takes as long.
        first = self.first
        return self.body(F.conv2d(pixels, first.weight / 255, first.bias, first.stride))

    def get_policy(self, features: torch.Tensor) -> Beta:
        """Independent Beta distributions of the actions, unimodal since alpha, beta > 1 (Beta)."""
        alpha, beta = (1 + F.softplus(self.actor(features))).chunk(2, dim=-1)
        # Validating the arguments would take longer than sampling.
        return Beta(alpha, beta, validate_args=False)

    def get_value_of(self, features: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """V(s), given what the body makes of it: (batch,)."""
        lap = obs[:, -1, 0, :1].float() / 32 - 4  # from -4 to 4
        return self.critic(torch.cat([features, lap], dim=1)).squeeze(-1)

    def get_value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s): (batch,)."""
        return self.get_value_of(self.get_features(obs), obs)

    def get_action_and_value(self, obs: torch.Tensor, action: torch.Tensor | None = None):
        """The action (sampled if none is given), its log-probability, the entropy and V(s)."""
        features = self.get_features(obs)
        policy = self.get_policy(features)
        if action is None:
            action = policy.sample().clamp(1e-6, 1 - 1e-6)  # where the density is finite
        value = self.get_value_of(features, obs)
        return action, policy.log_prob(action).sum(-1), policy.entropy().sum(-1), value

    def get_deterministic_action(self, obs: torch.Tensor) -> torch.Tensor:
        """The mean action: (batch, 2)."""
        return self.get_policy(self.get_features(obs)).mean


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalised advantage estimation: PPO eq. 11, GAE eq. 16, as a recursion (detail 5).

    All tensors are (num_steps, num_envs); none is changed.

    Args:
        rewards: r_t.
        values: V(s_t).
        next_values: V of the observation that the action at t led to: V(s_{t+1}) within an episode,
            V(final observation) where it was truncated; not used where it terminated.
        terminations: whether the episode reached a terminal state, after which nothing is earned.
        truncations: whether it was cut, by a time limit for instance, and would have gone on: the
            rest is bootstrapped (time limits). Where both are set, it terminated.
        gamma, gae_lambda: discount factor and lambda.

    Returns:
        the advantages A_t, and A_t + V(s_t), the returns that the value function is trained on.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    # PPO eq. 12: delta_t = r_t + gamma V(s_{t+1}) - V(s_t), where V is 0 in a terminal state.
    deltas = rewards + gamma * torch.where(terminations, 0.0, next_values) - values
    # PPO eq. 11: A_t = delta_t + gamma lambda A_{t+1}, with nothing passed back between episodes.
    decays = gamma * gae_lambda * (~(terminations | truncations)).to(deltas.dtype)
    advantage = torch.zeros_like(deltas[0])
    backwards = []
    for delta, decay in zip(deltas.flip(0), decays.flip(0), strict=True):
        advantage = delta + decay * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards).flip(0)
    return advantages, advantages + values


def ppo_loss(
    new_logprobs, old_logprobs, advantages, new_values, old_values, returns, entropy,
    clip_coef=0.2, vf_coef=0.5, ent_coef=0.01, clip_vloss=False,
):  # fmt: skip
    """PPO-Clip: -(L^CLIP - c_1 L^VF + c_2 S), PPO eq. 9, to be minimised.

    All tensors are (batch,). Another shape raises ValueError: a (batch, 1) among them would
    broadcast to (batch, batch) without a word.

    Args:
        new_logprobs, new_values, entropy: of the agent that is trained.
        old_logprobs, old_values: of the agent that collected the rollout.
        advantages: used as given.
        returns: what the values are trained on.
        clip_coef, vf_coef, ent_coef: epsilon, c_1, c_2.
        clip_vloss: take V clipped to within clip_coef of old_values, where that is worse.

    Returns:
        the loss, a scalar to differentiate, and metrics, a dict of detached scalars.
    """
    check_shapes(new_logprobs, old_logprobs, advantages, new_values, old_values, returns, entropy)
    log_ratio = new_logprobs - old_logprobs
    ratio = log_ratio.exp()  # eq. 6: r_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    # Eq. 7: L^CLIP = E[min(r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon) A_t)] (detail 8).
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_objective = torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = compute_value_loss(new_values, old_values, returns, clip_coef, clip_vloss)
    loss = -policy_objective + vf_coef * value_loss - ent_coef * entropy.mean()  # eq. 9, detail 10
    return loss, loss_metrics(policy_objective, value_loss, entropy, log_ratio, clip_coef)


def compute_value_loss(new_values, old_values, returns, clip_coef, clip_vloss):
    """L^VF of PPO eq. 9: the mean squared error, or the clipped one (detail 9)."""
    squared_error = (new_values - returns) ** 2
    if clip_vloss:
        clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        squared_error = torch.max(squared_error, (clipped_values - returns) ** 2)
    return squared_error.mean()


@torch.no_grad()
def loss_metrics(policy_objective, value_loss, entropy, log_ratio, clip_coef):
    """What there is to watch (detail 12), as detached scalars."""
    ratio = log_ratio.exp()
    return {
        "policy_loss": -policy_objective,
        "value_loss": value_loss.detach(),
        "entropy": entropy.mean(),
        "approx_kl": ((ratio - 1) - log_ratio).mean(),  # Schulman's k3 estimate of KL(old || new)
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }


def check_shapes(*tensors):
    """Raise ValueError unless all tensors have one and the same shape (batch,)."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or tensors[0].ndim != 1:
        raise ValueError(f"expected tensors of one shape (batch,), not {sorted(shapes)}")


def flatten_parameters(agent: nn.Module) -> nn.Parameter:
    """Make all weights views of one vector, and their gradients views of its gradient.

    Clipping, Adam and zeroing then take one tensor instead of a dozen, with the same result; for
    small networks this saves a seventh of the update's time.
    """
    weights = list(agent.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(weights).detach())
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector.data, weights)
    gradients = vector.grad.split([weight.numel() for weight in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.view_as(weight)
    return vector


class Rollout(NamedTuple):
    """What happened in one iteration; all (num_steps, num_envs), obs (..., 97, 96, frame_stack)."""

    obs: torch.Tensor
    actions: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    next_values: torch.Tensor
    terminations: torch.Tensor
    truncations: torch.Tensor


def collect_rollout(agent, envs, next_obs, args, device):
    """Act for `num_steps` steps in every environment, from `next_obs` on.

    Returns:
        the Rollout, and the observations from which the next one goes on.
    """
    shape = (args.num_steps, args.num_envs)
    obs = torch.empty(
        (*shape, *envs.single_observation_space.shape), dtype=torch.uint8, device=device
    )
    actions = torch.empty((*shape, *envs.single_action_space.shape), device=device)
    logprobs, values = torch.empty(2, *shape, device=device)
    rewards = np.empty(shape, np.float32)
    terminations, truncations = np.empty(shape, bool), np.empty(shape, bool)
    final_obs = []
    for t in range(args.num_steps):
        obs[t] = torch.from_numpy(next_obs)
        with torch.inference_mode():
            actions[t], logprobs[t], _, values[t] = agent.get_action_and_value(obs[t])
        next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(
            actions[t].cpu().numpy()
        )
        if "final_obs" in infos:  # at least one episode ended
            final_obs.extend(infos["final_obs"][truncations[t]])

    rewards, terminations, truncations = (
        torch.from_numpy(array).to(device) for array in (rewards, terminations, truncations)
    )
    with torch.no_grad():
        last_value = agent.get_value(torch.from_numpy(next_obs).to(device))
        next_values = torch.cat([values[1:], last_value.unsqueeze(0)])
        if final_obs:
            final_obs = torch.from_numpy(np.stack(final_obs)).to(device)
            next_values[truncations] = agent.get_value(final_obs)
    rollout = Rollout(
        obs, actions, logprobs, values, rewards, next_values, terminations, truncations
    )
    return rollout, next_obs


def update(agent, weights, optimizer, rollout, advantages, returns, args):
    """K epochs of minibatch steps on the surrogate objective, all samples in each epoch (detail 6).

    Returns:
        the mean of every metric over the minibatches, floats.
    """
    obs, actions, logprobs, values = (tensor.flatten(0, 1) for tensor in rollout[:4])
    advantages, returns = advantages.flatten(), returns.flatten()
    # To allocate a minibatch's 38 MB of floats each time would take a quarter of the update's time.
    largest = math.ceil(len(obs) / args.num_minibatches)
    pixels = torch.empty(largest, *obs.shape[1:], device=obs.device)
    history = []
    for mb in minibatches(len(obs), args, obs.device):
        mb_obs = pixels[: len(mb)].copy_(obs[mb])
        _, new_logprobs, entropy, new_values = agent.get_action_and_value(mb_obs, actions[mb])
        mb_advantages = advantages[mb]
        if args.norm_adv:  # detail 7
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
        loss, metrics = ppo_loss(
            new_logprobs, logprobs[mb], mb_advantages, new_values, values[mb], returns[mb],
            entropy, args.clip_coef, args.vf_coef, args.ent_coef, args.clip_vloss,
        )  # fmt: skip
        history.append(metrics)
        if args.target_kl is not None and metrics["approx_kl"] > 1.5 * args.target_kl:
            break  # before a step that would lead further away, not after it
        weights.grad.zero_()
        loss.backward()
        metrics["grad_norm"] = grad_norm = weights.grad.norm()
        weights.grad.mul_((args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1))  # detail 11
        optimizer.step()

    return {
        name: torch.stack([metrics[name] for metrics in history if name in metrics]).mean().item()
        for name in history[0]
    }


def minibatches(batch_size, args, device):
    """Indices of minibatches: each epoch visits every sample once, in an order of its own."""
    for _ in range(args.update_epochs):
        yield from torch.randperm(batch_size, device=device).tensor_split(args.num_minibatches)


def train(args: Args) -> dict:
    """PPO, Algorithm 1 of the paper; returns what result.json holds.

    Raises FloatingPointError if a number is not finite, and SystemExit (130 or 143) when SIGINT or
    SIGTERM ended the run.
    """
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    envs = make_vector_env(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], args.learning_rate, eps=1e-5, fused=True)  # detail 3
    progress = Progress()
    if args.resume:
        progress = load_checkpoint(args.resume, agent, optimizer)
    cores = torch.get_num_threads()
    next_obs = start_episodes(envs, args, progress.iteration)

    with contextlib.closing(envs), contextlib.closing(RunLog(args, progress)) as log:
        while progress.global_step < args.total_timesteps and not log.stop_signal:
            started = time.perf_counter()
            remaining = 1 - progress.global_step / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate  # detail 4
            torch.set_num_threads(1)  # the environments' processes have the cores
            rollout, next_obs = collect_rollout(agent, envs, next_obs, args, device)
            torch.set_num_threads(cores)
            progress.iteration += 1
            progress.global_step += rollout.rewards.numel()
            check_finite(progress, reward=rollout.rewards, value=rollout.next_values)
            advantages, returns = compute_gae(
                args.reward_scale * rollout.rewards, rollout.values, rollout.next_values,
                rollout.terminations, rollout.truncations, args.gamma, args.gae_lambda,
            )  # fmt: skip
            metrics = update(agent, weights, optimizer, rollout, advantages, returns, args)
            check_finite(progress, **metrics, weights=weights)
            progress.learning_seconds += time.perf_counter() - started

            log.write(rollout, returns, metrics, optimizer.param_groups[0]["lr"])
            if progress.iteration % args.checkpoint_interval == 0:
                save_checkpoint(log.run_dir / "agent.pt", args, agent, optimizer, progress)
                next_obs = start_episodes(envs, args, progress.iteration)
                log.start_episodes()
        save_checkpoint(log.run_dir / "agent.pt", args, agent, optimizer, progress)
    if log.stop_signal:
        print(f"stopped; go on with --resume {log.run_dir / 'agent.pt'}")
        sys.exit(128 + log.stop_signal)
    return report(args, agent, log, device)


def evaluate(agent, args, episodes, seed, device) -> np.ndarray:
    """Play whole episodes of the environment as Gymnasium makes it, with seeds never trained on.

    Args:
        agent: plays its deterministic actions; None plays random ones.
        args: for the environment; with `args.render` it is shown.
        episodes: how many; one process a core plays them, on the CPU whatever `device` is.
        seed: the same seed gives the same episodes, whatever the agent.

    Returns:
        the undiscounted sums of the environment's own rewards, float64, (episodes,).
    """
    rng = np.random.default_rng(seed)
    seeds = rng.integers(2**31, 2**32, (episodes, 2)).tolist()  # training seeds are below 2**31
    play = functools.partial(
        play_episode, None if agent is None else copy.deepcopy(agent).cpu(), args
    )
    if args.render:
        return np.array([play(pair) for pair in seeds])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the players': this process ends them
    pool = multiprocessing.get_context("spawn").Pool(min(episodes, count_cores()))
    signal.signal(signal.SIGINT, handler)
    players = multiprocessing.active_children()
    with pool:
        returns = pool.map_async(play, seeds, chunksize=1)
        while not returns.ready():
            returns.wait(1)
            if any(player.exitcode is not None for player in players):
                raise ChildProcessError("the process of an episode died")
        return np.array(returns.get())


@torch.no_grad()
def play_episode(agent, args, seeds) -> float:
    """The return of one episode, with seeds for the environment and for random actions."""
    torch.set_num_threads(1)
    env = make_env(args, "human" if args.render else None)
    env.action_space.seed(seeds[1])
    obs, _ = env.reset(seed=seeds[0])
    total, ended = 0.0, False
    while not ended:
        (action,) = choose_actions(agent, [env], [obs], torch.device("cpu"))
        obs, reward, terminated, truncated, _ = env.step(action)
        total += reward
        ended = terminated or truncated
    env.close()
    return total


def choose_actions(agent, envs, obs, device):
    """One action for each environment: the agent's deterministic one, or a random one."""
    if agent is None:
        return [env.action_space.sample() for env in envs]
    obs = torch.as_tensor(np.stack(obs), dtype=torch.float32, device=device)
    return agent.get_deterministic_action(obs).numpy(force=True)


# From here on all is convenience: checkpoints, logs, plot, GIF. If you copy the algorithm, delete
# what you don't need, with the lines of `train` that call it.


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    global_step: int = 0
    learning_seconds: float = 0.0
    episodes: list = field(default_factory=list)  # (step, return, length), when each ended
    metrics: list = field(default_factory=list)  # a dict an iteration


def check_finite(progress, **numbers):
    """Raise FloatingPointError if one of the tensors or floats holds nan or infinity."""
    for name, number in numbers.items():
        if not torch.as_tensor(number).isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {progress.global_step}")


def save_checkpoint(path, args, agent, optimizer, progress):
    """Write all that `--resume` and `load_agent` need, in plain types and tensors.

    It is written beside `path` and moved there, so a kill at any time leaves a whole checkpoint.
    """
    checkpoint = {
        "script": Args.exp_name,
        "args": dataclasses.asdict(args) | {"evaluate": None, "render": False, "resume": None},
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": dataclasses.asdict(progress),
    }
    temporary = path.with_suffix(".tmp")
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    """What `save_checkpoint` wrote, and its Args; ValueError if `path` is something else."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
        args = Args(**checkpoint["args"]) if script == Args.exp_name else None
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path} is damaged, or no checkpoint of {Args.exp_name}.py") from error
    if args is None:
        raise ValueError(f"{path} is a checkpoint of {script}.py, not of {Args.exp_name}.py")
    return checkpoint, args


def load_checkpoint(path, agent, optimizer):
    """Give `agent` and `optimizer` their saved state; returns the saved Progress."""
    checkpoint, _ = read_checkpoint(path)
    agent.load_state_dict(checkpoint["agent"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return Progress(**checkpoint["progress"])


def load_agent(path, device):
    """The agent of a checkpoint and its Args; ValueError if `path` is not one of this script."""
    checkpoint, args = read_checkpoint(path)
    try:
        env = make_env(args)
        agent = Agent(env.observation_space, env.action_space)
        env.close()
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # the environment is missing, or another than it was
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"{path} does not fit its environment {args.env_id}: {reason}") from error
    return agent.to(device), args


def make_run_dir(args):
    """A new folder in runs/, named after environment, experiment, seed and time."""
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}")
    Path("runs").mkdir(exist_ok=True)
    for second in itertools.count(int(time.time())):
        with contextlib.suppress(FileExistsError):  # another run of this second
            run_dir = Path("runs", f"{name}__{second}")
            run_dir.mkdir()
            return run_dir


class RunLog:
    """The run's folder, TensorBoard and progress bar, and the signals that end it.

    `stop_signal` is the SIGINT or SIGTERM that came, so that the loop can end between iterations; a
    second one ends the process at once.
    """

    def __init__(self, args, progress):
        self.args, self.progress, self.stop_signal = args, progress, 0
        self.started = time.perf_counter()
        self.run_dir = args.resume.parent if args.resume else make_run_dir(args)
        print(f"run folder {self.run_dir}")
        self.writer = SummaryWriter(self.run_dir, purge_step=progress.global_step + 1)
        rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|argument|value|\n|-|-|{rows}")
        batch_size = args.num_envs * args.num_steps
        total = math.ceil(args.total_timesteps / batch_size) * batch_size
        self.bar = tqdm(total=total, initial=progress.global_step, unit="step")
        self.start_episodes()
        self.handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in self.handlers:
            signal.signal(number, self.stop)

    def stop(self, number, _):
        self.stop_signal = number
        for number in self.handlers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this iteration; once more stops at once\n")

    def close(self):
        self.bar.close()
        self.writer.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def start_episodes(self):
        self.returns = np.zeros(self.args.num_envs)
        self.lengths = np.zeros(self.args.num_envs, int)

    def write(self, rollout, returns, metrics, learning_rate):
        """Record an iteration: the episodes that ended in it, the means of its metrics."""
        progress, step = self.progress, self.progress.global_step - rollout.rewards.numel()
        ends = (rollout.terminations | rollout.truncations).numpy(force=True)
        for rewards, ended in zip(rollout.rewards.numpy(force=True), ends, strict=True):
            step += len(rewards)
            self.returns += rewards
            self.lengths += 1
            for i in np.flatnonzero(ended):
                self.record_episode(step, i)
            self.returns[ended] = self.lengths[ended] = 0
        unexplained = (returns - rollout.values).var() / returns.var()
        metrics = metrics | {"explained_variance": 1 - unexplained.item()}
        last = [episode[1] for episode in progress.episodes[-100:]]
        mean = float(np.mean(last)) if last else None
        point = {"step": step, "seconds": progress.learning_seconds, "episodic_return": mean}
        progress.metrics.append(metrics | point)
        for name, value in metrics.items():
            self.writer.add_scalar(f"losses/{name}", value, step)
        self.writer.add_scalar("charts/learning_rate", learning_rate, step)
        self.writer.add_scalar("charts/SPS", step / progress.learning_seconds, step)
        if last:
            self.bar.set_postfix_str(f"return {mean:.1f}", refresh=False)
        self.bar.update(rollout.rewards.numel())

    def record_episode(self, step, i):
        """Record that an episode ended in environment `i`."""
        episode_return, length = self.returns[i].item(), self.lengths[i].item()
        self.progress.episodes.append((step, episode_return, length))
        self.writer.add_scalar("charts/episodic_return", episode_return, step)
        self.writer.add_scalar("charts/episodic_length", length, step)


def report(args, agent, log, device):
    """Compare the trained agent with a random one: print, plot, film, write result.json."""
    threshold = reward_threshold(args)
    save_plot(log.run_dir / "training.png", args, log.progress, threshold)
    print(f"playing {args.eval_episodes} episodes with a random agent and with the trained one")
    random_returns = evaluate(None, args, args.eval_episodes, args.seed, device)
    returns = evaluate(agent, args, args.eval_episodes, args.seed, device)
    result = {
        "run_dir": str(log.run_dir),
        "global_step": log.progress.global_step,
        "learning_seconds": log.progress.learning_seconds,
        "wall_seconds": time.perf_counter() - log.started,
        "eval_returns": returns.tolist(),
        "eval_mean": float(returns.mean()),
        "eval_std": float(returns.std()),
        "random_returns": random_returns.tolist(),
        "threshold": threshold,
        "solved": None if threshold is None else bool(returns.mean() >= threshold),
        "curve": {
            name: [point[name] for point in log.progress.metrics]
            for name in ("step", "seconds", "episodic_return")
        },
        "args": dataclasses.asdict(args),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, gym, np)},
    }
    (log.run_dir / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    try:
        save_gif(log.run_dir / "agent.gif", args, agent, device)
    except Exception as error:  # whatever an environment raises that cannot be drawn here
        print(f"no GIF: {type(error).__name__} {error}")
    print(summary("random agent", random_returns))
    print(summary("trained agent", returns, threshold))
    return result


def reward_threshold(args):
    """The return from which the environment counts as solved, or None."""
    return getattr(make_env(args).spec, "reward_threshold", None)


def summary(name, returns, threshold=None):
    """One line: mean and standard deviation, and whether they reach the threshold."""
    line = f"{name:13} {returns.mean():6.1f} ± {returns.std():5.1f} over {len(returns)} episodes"
    if threshold is None:
        return line
    verdict = "solved" if returns.mean() >= threshold else "not solved"
    return f"{line}, {verdict} (threshold {threshold:g})"


def save_plot(path, args, progress, threshold):
    """Draw the return of every episode, and losses, entropy and KL of every iteration."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    names = ["policy_loss", "value_loss", "entropy", "approx_kl"]
    axes = figure.subplot_mosaic([["return"] * len(names), names], height_ratios=[2, 1])
    for name in names:
        steps, values = zip(*[(m["step"], m[name]) for m in progress.metrics], strict=True)
        axes[name].plot(steps, values)
    if progress.episodes:
        steps, returns, _ = np.array(progress.episodes).T
        window = min(100, len(returns))
        average = np.convolve(returns, np.full(window, 1 / window), mode="valid")
        axes["return"].plot(steps, returns, ".", markersize=2, alpha=0.5, label="episode")
        axes["return"].plot(steps[window - 1 :], average, label=f"mean of {window} episodes")
    if threshold is not None:
        axes["return"].axhline(threshold, color="black", linestyle="--", label="threshold")
    if axes["return"].lines:
        axes["return"].legend(loc="lower right")
    for name, axis in axes.items():
        axis.set(title=name.replace("_", " "), xlabel="environment steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    axes["return"].set_title(f"{args.env_id}, seed {args.seed}")
    figure.savefig(path, dpi=100)


def save_gif(path, args, agent, device):
    """Film an episode of the trained agent beside one of a random agent, repeated as needed."""
    metadata = make_env(args).metadata
    if "rgb_array" not in metadata.get("render_modes", []):
        raise ValueError(f"{args.env_id} has no render mode rgb_array")
    fps = metadata.get("render_fps", 30)
    every = math.ceil(fps / 25)  # more frames a second would only make the file larger
    untrained, trained = film(None, args, device, every), film(agent, args, device, every)
    frames = []
    for left, right in zip(itertools.cycle(untrained), trained, strict=False):
        frame = Image.new("RGB", (left.width + right.width, left.height + 16), "white")
        frame.paste(left, (0, 16))
        frame.paste(right, (left.width, 16))
        ImageDraw.Draw(frame).text((4, 2), "random", fill="black")
        ImageDraw.Draw(frame).text((left.width + 4, 2), "trained", fill="black")
        frames.append(frame)
    duration = 1000 * every / fps
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=duration)


@torch.no_grad()
def film(agent, args, device, every):
    """Every so many-th frame of one episode, at most 250, as small images."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no display for this
    env = make_env(args, "rgb_array")
    env.action_space.seed(args.seed + 1)
    obs, _ = env.reset(seed=args.seed)
    frames = []
    for step in range(250 * every):
        if step % every == 0:
            frames.append(ImageOps.contain(Image.fromarray(env.render()), (300, 300)))
        (action,) = choose_actions(agent, [env], [obs], device)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    env.close()
    return frames


def main() -> None:
    """Train, go on with a run (--resume), or evaluate a checkpoint (--evaluate)."""
    args = tyro.cli(Args)
    try:
        if path := args.evaluate or args.resume:
            agent, saved = load_agent(path, "cpu")
            if args.resume and not read_checkpoint(path)[0].get("optimizer"):
                raise ValueError(f"{path} holds no optimiser state: evaluate it, or train anew")
            if args.resume and path.name != "agent.pt":  # it would be written there
                raise ValueError(f"--resume takes the agent.pt of a run folder, not {path}")
            cuda = args.cuda if args.evaluate else saved.cuda
            args = tyro.cli(Args, default=dataclasses.replace(saved, cuda=cuda))
            for name in (
                "env_id",
                "env_kwargs",
                "domain_randomize",
                "action_repeat",
                "frame_stack",
            ):
                if getattr(args, name) != getattr(saved, name):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} cannot differ from what {path} was trained with")
        check_args(args)
    except ValueError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # in one line
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    device = torch.device("cuda" if args.cuda else "cpu")
    try:
        if args.render:
            for seed in range(args.seed, args.seed + args.eval_episodes):
                print(f"return {evaluate(agent.to(device), args, 1, seed, device).item():.1f}")
        elif args.evaluate:
            threshold = reward_threshold(args)
            returns = evaluate(agent.to(device), args, args.eval_episodes, args.seed, device)
            print(summary("trained agent", returns, threshold))
        else:
            train(args)
    except (FloatingPointError, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
