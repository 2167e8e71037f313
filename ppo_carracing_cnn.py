# /// script
# requires-python = ">=3.11"
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
"""Proximal Policy Optimization (PPO) from pixels in one file: CarRacing-v3.

One convolutional body with two heads, a Beta policy over steering and pedal and the value function,
learns from four gray frames. Frames are drawn only if the agent sees them.

    python ppo_carracing_cnn.py                                          # on the CPU
    python ppo_carracing_cnn.py --cuda                                   # on a GPU
    python ppo_carracing_cnn.py --evaluate runs/<run>/agent.pt --render  # watch a trained agent
    python ppo_carracing_cnn.py --resume runs/<run>/agent.pt             # continue a stopped run

References:
    PPO          Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    GAE          Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized
                 Advantage Estimation, arXiv:1506.02438
    time limits  Pardo et al. 2018, Time Limits in Reinforcement Learning, arXiv:1712.00378
    Beta         Chou et al. 2017, Improving Stochastic Policy Gradients in Continuous Control with
                 Deep Reinforcement Learning using the Beta Distribution, ICML
    asymmetric   Pinto et al. 2018, Asymmetric Actor Critic for Image-Based Robot Learning, RSS
    detail n     Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization,
                 ICLR blog track: the core details 1 to 13
    Atari n      the same, the details for learning from pixels
"""

