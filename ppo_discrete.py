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
"""Proximal Policy Optimization (PPO) for discrete actions in one file.

Actor and critic are separate MLPs. The objective is PPO-Clip or, with `--surrogate kl-penalty`,
PPO-Penalty with an adaptive coefficient.

    python ppo_discrete.py                                              # CartPole-v1
    python ppo_discrete.py --env-id LunarLander-v3 --norm-obs --seed 2  # all flags: --help
    python ppo_discrete.py --evaluate runs/<run>/agent.pt --render      # watch a trained agent
    python ppo_discrete.py --resume runs/<run>/agent.pt                 # continue a stopped run

References:
    PPO          Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    GAE          Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized
                 Advantage Estimation, arXiv:1506.02438
    time limits  Pardo et al. 2018, Time Limits in Reinforcement Learning, arXiv:1712.00378
    detail n     Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization,
                 ICLR blog track: the core details 1 to 13
    cont. n      the same, the details for continuous actions
"""

import ast
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train PPO on an environment with discrete actions. The defaults suit CartPole-v1."""

    exp_name: str = "ppo_discrete"  # name of the experiment, part of the run folder's name
    seed: int = 1  # random seed
    cuda: bool = False  # train on the GPU (a CPU may be faster for networks this small)
    track: bool = False  # log to Weights & Biases (project: environment variable WANDB_PROJECT)

    env_id: str = "CartPole-v1"  # Gymnasium environment; `module:Name-v0` imports the module first
    env_kwargs: tuple[str, ...] = ()  # its arguments, such as `enable_wind=True wind_power=10.0`
    total_timesteps: int = 100_000  # total environment steps, rounded up to whole iterations
    num_envs: int = 32  # number of parallel environments (N)
    num_steps: int = 32  # steps per environment and iteration (T)

    learning_rate: float = 2e-3  # learning rate of Adam
    critic_learning_rate: float | None = None  # learning rate of the critic (None: the same)
    anneal_lr: bool = True  # linearly anneal the learning rate to 0
    gamma: float = 0.98  # discount factor
    gae_lambda: float = 0.9  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    num_minibatches: int = 4  # minibatches per epoch, of N * T / num_minibatches transitions
    update_epochs: int = 6  # epochs per iteration (K)
    norm_adv: bool = True  # normalize the advantages of each minibatch
    surrogate: Literal["clip", "kl-penalty"] = "clip"  # PPO-Clip or PPO-Penalty
    clip_coef: float = 0.2  # clipping range of the probability ratio (epsilon)
    clip_vloss: bool = False  # clip the value loss (no gain: Engstrom 2020, Andrychowicz 2021)
    ent_coef: float = 0.0  # coefficient of the entropy bonus (c_2)
    vf_coef: float = 0.5  # coefficient of the value loss (c_1); CleanRL's 0.5 is 0.25 here
    max_grad_norm: float = 0.5  # maximum norm of the gradient
    target_kl: float | None = None  # stop updates at 1.5 times this; PPO-Penalty: d_targ (0.01)
    kl_coef: float = 1.0  # PPO-Penalty: initial coefficient of the KL penalty (beta)
    norm_obs: bool = False  # normalize observations by running mean and variance
    hidden_size: int = 64  # units per hidden layer

    checkpoint_interval: int = 50  # iterations between checkpoints
    eval_episodes: int = 100  # evaluation episodes (0: no evaluation and no GIF)
    evaluate: Path | None = None  # checkpoint (agent.pt) to evaluate instead of training
    render: bool = False  # with --evaluate: show the episodes in a window
    resume: Path | None = None  # checkpoint (agent.pt) to continue; flags override its settings


def make_env(args: Args, training: bool = True, render_mode: str | None = None) -> gym.Env:
    """One environment, with vector observations (obs_dim,) and actions 0, 1, ..., n - 1."""
    kwargs = parse_env_kwargs(args) | ({"render_mode": render_mode} if render_mode else {})
    env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
    if not training and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)
    if isinstance(env.action_space, Discrete) and (start := env.action_space.start) != 0:
        env = gym.wrappers.TransformAction(env, lambda a: a + start, Discrete(env.action_space.n))
    if not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return PlainEnv(env)


class PlainEnv(gym.Wrapper):
    """Copies observations, makes rewards floats, and drops infos, as vector environments need."""

    def reset(self, *, seed=None, options=None):
        obs, _ = self.env.reset(seed=seed, options=options)
        return np.array(obs, self.observation_space.dtype), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        obs = np.array(obs, self.observation_space.dtype)
        return obs, np.asarray(reward, np.float64).item(), terminated, truncated, {}


def make_vector_env(args: Args, training: bool = True, render_mode=None) -> VectorEnv:
    """`args.num_envs` environments that step together (detail 1).

    SAME_STEP: the step that ends an episode returns the next one's first observation, and the final
    one in `infos`. (In Gymnasium's default mode, a phantom step follows each episode.)
    """
    env_fns = [lambda: make_env(args, training, render_mode)] * args.num_envs
    return SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)


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


def make_mlp(num_inputs, num_outputs, hidden_size, std):
    """Two hidden layers of tanh units; `std` scales the weights of the output layer."""
    first = layer_init(nn.Linear(num_inputs, hidden_size))
    second = layer_init(nn.Linear(hidden_size, hidden_size))
    output = layer_init(nn.Linear(hidden_size, num_outputs), std)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), output)


class ObservationNormalizer(nn.Module):
    """Normalizes by running mean and variance, and clips to [-10, 10] (cont. 6, 7).

    Updated once per iteration, after the policy; before the first update it changes nothing.
    """

    def __init__(self, obs_dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, obs):
        if self.count == 0:
            return obs.float()
        return ((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10).float()

    def update(self, obs):
        """Add observations (..., obs_dim) to the moments (parallel update, Chan et al. 1979)."""
        obs = obs.flatten(0, -2).double()
        total, delta = self.count + len(obs), obs.mean(0) - self.mean
        squares = self.var * self.count + obs.var(0, correction=0) * len(obs)
        self.var = (squares + delta**2 * self.count * len(obs) / total) / total
        self.mean, self.count = self.mean + delta * len(obs) / total, total


class Agent(nn.Module):
    """The policy pi(a|s) and the value function V(s), separate networks (detail 13).

    Observations are (..., obs_dim), raw; actions, log-probabilities, entropies, values are (...).
    """

    def __init__(self, obs_space, action_space, norm_obs=False, hidden_size=64):
        super().__init__()
        obs_dim = obs_space.shape[0]
        self.normalize = ObservationNormalizer(obs_dim) if norm_obs else nn.Identity()
        self.actor = make_mlp(obs_dim, int(action_space.n), hidden_size, std=0.01)
        self.critic = make_mlp(obs_dim, 1, hidden_size, std=1.0)

    def forward(self, obs):
        """pi(.|s), a torch.distributions.Distribution, and V(s)."""
        return self.get_policy(obs), self.get_value(obs)

    def get_policy(self, obs):
        # validate_args=False: validation would take longer than the network.
        return Categorical(logits=self.actor(self.normalize(obs)), validate_args=False)

    def get_value(self, obs):
        return self.critic(self.normalize(obs)).squeeze(-1)

    def get_deterministic_action(self, obs):
        """The most probable action."""
        return self.get_policy(obs).mode

    def get_action_and_value(self, obs, action=None):
        """action (sampled if None), log-probability, entropy, V(s): the interface of CleanRL."""
        policy, value = self(obs)
        action = policy.sample() if action is None else action
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


def ppo_penalty_loss(new_logprobs, old_logprobs, advantages, kl, new_values, old_values, returns,
                     entropy, kl_coef, vf_coef=0.5, ent_coef=0.01, clip_vloss=False,
                     clip_coef=0.2):  # fmt: skip
    """PPO-Penalty: `ppo_loss` with L^KLPEN (PPO eq. 8) in place of L^CLIP.

    `kl` (batch,) is KL(pi_old(.|s) || pi(.|s)), `kl_coef` is beta. `clip_coef` is only used for
    `clip_vloss` and for the metric clipfrac.
    """
    check_1d(new_logprobs, old_logprobs, advantages, kl, new_values, old_values, returns, entropy)
    log_ratio = new_logprobs - old_logprobs
    # PPO eq. 8: L^KLPEN = E[r_t A_t - beta KL(pi_old || pi)].
    policy_loss = -(log_ratio.exp() * advantages - kl_coef * kl).mean()
    value_loss = compute_value_loss(new_values, old_values, returns, clip_coef, clip_vloss)
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy.mean()  # PPO eq. 9
    return loss, loss_metrics(policy_loss, value_loss, entropy, log_ratio, clip_coef)


def adapt_kl_coef(kl_coef, kl, target_kl):
    """Next beta, given the mean KL(pi_old || pi) after an update (PPO section 4)."""
    factor = 0.5 if kl < target_kl / 1.5 else 2.0 if kl > target_kl * 1.5 else 1.0
    return min(max(kl_coef * factor, 1e-4), 1e4)


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


# The transitions of an iteration: (num_steps, num_envs), obs (num_steps, num_envs, obs_dim).
Rollout = namedtuple(
    "Rollout", "obs actions logprobs values rewards next_values terminations truncations"
)


@torch.no_grad()
def collect_rollout(agent, envs, next_obs, args, device):
    """Collect `args.num_steps` transitions from each environment: (rollout, next_obs).

    `next_obs` (num_envs, obs_dim) is what `envs.reset` or the previous rollout returned. ValueError
    if `envs` is not in autoreset mode SAME_STEP.
    """
    if envs.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ValueError("envs must be made with autoreset_mode=AutoresetMode.SAME_STEP")
    shape, space, final_obs = (args.num_steps, envs.num_envs), envs.single_action_space, []
    obs = torch.zeros(*shape, *envs.single_observation_space.shape, device=device)
    actions = torch.as_tensor(np.zeros((*shape, *space.shape), space.dtype), device=device)
    rewards, (terminations, truncations) = np.zeros(shape, np.float32), np.zeros((2, *shape), bool)
    for t in range(args.num_steps):
        obs[t] = torch.from_numpy(next_obs)
        check_finite(observation=obs[t])
        actions[t] = action = agent.get_policy(obs[t]).sample()
        outcome = envs.step(action.numpy(force=True))
        next_obs, rewards[t], terminations[t], truncations[t], infos = outcome
        if truncations[t].any():
            final_obs.extend(infos["final_obs"][truncations[t]])

    policy, values = agent(obs)  # one pass for all steps costs less than one per step
    last_obs = torch.as_tensor(next_obs, dtype=torch.float32, device=device)
    next_values = torch.cat([values[1:], agent.get_value(last_obs).unsqueeze(0)])
    if final_obs:
        final_obs = torch.as_tensor(np.stack(final_obs), dtype=torch.float32, device=device)
        next_values[torch.from_numpy(truncations)] = agent.get_value(final_obs)
    stored = (obs, actions, policy.log_prob(actions), values, rewards, next_values)
    tensors = (torch.as_tensor(x, device=device) for x in (*stored, terminations, truncations))
    return Rollout(*tensors), next_obs


def update(agent, optimizer, rollout, advantages, returns, args, kl_coef=1.0):
    """`args.update_epochs` epochs of minibatch steps, each in a new order (detail 6).

    Returns the mean of each metric over the minibatches, floats. PPO-Penalty adds "kl", the mean
    KL(pi_old || pi) after the last step, and "kl_coef".
    """
    obs, actions, logprobs, values = (tensor.flatten(0, 1) for tensor in rollout[:4])
    advantages, returns = advantages.flatten(), returns.flatten()
    history = []
    if args.surrogate == "kl-penalty":
        old_agent = copy.deepcopy(agent).requires_grad_(False)  # pi_old
    for mb in minibatches(len(obs), args, obs.device):
        policy, new_values = agent(obs[mb])
        new_logprobs, mb_advantages = policy.log_prob(actions[mb]), advantages[mb]
        with torch.set_grad_enabled(args.ent_coef > 0):  # without a bonus it is only logged
            entropy = policy.entropy()
        if args.norm_adv:  # detail 7
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
        if args.surrogate == "clip":
            loss, metrics = ppo_loss(
                new_logprobs, logprobs[mb], mb_advantages, new_values, values[mb], returns[mb],
                entropy, args.clip_coef, args.vf_coef, args.ent_coef, args.clip_vloss)  # fmt: skip
        else:
            kl = kl_divergence(old_agent.get_policy(obs[mb]), policy)
            loss, metrics = ppo_penalty_loss(
                new_logprobs, logprobs[mb], mb_advantages, kl, new_values, values[mb], returns[mb],
                entropy, kl_coef, args.vf_coef, args.ent_coef, args.clip_vloss,
                args.clip_coef)  # fmt: skip
        history.append(metrics)
        if args.surrogate == "clip" and args.target_kl is not None:
            if metrics["approx_kl"] > 1.5 * args.target_kl:
                break  # before a step that would increase it
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # detail 11
        optimizer.step()

    means = {name: torch.stack([m[name] for m in history]).mean().item() for name in metrics}
    means["explained_variance"] = 1 - ((returns - values).var() / (returns.var() + 1e-8)).item()
    if args.surrogate == "kl-penalty":
        kl = kl_divergence(old_agent.get_policy(obs), agent.get_policy(obs)).mean().item()
        means |= {"kl": kl, "kl_coef": kl_coef}
    return means


def minibatches(batch_size, args, device):
    """Indices of the minibatches of all epochs; each epoch visits each transition once."""
    for _ in range(args.update_epochs):
        yield from torch.randperm(batch_size, device=device).tensor_split(args.num_minibatches)


def train(args: Args) -> dict:
    """PPO, Algorithm 1; returns the content of result.json.

    FloatingPointError if a number is not finite; SystemExit, with code 130 or 143, if SIGINT or
    SIGTERM ended the run. Unless it is killed, the state of its last whole iteration is saved.
    """
    torch.set_num_threads(1)  # faster than more for networks this small
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    envs = make_vector_env(args)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = Agent(*spaces, args.norm_obs, args.hidden_size).to(device)
    lr, critic_lr = args.learning_rate, args.critic_learning_rate
    critic_lr = lr if critic_lr is None else critic_lr
    actor, critic = agent.actor.parameters(), agent.critic.parameters()
    groups = [{"params": actor, "initial_lr": lr}, {"params": critic, "initial_lr": critic_lr}]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)  # detail 3
    progress = start_progress(args, agent, optimizer)
    next_obs, kl_coef = reset_envs(envs, args, progress.iteration), args.kl_coef
    batch_size = args.num_envs * args.num_steps
    total_steps = math.ceil(args.total_timesteps / batch_size) * batch_size

    with catch_signals() as stopped, closing(envs), open_run(args, progress, total_steps) as run:
        while progress.global_step < total_steps and not stopped:
            started = time.perf_counter()
            remaining = 1 - progress.global_step / total_steps if args.anneal_lr else 1.0
            for group in optimizer.param_groups:
                group["lr"] = remaining * group["initial_lr"]  # detail 4
            rollout, next_obs = collect_rollout(agent, envs, next_obs, args, device)
            advantages, returns = compute_gae(
                rollout.rewards, rollout.values, rollout.next_values, rollout.terminations,
                rollout.truncations, args.gamma, args.gae_lambda)  # fmt: skip
            metrics = update(agent, optimizer, rollout, advantages, returns, args, kl_coef)
            check_finite(**rollout._asdict(), **metrics, **agent.state_dict())
            if args.surrogate == "kl-penalty":
                target_kl = 0.01 if args.target_kl is None else args.target_kl
                kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], target_kl)
            if args.norm_obs:
                agent.normalize.update(rollout.obs)
            progress.iteration += 1
            progress.global_step += batch_size
            progress.learning_seconds += time.perf_counter() - started
            log_iteration(run, progress, rollout, metrics, optimizer)
            run.checkpoint = snapshot(replace(args, kl_coef=kl_coef), agent, optimizer, progress)
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
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
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
    at_least["num_steps"] = 2 if args.num_envs == 1 else 1
    at_most = {"gamma": 1, "gae_lambda": 1}
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
    env = try_env(args, "human" if args.render else None)
    raw, flag = env.unwrapped, f"--env-id {args.env_id}"
    space, reset, step = raw.observation_space, raw.reset(), raw.step(raw.action_space.sample())
    known = isinstance(reset, tuple) and len(step) == 5 and np.size(step[1]) == 1
    expected = "reset (observation, info), step (observation, reward, terminated, truncated, info)"
    refuse(not known, f"{flag} must return from {expected}, the reward a number")
    refuse(not isinstance(env.observation_space, Box), f"{flag}: {space} cannot be flattened")
    refuse(not isinstance(env.action_space, Discrete), f"{flag}: {env.action_space}, not Discrete")
    obs, _ = env.reset(seed=2**32 - 1)  # the largest seed of `evaluate`
    shapes = {obs.shape, env.step(env.action_space.sample())[0].shape}
    refuse(shapes != {env.observation_space.shape}, f"{flag}: observations {shapes} not in {space}")
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: evaluation episodes end after 10,000 steps")
    if len(space.shape or ()) == 3:
        print(f"{args.env_id} observes images, for which ppo_carracing_cnn.py has a CNN")
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
        agent = Agent(env.observation_space, env.action_space, args.norm_obs, args.hidden_size)
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
            for name in ("env_id", "env_kwargs", "norm_obs", "hidden_size", "surrogate"):
                old, new = getattr(saved, name), getattr(args, name)
                refuse(old != new, f"--{name.replace('_', '-')} is {old} in {path}, not {new}")
        check_args(args)
        if args.evaluate:
            device = torch.device("cuda" if args.cuda else "cpu")
            play(agent.to(device), args, args.eval_episodes or 100, device)
        else:
            train(args)
    except (BadInput, NotFinite) as error:
        print("error:", *str(error).split(), *getattr(error, "__notes__", []), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"({args.env_id}, before or after training)")
        raise


if __name__ == "__main__":
    main()