import ast
import copy
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pygame
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.box2d import car_racing
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import _async_worker
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from pygame import gfxdraw
from torch import nn
from torch.distributions import Beta, Independent
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train PPO on CarRacing-v3 from pixels."""

    exp_name: str = "ppo_carracing_cnn"  # name of the experiment, part of the run folder's name
    seed: int = 1  # random seed
    cuda: bool = False  # train on the GPU
    track: bool = False  # log to Weights & Biases (project: environment variable WANDB_PROJECT)

    env_id: str = "CarRacing-v3"  # the only environment of this script
    env_kwargs: tuple[str, ...] = ()  # its arguments, such as `max_episode_steps=500`
    domain_randomize: bool = False  # other colors of road, grass and background in each episode
    stock_renderer: bool = False  # Gymnasium's own environment: the same pixels, but slower
    action_repeat: int = 4  # frames per action; all steps are counted in actions
    frame_stack: int = 4  # frames that the agent sees, one per action
    max_steps_without_progress: int = 75  # training truncates after so long without a new tile
    reward_scale: float = 0.018  # factor of the rewards in training
    total_timesteps: int = 1_200_000  # total actions, rounded up to whole iterations
    num_envs: int = 8  # number of parallel environments (N), a process each
    num_steps: int = 512  # actions per environment and iteration (T)
    step_timeout: float = 60.0  # seconds after which a step that has not returned ends the run

    learning_rate: float = 4e-4  # learning rate of Adam
    anneal_lr: bool = True  # linearly anneal the learning rate to 0
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    num_minibatches: int = 16  # minibatches per epoch, of N * T / num_minibatches transitions
    update_epochs: int = 6  # epochs per iteration (K)
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clipping range of the probability ratio (epsilon)
    clip_vloss: bool = False  # clip the value loss (no gain: Engstrom 2020, Andrychowicz 2021)
    ent_coef: float = 0.0  # coefficient of the entropy bonus (c_2)
    vf_coef: float = 0.5  # coefficient of the value loss (c_1); CleanRL's 0.5 is 0.25 here
    max_grad_norm: float = 0.5  # maximum norm of the gradient
    target_kl: float | None = None  # stop the update at a KL above 1.5 times this (None: never)

    checkpoint_interval: int = 20  # iterations between checkpoints
    eval_episodes: int = 100  # evaluation episodes (0: no evaluation and no GIF)
    evaluate: Path | None = None  # checkpoint (agent.pt) to evaluate instead of training
    render: bool = False  # with --evaluate: show the episodes in a window
    resume: Path | None = None  # checkpoint (agent.pt) to continue; flags override its settings


def make_env(args: Args, training: bool = True, render_mode: str | None = None) -> gym.Env:
    """One CarRacing as the agent sees it; in training, episodes without progress are truncated."""
    kwargs = {"domain_randomize": args.domain_randomize} | parse_env_kwargs(args)
    kwargs["render_mode"] = render_mode
    if args.stock_renderer or render_mode == "human":
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
    else:
        limit = kwargs.pop("max_episode_steps", gym.spec(args.env_id).max_episode_steps)
        env = gym.wrappers.TimeLimit(LazyCarRacing(**kwargs), limit)
        env.unwrapped.spec = gym.spec(args.env_id)
    return AgentView(env, args, args.max_steps_without_progress if training else math.inf)


class AgentView(gym.Wrapper):
    """What the agent sees and does (Atari 2, 5, 7).

    Observations are uint8, (97, 96, frame_stack): the last gray frames, and below them, for the
    critic alone (asymmetric), a row that begins with `lap_state`, from 0 to 255.
    Actions are (steering, pedal) in [0, 1]: left to right, full brake to full gas. An action is
    held for `action_repeat` frames, and its reward is their sum.
    """

    blind = False  # a random agent needs no pictures

    def __init__(self, env, args, max_steps_without_progress):
        super().__init__(env)
        self.args, self.max_steps_without_progress = args, max_steps_without_progress
        self.obs = np.zeros((97, 96, args.frame_stack), np.uint8)
        self.observation_space = Box(0, 255, self.obs.shape, np.uint8)
        self.action_space = Box(0.0, 1.0, (2,), np.float32)
        fps = env.metadata["render_fps"] / args.action_repeat
        self.metadata = env.metadata | {"render_fps": fps}

    def reset(self, *, seed=None, options=None):
        self.unwrapped.lazy, self.steps_without_progress = False, 0
        frame, _ = self.env.reset(seed=seed, options=options)
        self.obs[:96] = to_gray(frame)[..., np.newaxis]
        self.obs[96, :6] = 255 * lap_state(self.unwrapped)[:, np.newaxis]
        return self.obs.copy(), {}

    def step(self, action):
        steering, pedal = 2 * np.asarray(action, np.float64) - 1
        controls, total_reward = np.array([steering, max(pedal, 0), max(-pedal, 0)]), 0.0
        for i in range(self.args.action_repeat):
            self.unwrapped.lazy = self.blind or i < self.args.action_repeat - 1
            frame, reward, terminated, truncated, _ = self.env.step(controls)
            total_reward += reward
            if terminated or truncated:
                break
        if not self.blind:
            # The frame is missing if the episode ended on one that was not to be drawn.
            frame = self.unwrapped.observe() if frame is None else frame
            self.obs[:96, :, :-1] = self.obs[:96, :, 1:]
            self.obs[:96, :, -1] = to_gray(frame)
        self.obs[96, :6] = 255 * lap_state(self.unwrapped)[:, np.newaxis]
        self.steps_without_progress = 0 if total_reward > 0 else self.steps_without_progress + 1
        truncated = truncated or self.steps_without_progress >= self.max_steps_without_progress
        return self.obs.copy(), total_reward, terminated, truncated, {}


def lap_state(env):
    """What the frames do not show of a lap, six numbers from 0 to 1.

    The share of tiles visited, the time, the number of tiles to visit, the distance to the next of
    them, the car's place on the track, the number of tiles missed behind it. (Numbers of tiles are
    counted up to 10; distance and place are in laps.)
    """
    ahead = np.array([point[2:] for point in env.track]) - env.car.hull.position
    place, tiles = np.hypot(*ahead.T).argmin(), len(env.track)
    missing = np.flatnonzero([not tile.road_visited for tile in env.road])
    distance = ((missing - place) % tiles).min() if len(missing) else 0
    behind = np.count_nonzero(missing < place)
    time, visited = env.t * car_racing.FPS / 1000, 1 - len(missing) / tiles
    counts = min(len(missing), 10) / 10, min(behind, 10) / 10
    return np.array([visited, min(time, 1), counts[0], distance / tiles, place / tiles, counts[1]])


def to_gray(frame):
    """Luma (ITU-R BT.601) of a frame (96, 96, 3), uint8: (96, 96)."""
    return (frame @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)


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
            self.polygons = [(square, self.grass_color) for square in grass_squares()]
            self.polygons += self.road_poly
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
            gfxdraw.aapolygon(self.surf, points, color)
            gfxdraw.filled_polygon(self.surf, points, color)


@cache
def make_canvases() -> tuple[pygame.Surface, pygame.Surface]:
    """Two surfaces to draw on, the same for all environments: more would outgrow the cache."""
    size = (car_racing.WINDOW_W, car_racing.WINDOW_H)
    return pygame.Surface(size), pygame.Surface(size)


def grass_squares() -> list:
    """The corners of the light squares in the grass, in CarRacing's order."""
    size = car_racing.GRASS_DIM
    squares = [(size * x, size * y) for x in range(-20, 20, 2) for y in range(-20, 20, 2)]
    return [[(x + size, y), (x, y), (x, y + size), (x + size, y + size)] for x, y in squares]


@cache
def draw_score(text: str) -> pygame.Surface:
    """The score as CarRacing writes it."""
    pygame.font.init()
    font = pygame.font.Font(pygame.font.get_default_font(), 42)
    return font.render(text, True, (255, 255, 255), (0, 0, 0))


def make_vector_env(args: Args, training: bool = True, render_mode=None) -> VectorEnv:
    """`args.num_envs` environments that step together (detail 1), a process each.

    SAME_STEP: the step that ends an episode returns the next one's first observation, and the final
    one in `infos`. (In Gymnasium's default mode, a phantom step follows each episode.)
    """
    env_fns = [partial(make_env, args, training, render_mode)] * args.num_envs
    if render_mode:  # in this process
        return SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    mode = AutoresetMode.SAME_STEP
    return ProcessVectorEnv(env_fns, args.step_timeout, copy=False, autoreset_mode=mode)


class ProcessVectorEnv(AsyncVectorEnv):
    """AsyncVectorEnv that waits at most `step_timeout` seconds, and leaves signals to the caller.

    ChildProcessError if a process died, raised an error or gave no answer; all are killed then.
    """

    def __init__(self, env_fns, step_timeout, **kwargs):
        super().__init__(env_fns, worker=run_env, **kwargs)
        self.step_timeout = step_timeout
        # At exit, multiprocessing would wait for processes that ignore SIGTERM.
        self.at_exit = Finalize(self, kill, [self.processes], exitpriority=1)

    def reset(self, *, seed=None, options=None):
        return self.exchange(self.reset_async, self.reset_wait, seed, options)

    def step(self, actions):
        return self.exchange(self.step_async, self.step_wait, actions)

    def exchange(self, send, wait, *inputs):
        try:
            send(*inputs)
            return wait(timeout=self.step_timeout)
        except multiprocessing.TimeoutError:
            problem = f"gave no answer in {self.step_timeout:g} s"
        except (EOFError, ConnectionError):
            problem = "died"
        except Exception as error:
            problem = f"raised {error!r}"
        self.close()
        raise ChildProcessError(f"the process of an environment {problem}")

    def close_extras(self, **kwargs):
        kill(self.processes)


def run_env(*args):
    """AsyncVectorEnv's worker, in a process that SIGINT and SIGTERM do not end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop
    _async_worker(*args)


def kill(processes):
    for process in processes:
        process.kill()
        process.join()


def reset_envs(envs: VectorEnv, args: Args, iteration: int) -> np.ndarray:
    """Start episodes, with all random generators seeded by (seed, iteration).

    Each environment of each run has a seed of its own. (With seed + i for environment i, runs 1 and
    2 would share most of theirs.)
    """
    rng = np.random.default_rng([args.seed, iteration])
    torch.manual_seed(int(rng.integers(2**63)))
    np.random.seed(rng.integers(2**32))  # for environments that use the global generator
    return envs.reset(seed=rng.integers(2**31, size=args.num_envs).tolist())[0]


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by `std`, zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def make_head(num_inputs, num_outputs, std):
    """A hidden layer of 128 units; `std` scales the weights of the output layer."""
    hidden = layer_init(nn.Linear(num_inputs, 128))
    return nn.Sequential(hidden, nn.ReLU(), layer_init(nn.Linear(128, num_outputs), std))


class Agent(nn.Module):
    """The policy pi(a|s) and the value function V(s), two heads on one body (detail 13, Atari 8).

    Observations are (batch, 97, 96, frame_stack), as AgentView returns them; actions (batch, 2), in
    (0, 1); log-probabilities, entropies, values (batch,). The policy sees the frames alone; the
    critic, which only training needs, also the six numbers of `lap_state` in the row below them.
    """

    def __init__(self, obs_space, action_space):
        super().__init__()
        first = layer_init(nn.Conv2d(obs_space.shape[-1], 16, kernel_size=8, stride=4))
        second = layer_init(nn.Conv2d(16, 32, kernel_size=3, stride=2))
        third = layer_init(nn.Conv2d(32, 64, kernel_size=3, stride=2))
        self.body = nn.Sequential(
            first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), nn.Flatten()
        )
        self.actor = make_head(64 * 5 * 5, 2 * action_space.shape[0], std=0.01)
        self.critic = make_head(64 * 5 * 5 + 6, 1, std=1.0)

    def forward(self, obs):
        """pi(.|s), a torch.distributions.Distribution, and V(s)."""
        frames, lap = obs[:, :96], obs[:, 96, :6, 0]  # for both, and for the critic alone
        # Scaled to [0, 1] (Atari 9), in place to save a sixth of the time on a CPU; channels
        # stay last in memory, which halves it.
        pixels = frames.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(255)
        features = self.body(pixels)
        # Independent Beta distributions, unimodal as alpha, beta > 1 (Beta).
        alpha, beta = (1 + F.softplus(self.actor(features))).chunk(2, dim=-1)
        policy = Independent(Beta(alpha, beta, validate_args=False), 1, validate_args=False)
        lap = lap.float() / 32 - 4  # from -4 to 4
        return policy, self.critic(torch.cat([features, lap], dim=1)).squeeze(-1)

    def get_policy(self, obs):
        return self(obs)[0]

    def get_value(self, obs):
        return self(obs)[1]

    def get_deterministic_action(self, obs):
        """The most probable action."""
        return self.get_policy(obs).mode

    def get_action_and_value(self, obs, action=None):
        """action (sampled if None), log-probability, entropy, V(s): the interface of CleanRL."""
        policy, value = self(obs)
        if action is None:
            action = policy.sample().clamp(1e-6, 1 - 1e-6)  # where the density is finite
        return action, policy.log_prob(action), policy.entropy(), value


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation: PPO eq. 11 and 12, GAE eq. 16 (detail 5).

    All tensors are (num_steps, num_envs); inputs are not modified.

    Args:
        rewards, values: r_t, V(s_t).
        next_values: V of the observation that the action at t led to: V(s_{t+1}) inside an episode,
            V(final observation) where it was truncated. Not used where it terminated.
        terminations: whether the episode reached a terminal state.
        truncations: whether the episode was cut, by a time limit for instance, so that what would
            have followed is bootstrapped (time limits). If both are set, it terminated.

    Returns:
        (advantages, returns): A_t, and A_t + V(s_t), the targets of the value function.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    # PPO eq. 12: delta_t = r_t + gamma V(s_{t+1}) - V(s_t); V is 0 after a termination.
    deltas = rewards + gamma * next_values.masked_fill(terminations, 0) - values
    # PPO eq. 11: A_t = delta_t + gamma lambda A_{t+1}, where A_{t+1} is 0 across episodes.
    decays = gamma * gae_lambda * (~(terminations | truncations)).to(deltas.dtype)
    advantages, advantage = torch.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def ppo_loss(new_logprobs, old_logprobs, advantages, new_values, old_values, returns, entropy,
             clip_coef=0.2, vf_coef=0.5, ent_coef=0.01, clip_vloss=False):  # fmt: skip
    """PPO-Clip, PPO eq. 9: -L^CLIP + c_1 L^VF - c_2 S (detail 10).

    All tensors are (batch,); ValueError for other shapes, which would broadcast. `new_...` and
    `entropy` are of the agent being trained, `old_...` of the one that collected the rollout;
    clip_coef, vf_coef, ent_coef are epsilon, c_1, c_2; clip_vloss clips the value loss (detail 9).

    Returns:
        (loss, metrics): a scalar to minimize, and a dict of detached scalars.
    """
    check_1d(new_logprobs, old_logprobs, advantages, new_values, old_values, returns, entropy)
    log_ratio = new_logprobs - old_logprobs
    ratio = log_ratio.exp()  # PPO eq. 6: r_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    # PPO eq. 7: L^CLIP = E[min(r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon) A_t)] (detail 8).
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = compute_value_loss(new_values, old_values, returns, clip_coef, clip_vloss)
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy.mean()  # PPO eq. 9
    return loss, loss_metrics(policy_loss, value_loss, entropy, log_ratio, clip_coef)


def compute_value_loss(new_values, old_values, returns, clip_coef, clip_vloss):
    """L^VF of PPO eq. 9, mean squared error, or its clipped form (detail 9)."""
    squared_error = (new_values - returns) ** 2
    if clip_vloss:
        clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        squared_error = torch.max(squared_error, (clipped_values - returns) ** 2)
    return squared_error.mean()


@torch.no_grad()
def loss_metrics(policy_loss, value_loss, entropy, log_ratio, clip_coef):
    """Diagnostics of a minibatch (detail 12): approx_kl is estimator k3 of KL(pi_old || pi)."""
    ratio = log_ratio.exp()
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean()}
    metrics["approx_kl"] = (ratio - 1 - log_ratio).mean()
    metrics["clipfrac"] = ((ratio - 1).abs() > clip_coef).float().mean()
    return {name: metric.detach() for name, metric in metrics.items()}


def check_1d(*tensors):
    """ValueError unless all tensors are (batch,)."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or tensors[0].ndim != 1:
        raise ValueError(f"all tensors must be of one shape (batch,), not {sorted(shapes)}")


# The transitions of an iteration: (num_steps, num_envs), obs and actions with more.
Rollout = namedtuple(
    "Rollout", "obs actions logprobs values rewards next_values terminations truncations"
)


@torch.no_grad()
def collect_rollout(agent, envs, next_obs, args, device):
    """Collect `args.num_steps` transitions from each environment: (rollout, next_obs).

    `next_obs` is what `envs.reset` or the previous rollout returned. ValueError if `envs` is not in
    autoreset mode SAME_STEP.
    """
    if envs.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ValueError("envs must be made with autoreset_mode=AutoresetMode.SAME_STEP")
    shape, space, final_obs = (args.num_steps, envs.num_envs), envs.single_action_space, []
    obs = torch.as_tensor(np.zeros((shape[0], *next_obs.shape), next_obs.dtype), device=device)
    actions = torch.as_tensor(np.zeros((*shape, *space.shape), space.dtype), device=device)
    logprobs, values = torch.zeros(2, *shape, device=device)
    rewards, (terminations, truncations) = np.zeros(shape, np.float32), np.zeros((2, *shape), bool)
    for t in range(args.num_steps):
        obs[t] = torch.from_numpy(next_obs)
        action, logprobs[t], _, values[t] = agent.get_action_and_value(obs[t])
        actions[t] = action
        outcome = envs.step(action.numpy(force=True))
        next_obs, rewards[t], terminations[t], truncations[t], infos = outcome
        if truncations[t].any():
            final_obs.extend(infos["final_obs"][truncations[t]])

    last_obs = torch.as_tensor(next_obs, device=device)
    next_values = torch.cat([values[1:], agent.get_value(last_obs).unsqueeze(0)])
    if final_obs:
        final_obs = torch.as_tensor(np.stack(final_obs), device=device)
        next_values[torch.from_numpy(truncations)] = agent.get_value(final_obs)
    stored = (obs, actions, logprobs, values, rewards, next_values)
    tensors = (torch.as_tensor(x, device=device) for x in (*stored, terminations, truncations))
    return Rollout(*tensors), next_obs


def update(agent, optimizer, rollout, advantages, returns, args):
    """`args.update_epochs` epochs of minibatch steps, each in a new order (detail 6).

    Returns the mean of each metric over the minibatches, floats.
    """
    obs, actions, logprobs, values = (tensor.flatten(0, 1) for tensor in rollout[:4])
    advantages, returns = advantages.flatten(), returns.flatten()
    history = []
    for mb in minibatches(len(obs), args, obs.device):
        policy, new_values = agent(obs[mb])
        new_logprobs, mb_advantages = policy.log_prob(actions[mb]), advantages[mb]
        with torch.set_grad_enabled(args.ent_coef > 0):  # without a bonus it is only logged
            entropy = policy.entropy()
        if args.norm_adv:  # detail 7
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
        loss, metrics = ppo_loss(
            new_logprobs, logprobs[mb], mb_advantages, new_values, values[mb], returns[mb],
            entropy, args.clip_coef, args.vf_coef, args.ent_coef, args.clip_vloss)  # fmt: skip
        history.append(metrics)
        if args.target_kl is not None and metrics["approx_kl"] > 1.5 * args.target_kl:
            break  # before a step that would increase it
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # detail 11
        optimizer.step()

    means = {name: torch.stack([m[name] for m in history]).mean().item() for name in metrics}
    means["explained_variance"] = 1 - ((returns - values).var() / (returns.var() + 1e-8)).item()
    return means


def minibatches(batch_size, args, device):
    """Indices of the minibatches of all epochs; each epoch visits each transition once."""
    for _ in range(args.update_epochs):
        yield from torch.randperm(batch_size, device=device).tensor_split(args.num_minibatches)


def train(args: Args) -> dict:
    """PPO, Algorithm 1; returns the content of result.json.

    FloatingPointError if a number is not finite; ChildProcessError if an environment's process
    fails; SystemExit, with code 130 or 143, if SIGINT or SIGTERM ended the run. Unless it is
    killed, the state of its last whole iteration is saved.
    """
    torch.manual_seed(args.seed)
    envs = make_vector_env(args)  # before CUDA starts, which they would inherit
    device, num_threads = torch.device("cuda" if args.cuda else "cpu"), torch.get_num_threads()
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # detail 3
    progress = start_progress(args, agent, optimizer)
    next_obs = reset_envs(envs, args, progress.iteration)
    batch_size = args.num_envs * args.num_steps
    total_steps = math.ceil(args.total_timesteps / batch_size) * batch_size

    with catch_signals() as stopped, closing(envs), open_run(args, progress, total_steps) as run:
        while progress.global_step < total_steps and not stopped:
            started = time.perf_counter()
            remaining = 1 - progress.global_step / total_steps if args.anneal_lr else 1.0
            for group in optimizer.param_groups:
                group["lr"] = remaining * args.learning_rate  # detail 4
            torch.set_num_threads(1)  # the environments' processes have the cores
            rollout, next_obs = collect_rollout(agent, envs, next_obs, args, device)
            torch.set_num_threads(num_threads)
            check_finite(reward=rollout.rewards, value=rollout.next_values)
            advantages, returns = compute_gae(
                args.reward_scale * rollout.rewards, rollout.values, rollout.next_values,
                rollout.terminations, rollout.truncations, args.gamma, args.gae_lambda)  # fmt: skip
            metrics = update(agent, optimizer, rollout, advantages, returns, args)
            check_finite(**metrics, **agent.state_dict())
            progress.iteration += 1
            progress.global_step += batch_size
            progress.learning_seconds += time.perf_counter() - started
            log_iteration(run, progress, rollout, metrics, optimizer)
            run.checkpoint = snapshot(args, agent, optimizer, progress)
            if progress.iteration % args.checkpoint_interval == 0:
                save_checkpoint(run)
    if stopped:
        sys.exit(128 + stopped[0])
    return report(args, agent, run, progress, device)


@torch.no_grad()
def act(agent, envs, obs, device):
    """Deterministic actions of the agent, (num_envs, ...), or random ones if it is None."""
    if agent is None:
        return envs.action_space.sample()
    obs = torch.as_tensor(obs, device=device)
    return agent.get_deterministic_action(obs).numpy(force=True)


def evaluate(agent, args, episodes, seed, device) -> np.ndarray:
    """Play whole episodes, each with a seed of its own that training never uses.

    The agent plays its deterministic actions, or random ones if it is None, in at most
    `args.num_envs` environments at a time (one with `args.render`). The same seed gives the same
    episodes, whatever the agent. Returns the undiscounted sums of the environment's own rewards:
    float64, (episodes,).
    """
    rounds = math.ceil(episodes / (1 if args.render else args.num_envs))
    args = replace(args, num_envs=math.ceil(episodes / rounds))
    envs = make_vector_env(args, training=False, render_mode="human" if args.render else None)
    rng, returns = np.random.default_rng(seed), np.zeros((rounds, args.num_envs))
    seeds = rng.integers(2**31, 2**32, returns.shape).tolist()  # those of training are below 2**31
    envs.action_space.seed(int(rng.integers(2**31)))
    envs.set_attr("blind", agent is None)
    with closing(envs), tqdm(total=returns.size, unit="episode", delay=3, leave=False) as bar:
        for i in range(rounds):
            obs, playing = envs.reset(seed=seeds[i])[0], np.ones(args.num_envs, bool)
            while playing.any():
                obs, rewards, terminated, truncated, _ = envs.step(act(agent, envs, obs, device))
                returns[i] += np.where(playing, rewards, 0)
                bar.update(int((playing & (terminated | truncated)).sum()))
                playing &= ~(terminated | truncated)
    return returns.flatten()[:episodes]


# The algorithm ends here. The utilities below are not needed to use it.


class BadInput(ValueError):
    """Arguments that cannot work, in one sentence."""


class NotFinite(FloatingPointError):
    """A number that training cannot go on with."""


def refuse(condition, reason):
    if condition:
        raise BadInput(reason)


def check_args(args):
    """BadInput, which names the flag, if `args` cannot work. Resets and steps an environment."""
    at_least = {"seed": 0, "eval_episodes": 0, "max_grad_norm": 1e-8, "target_kl": 1e-8}
    at_least |= {"num_steps": 2 if args.num_envs == 1 else 1, "step_timeout": 0.1}
    at_most = {"gamma": 1, "gae_lambda": 1, "step_timeout": 1e6}
    if not args.evaluate:
        at_most["num_minibatches"] = args.num_envs * args.num_steps // 2
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = at_least.get(name, 1 if type(getattr(Args, name)) is int else 0)
            high, flag = at_most.get(name, sys.maxsize), f"--{name.replace('_', '-')}"
            refuse(not low <= value <= high, f"{flag} must be from {low} to {high}, not {value}")
    refuse(args.cuda and not torch.cuda.is_available(), "--cuda needs a GPU; see --no-cuda")
    no_wandb = args.track and not args.evaluate and not find_spec("wandb")
    refuse(no_wandb, "--track needs wandb: pip install wandb")
    refuse(args.render and not args.evaluate, "--render needs --evaluate PATH")
    refuse(args.evaluate and args.resume, "--evaluate and --resume exclude each other")
    folder = "runs" if Path("runs").exists() else "."
    refuse(not args.evaluate and not os.access(f"{folder}/", os.W_OK), f"cannot write to {folder}")
    refuse(args.env_id != "CarRacing-v3", f"--env-id must be CarRacing-v3, not {args.env_id}")
    env = try_env(args, "human" if args.render else None)
    refuse(not env.unwrapped.continuous, "--env-kwargs continuous=False: must be True")
    env.reset()
    env.close()


def try_env(args, render_mode=None):
    """An environment: BadInput if a flag is to blame, else whatever the environment raises."""
    try:
        return make_env(args, render_mode=render_mode)
    except Exception as error:
        known = isinstance(error, gym.error.Error | ModuleNotFoundError)
        words = "unexpected keyword argument", "max_episode_steps"
        blamed = known or any(word in str(error) for word in words)
        refuse(blamed, f"--env-id {args.env_id} or --env-kwargs: {error}")
        error.add_note(f"({args.env_id}, before or after training)")
        raise


def parse_env_kwargs(args):
    """The environment's keyword arguments, from NAME=VALUE."""
    try:
        return {n: ast.literal_eval(v) for n, v in (x.split("=", 1) for x in args.env_kwargs)}
    except (ValueError, SyntaxError):
        raise BadInput(f"--env-kwargs takes NAME=LITERAL, not {args.env_kwargs}") from None


def check_finite(**numbers):
    """FloatingPointError if one of the arrays, tensors or floats is not finite."""
    for name, number in numbers.items():
        if not torch.as_tensor(number).isfinite().all():
            raise NotFinite(f"not finite: {name}")


def start_progress(args, agent, optimizer):
    """What the run has done so far; with --resume, it is loaded, and so are agent and optimizer."""
    progress = SimpleNamespace(iteration=0, global_step=0, learning_seconds=0.0, resumes=0)
    progress.episodes, progress.curve = [], {}
    if args.resume:
        saved = torch.load(args.resume, map_location="cpu", weights_only=True)
        refuse(not saved["optimizer"], f"{args.resume} has no optimizer state to continue with")
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizer"]["state"]})
        vars(progress).update(saved["progress"])
        progress.resumes += 1
    return progress


def snapshot(args, agent, optimizer, progress):
    """The content of a checkpoint: plain types, and copies of tensors."""
    state = copy.deepcopy({"agent": agent.state_dict(), "optimizer": optimizer.state_dict()})
    settings = asdict(replace(args, resume=None))
    return state | {"script": Args.exp_name, "args": settings, "progress": dict(vars(progress))}


def save_checkpoint(run):
    """Written beside agent.pt and moved there: a kill at any time leaves a whole file."""
    torch.save(run.checkpoint, run.folder / "agent.tmp")
    (run.folder / "agent.tmp").replace(run.folder / "agent.pt")


def load_agent(path, device):
    """(agent, args) of a checkpoint; ValueError if `path` is not a checkpoint of this script."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        refuse(checkpoint["script"] != Args.exp_name, f"it is one of {checkpoint['script']}.py")
        args, weights = Args(**checkpoint["args"]), checkpoint["agent"]
    except Exception as error:  # torch.load alone raises errors of many kinds
        raise BadInput(f"{Args.exp_name}.py cannot load {path}: {error!r:.200}") from None
    with closing(try_env(args)) as env:
        agent = Agent(env.observation_space, env.action_space)
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{path} does not fit {args.env_id}: {error!r:.200}") from None
    return agent.to(device), args


@contextmanager
def catch_signals():
    """Yields a list that SIGINT or SIGTERM is appended to; a second one ends the process."""
    stopped = []

    def stop(number, _):
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError):
            print("\nstopping after this iteration; again to stop at once", flush=True)

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # only the main thread handles signals
                stack.callback(signal.signal, number, signal.signal(number, stop))
        yield stopped


@contextmanager
def open_run(args, progress, total_steps):
    """The run's folder, TensorBoard and progress bar. However it ends, its checkpoint is saved."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    folder = Path("runs", name.replace("/", "_"))
    print(f"run folder {folder}")
    if args.track:
        import wandb

        wandb.init(name=folder.name, config=vars(args), sync_tensorboard=True)
    run = SimpleNamespace(folder=folder, started=time.perf_counter())
    run.checkpoint = torch.load(args.resume, "cpu", weights_only=True) if args.resume else None
    run.running = defaultdict(lambda: [0.0, 0])  # environment -> return, length of its episode
    run.bar = tqdm(total=total_steps, initial=progress.global_step, unit="step")
    run.writer = SummaryWriter(folder)  # makes the folder
    run.writer.add_text("hyperparameters", f"    {args}")
    script = Path(__file__).read_bytes()
    run.sha256 = hashlib.sha256(script).hexdigest()
    (folder / f"{Args.exp_name}.py").write_bytes(script)
    try:
        yield run
    finally:
        if error := sys.exception():
            error.add_note(f"({args.env_id}, after step {progress.global_step})")
        if run.checkpoint is not None:
            save_checkpoint(run)
        with suppress(OSError):  # Ctrl-C also ends the `tee` that output may go to
            run.bar.close()
            if run.checkpoint is not None and progress.global_step < total_steps:
                print(f"continue with --resume {folder / 'agent.pt'}", flush=True)
        run.writer.close()


def log_iteration(run, progress, rollout, metrics, optimizer):
    """Log metrics, and the episodes that ended, each at the step of its last transition."""
    dones, ended = rollout.terminations | rollout.truncations, []
    transitions = zip(rollout.rewards.flatten().tolist(), dones.flatten().tolist(), strict=True)
    for step, (reward, done) in enumerate(transitions, progress.global_step - dones.numel() + 1):
        episode = run.running[(step - 1) % dones.shape[1]]  # of the environment of this transition
        episode[:] = episode[0] + reward, episode[1] + 1
        if done:
            ended.append((step, *episode))
            run.writer.add_scalar("charts/episodic_return", episode[0], step)
            run.writer.add_scalar("charts/episodic_length", episode[1], step)
            episode[:] = 0.0, 0
    scalars = {f"losses/{name}": value for name, value in metrics.items()}
    scalars["charts/SPS"] = progress.global_step / progress.learning_seconds
    scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
    for name, value in scalars.items():
        run.writer.add_scalar(name, value, progress.global_step)
    progress.episodes += ended  # after all that can fail, so that a checkpoint has whole iterations
    mean = np.mean([e[1] for e in progress.episodes[-100:]]).item() if ended else None
    point = {"step": progress.global_step, "seconds": progress.learning_seconds, **metrics}
    for name, value in (point | {"episodic_return": mean}).items():
        progress.curve.setdefault(name, []).append(value)
    with suppress(OSError):
        run.bar.update(dones.numel())


def report(args, agent, run, progress, device):
    """Plot the run, evaluate a random and the trained agent, film it, write result.json."""
    save_plot(run.folder / "training.png", args, progress)
    result = {"run_dir": str(run.folder), "args": asdict(args), "sha256": run.sha256}
    result |= {name: value for name, value in vars(progress).items() if name != "episodes"}
    result |= {"threshold": reward_threshold(args), "random_returns": []}
    result |= {"eval_returns": [], "eval_mean": None, "eval_std": None, "solved": None}
    result["versions"] = {module.__name__: module.__version__ for module in (torch, gym, np)}
    if args.eval_episodes:
        save_gif(run.folder / "agent.gif", args, agent, device)
        result["random_returns"] = play(None, args, 10, device)["eval_returns"]
        result |= play(agent, args, args.eval_episodes, device)
    result["wall_seconds"] = time.perf_counter() - run.started
    (run.folder / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    return result


def play(agent, args, episodes, device):
    """Evaluate a random (None) or trained agent, print the result, and return it."""
    returns, threshold = evaluate(agent, args, episodes, args.seed, device), reward_threshold(args)
    mean, std = returns.mean().item(), returns.std().item()
    solved = None if agent is None or threshold is None else mean >= threshold
    name = "random agent" if agent is None else "trained agent"
    print(f"{name:13} {mean:8.1f} ± {std:5.1f} over {episodes} episodes", end="")
    print("" if solved is None else f", {'' if solved else 'not '}solved (threshold {threshold:g})")
    return {"eval_returns": returns.tolist(), "eval_mean": mean, "eval_std": std, "solved": solved}


def reward_threshold(args):
    with closing(make_env(args)) as env:
        return env.spec.reward_threshold


def save_plot(path, args, progress):
    """Plot the return of each episode, and losses, entropy and KL of each iteration."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    names = ["policy_loss", "value_loss", "entropy", "approx_kl"]
    axes = figure.subplot_mosaic([["episodic_return"] * 4, names], height_ratios=[2, 1])
    axes["episodic_return"].plot(*np.array(progress.episodes).reshape(-1, 3).T[:2], ".", alpha=0.3)
    axes["episodic_return"].set_title(f"{args.env_id}: episodes, and mean of the last 100")
    for name, axis in axes.items():  # None, no episode ended, is a gap
        axis.plot(progress.curve["step"], np.array(progress.curve[name], float), marker=".")
        axis.set(xlabel="environment steps", ylabel=name.replace("_", " "))
        axis.locator_params(axis="x", nbins=4)
    figure.savefig(path)


def save_gif(path, args, agent, device):
    """Film 250 steps of the agent; a line says if the environment can't be drawn."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no display is needed
    try:
        envs = make_vector_env(replace(args, num_envs=1), training=False, render_mode="rgb_array")
        obs, frames = envs.reset(seed=[args.seed])[0], []
        caption = f"{args.env_id}, {args.total_timesteps:,} steps"
        for _ in range(250):
            frames.append(Image.fromarray(envs.render()[0]).reduce(2))
            ImageDraw.Draw(frames[-1]).text((6, 6), caption, "red", font_size=16)
            obs = envs.step(act(agent, envs, obs, device))[0]
        envs.close()
        duration = 1000 / envs.metadata.get("render_fps", 30)
        frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=duration)
    except Exception as error:  # whatever an environment raises that can't be drawn here
        print(f"no GIF: {error!r}")


def main() -> None:
    """Train, continue a run (--resume), or evaluate a checkpoint (--evaluate)."""
    gym.logger.min_level = gym.logger.ERROR
    args = tyro.cli(Args)
    try:
        if path := args.evaluate or args.resume:
            agent, saved = load_agent(path, "cpu")
            args = tyro.cli(Args, default=replace(saved, cuda=saved.cuda and not args.evaluate))
            for name in ("env_id", "env_kwargs", "action_repeat", "frame_stack"):
                old, new = getattr(saved, name), getattr(args, name)
                refuse(old != new, f"--{name.replace('_', '-')} is {old} in {path}, not {new}")
        check_args(args)
        if args.evaluate:
            device = torch.device("cuda" if args.cuda else "cpu")
            play(agent.to(device), args, args.eval_episodes or 100, device)
        else:
            train(args)
    except (BadInput, NotFinite, ChildProcessError) as error:
        print("error:", *str(error).split(), *getattr(error, "__notes__", []), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"({args.env_id}, before or after training)")
        raise


if __name__ == "__main__":
    main()
