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
"""Proximal Policy Optimization (PPO) with many environments in one file, on one machine or many.

Worker processes step the environments; `torchrun` adds processes, GPUs and machines. Actor and
critic are two heads on one MLP; actions are discrete or continuous.

    python ppo_multienv.py                                              # LunarLander-v3, all cores
    python ppo_multienv.py --env-id BipedalWalker-v3 --num-envs 64      # all flags: --help
    python ppo_multienv.py --evaluate runs/<run>/agent.pt --render      # watch a trained agent
    python ppo_multienv.py --resume runs/<run>/agent.pt                 # continue a stopped run
    torchrun --nproc-per-node 4 ppo_multienv.py                         # 4 processes
    torchrun --nproc-per-node 8 ppo_multienv.py --cuda                  # a GPU each
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 \
        ppo_multienv.py --cuda                                          # the first of 2 machines

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
import datetime
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import defaultdict, namedtuple
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, create_shared_memory, read_from_shared_memory
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Set by torchrun: this process's number among all and on its machine, and how many there are.
environ = os.environ if "RANK" in os.environ else {}
RANK, LOCAL_RANK = int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0))
WORLD_SIZE, LOCAL_SIZE = (int(environ.get(f"{x}WORLD_SIZE", 1)) for x in ("", "LOCAL_"))


@dataclass
class Args:
    """Train PPO with many environments. The defaults suit LunarLander-v3."""

    exp_name: str = "ppo_multienv"  # name of the experiment, part of the run folder's name
    seed: int = 1  # random seed
    cuda: bool = False  # train on the GPU, one for each process of torchrun
    track: bool = False  # log to Weights & Biases (project: environment variable WANDB_PROJECT)

    env_id: str = "LunarLander-v3"  # Gymnasium environment; `module:Name-v0` imports the module
    env_kwargs: tuple[str, ...] = ()  # its arguments, such as `continuous=True`
    total_timesteps: int = 1_000_000  # total environment steps, rounded up to whole iterations
    num_envs: int = 32  # number of parallel environments per process of torchrun (N)
    num_steps: int = 256  # steps per environment and iteration (T)
    num_workers: int | None = None  # worker processes (None: one per core; 0: none)
    step_timeout: float = 300.0  # seconds after which a step that has not returned ends the run
    rank_timeout: float = 600.0  # seconds after which a silent process of torchrun ends the run

    learning_rate: float = 1e-3  # learning rate of Adam
    anneal_lr: bool = True  # linearly anneal the learning rate to 0
    gamma: float = 0.999  # discount factor
    gae_lambda: float = 0.98  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    num_minibatches: int = 16  # minibatches per epoch, of N * T / num_minibatches transitions
    update_epochs: int = 6  # epochs per iteration (K)
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clipping range of the probability ratio (epsilon)
    clip_vloss: bool = False  # clip the value loss (no gain: Engstrom 2020, Andrychowicz 2021)
    ent_coef: float = 0.01  # coefficient of the entropy bonus (c_2)
    vf_coef: float = 0.5  # coefficient of the value loss (c_1); CleanRL's 0.5 is 0.25 here
    max_grad_norm: float = 0.5  # maximum norm of the gradient
    target_kl: float | None = None  # stop the update at a KL above 1.5 times this (None: never)
    norm_obs: bool = True  # normalize observations by running mean and variance
    norm_reward: bool = True  # divide rewards by the standard deviation of the discounted return
    log_std_init: float = 0.0  # initial log standard deviation; bounded actions are in [-1, 1]
    bound_mean: bool = True  # keep the mean within the bounds of the actions, by tanh
    hidden_size: int = 128  # units per hidden layer

    checkpoint_interval: int = 50  # iterations between checkpoints
    eval_episodes: int = 100  # evaluation episodes (0: no evaluation and no GIF)
    evaluate: Path | None = None  # checkpoint (agent.pt) to evaluate instead of training
    render: bool = False  # with --evaluate: show the episodes in a window
    resume: Path | None = None  # checkpoint (agent.pt) to continue; flags override its settings


def make_env(args: Args, training: bool = True, render_mode: str | None = None) -> gym.Env:
    """One environment, with vector observations, and actions 0 to n - 1 or scaled to [-1, 1]."""
    kwargs = parse_env_kwargs(args) | ({"render_mode": render_mode} if render_mode else {})
    env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
    if not training and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)
    if isinstance(env.action_space, Discrete) and (start := env.action_space.start) != 0:
        env = gym.wrappers.TransformAction(env, lambda a: a + start, Discrete(env.action_space.n))
    if is_real_vector(env.action_space):
        env = scale_actions(env)
    if not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return PlainEnv(env)


def is_real_vector(space):
    return isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"


def scale_actions(env):
    """Map [-1, 1] to the bounds of each action, and clip what lies beyond (cont. 5).

    Actions without two finite bounds are not scaled, and clipped to the bound that they have.
    """
    low, high, dtype = env.action_space.low, env.action_space.high, env.action_space.dtype
    least, most = low.astype(np.float32), high.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        bounded = np.isfinite(most - least)  # bounds at the limit of float32 count as none
        scale = np.where(bounded, high / 2 - low / 2, 1)
        shift = np.where(bounded, high / 2 + low / 2, 0)
    space = Box(np.where(bounded, -1, least), np.where(bounded, 1, most), dtype=np.float32)

    def to_bounds(action):
        return np.clip(action * scale + shift, low, high).astype(dtype)

    return gym.wrappers.TransformAction(env, to_bounds, space)


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
    """`args.num_envs` environments that step together (detail 1), in worker processes.

    SAME_STEP: the step that ends an episode returns the next one's first observation, and the final
    one in `infos`. (In Gymnasium's default mode, a phantom step follows each episode.)
    """
    env_fns = [partial(make_env, args, training, render_mode)] * args.num_envs
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # The processes of torchrun share the cores.
    num_workers = max(num_cores // LOCAL_SIZE, 1) if args.num_workers is None else args.num_workers
    if num_workers == 0 or render_mode:  # in this process
        return SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    return WorkerVectorEnv(env_fns, num_workers, args.step_timeout)


class WorkerVectorEnv(VectorEnv):
    """Environments split over worker processes; same results as SyncVectorEnv, but without infos.

    Each worker steps several environments and answers once per step; arrays are in shared memory,
    and overwritten by the next step. (AsyncVectorEnv has a process for each environment, which
    costs more than it brings where there are more environments than cores.) ChildProcessError if a
    worker died, raised an error, or took longer than `timeout` seconds; all are killed then.
    """

    def __init__(self, env_fns, num_workers, timeout):
        env, self.num_envs, self.timeout = env_fns[0](), len(env_fns), timeout
        self.metadata = env.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}
        obs, action = env.observation_space, env.action_space
        self.single_observation_space, self.single_action_space = obs, action
        env.close()
        self.observation_space = batch_space(obs, self.num_envs)
        self.action_space = batch_space(action, self.num_envs)
        # What is exchanged in a step, for each environment.
        space = Dict({"obs": obs, "final_obs": obs, "action": action, "ended": MultiBinary(2)})
        space["reward"] = Box(-np.inf, np.inf, (), np.float64)
        space["reset_seed"] = Box(0, 2**63 - 1, (), np.int64)
        self.memory = create_shared_memory(space, self.num_envs)
        self.arrays = read_from_shared_memory(space, self.memory, self.num_envs)
        if not isinstance(self.arrays["obs"], np.ndarray):
            raise ValueError(f"observations must be arrays, not {obs}")
        self.workers, self.pipes = [], []
        # At exit, multiprocessing would wait for processes that ignore SIGTERM.
        self.at_exit = Finalize(self, kill, [self.workers], exitpriority=1)
        for part in np.array_split(range(self.num_envs), min(num_workers, self.num_envs)):
            pipe, theirs = multiprocessing.Pipe()
            self.pipes.append(pipe)
            inputs = (theirs, self.pipes, env_fns, space, self.memory, part)
            worker = multiprocessing.Process(target=run_worker, args=inputs, daemon=True)
            worker.start()
            self.workers.append(worker)
            theirs.close()  # so that the pipe ends with the worker

    def reset(self, *, seed, options=None):
        seeds = seed if np.ndim(seed) else seed + np.arange(self.num_envs)
        self.arrays["reset_seed"][:] = seeds
        self.exchange(b"reset")
        return self.arrays["obs"], {}

    def step(self, actions):
        self.arrays["action"][:] = actions
        self.exchange(b"step")
        terminated, truncated = self.arrays["ended"].T > 0
        infos = {"final_obs": self.arrays["final_obs"], "_final_obs": terminated | truncated}
        return self.arrays["obs"], self.arrays["reward"], terminated, truncated, infos

    def exchange(self, message):
        """Send a message to all workers, and wait until they have done what it says."""
        try:
            for pipe in self.pipes:
                with suppress(ConnectionError):  # the worker has ended: see below
                    pipe.send_bytes(message)
            for pipe in self.pipes:
                # Twice: time in which all is suspended (Ctrl-Z) uses up only one of the waits.
                if not (pipe.poll(self.timeout / 2) or pipe.poll(self.timeout / 2)):
                    raise WorkerError(f"an environment gave no answer in {self.timeout:g} s")
                if problem := pipe.recv_bytes().decode():
                    raise WorkerError(problem)
        except BaseException as error:
            self.close()  # else a late answer would count as that to the next message
            if isinstance(error, EOFError | ConnectionError):
                raise WorkerError("the process of an environment died") from None
            raise

    def close_extras(self, **kwargs):
        kill(self.workers)


def run_worker(pipe, others, env_fns, space, memory, part):
    """Step the environments numbered `part` whenever a message says so."""
    for other in others:
        other.close()  # so that the pipe ends with the main process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop
    arrays = read_from_shared_memory(space, memory, len(env_fns))
    try:
        envs = {i: env_fns[i]() for i in part.tolist()}
        while message := await_message(pipe):
            for i, env in envs.items():
                if message == b"reset":
                    np.random.seed(arrays["reset_seed"][i] % 2**32)
                    obs, _ = env.reset(seed=int(arrays["reset_seed"][i]))
                else:
                    obs, arrays["reward"][i], *ended, _ = env.step(arrays["action"][i].copy())
                    arrays["ended"][i, 0], arrays["ended"][i, 1] = ended
                    if any(ended):
                        arrays["final_obs"][i] = obs
                        obs, _ = env.reset()
                arrays["obs"][i] = obs
            pipe.send_bytes(b"")
    except Exception as error:
        traceback.print_exc()
        pipe.send_bytes(f"an environment raised {error!r}".encode())


def kill(processes):
    for process in processes:
        process.kill()
        process.join()


def await_message(pipe):
    """The next message, or nothing if the main process has ended.

    A process that sleeps takes long to wake: poll for 2 ms before sleeping.
    """
    deadline = time.perf_counter() + 0.002
    while not pipe.poll() and time.perf_counter() < deadline:
        if hasattr(os, "sched_yield"):
            os.sched_yield()  # lets the other processes of this core run
    with suppress(EOFError, ConnectionError):
        return pipe.recv_bytes()


def reset_envs(envs: VectorEnv, args: Args, iteration: int) -> np.ndarray:
    """Start episodes, with all random generators seeded by (seed, iteration, rank).

    Each environment of each run has a seed of its own. (With seed + i for environment i, runs 1 and
    2 would share most of theirs.)
    """
    rng = np.random.default_rng([args.seed, iteration, RANK])
    torch.manual_seed(int(rng.integers(2**63)))
    np.random.seed(rng.integers(2**32))  # for environments that use the global generator
    return envs.reset(seed=rng.integers(2**31, size=args.num_envs).tolist())[0]


def join_ranks(args: Args) -> torch.device:
    """Meet the other processes of torchrun, if it started this one; returns the device."""
    if args.cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if "RANK" in os.environ:
        timeout = datetime.timedelta(seconds=args.rank_timeout)
        backend = "cpu:gloo,cuda:nccl" if args.cuda else "gloo"
        with connection_errors():
            dist.init_process_group(backend, timeout=timeout)
    return torch.device("cuda", LOCAL_RANK) if args.cuda else torch.device("cpu")


def all_sum(tensor):
    """Sum of the tensor over all ranks, in place. All ranks make the same calls in one order."""
    if dist.is_initialized():
        with connection_errors():
            dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Mean of the tensor over all ranks, in place."""
    return all_sum(tensor).div_(world_size())


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(tensor):
    """Tensors (num_steps, num_envs) of all ranks: (num_steps, num_envs * world size)."""
    gathered = torch.zeros(len(tensor), WORLD_SIZE, tensor.shape[1], device=tensor.device)
    gathered[:, RANK] = tensor
    return all_sum(gathered).flatten(1).to(tensor.dtype)


def rollout_of_all_ranks(rollout):
    """The rollout with rewards, terminations and truncations of all ranks, for the log."""
    names = ("rewards", "terminations", "truncations")
    return rollout._replace(**{name: all_gather(getattr(rollout, name)) for name in names})


@contextmanager
def connection_errors():
    """ConnectionError, in one sentence, if another rank is gone or silent."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RankError(f"another process of the run is gone or silent: {reason}") from None


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by `std`, zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


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
        """Add the observations (..., obs_dim) of all ranks to the moments (Chan et al. 1979)."""
        obs = obs.flatten(0, -2).double()
        sums = all_sum(torch.cat([obs.sum(0), obs.new_tensor([len(obs)])]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        total, delta = self.count + count, mean - self.mean
        squares = self.var * self.count + all_sum(((obs - mean) ** 2).sum(0))
        self.var = (squares + delta**2 * self.count * count / total) / total
        self.mean, self.count = self.mean + delta * count / total, total


class RewardScaler(ObservationNormalizer):
    """Divides rewards by the standard deviation of the discounted return, and clips (cont. 8, 9).

    Its moments are those of R_t = r_t + gamma R_{t-1}, which starts anew in each episode. Rewards
    are not shifted, which would change what is optimal.
    """

    def __init__(self):
        super().__init__(1)
        self.discounted = 0.0  # R of the running episodes, (num_envs,)

    def forward(self, rewards):
        return (rewards / (self.var + 1e-8).sqrt()).clamp(-10, 10).float()

    def update(self, rewards, dones, gamma):
        """Add rewards (num_steps, num_envs) to the moments."""
        history = []
        for reward, done in zip(rewards.double(), dones, strict=True):
            self.discounted = reward + gamma * self.discounted
            history.append(self.discounted)
            self.discounted = self.discounted.masked_fill(done, 0)
        super().update(torch.stack(history).unsqueeze(-1))


class Agent(nn.Module):
    """The policy pi(a|s) and the value function V(s), two heads on one body (detail 13).

    Observations are (..., obs_dim), raw; discrete actions (...), continuous ones (..., action_dim);
    log-probabilities, entropies, values (...). Continuous actions are stored as sampled; only
    `make_env` clips them to [-1, 1]. Not in the paper: `bound_mean`, if the bounds of all actions
    are -1 and 1, keeps means within them.
    """

    def __init__(
        self, obs_space, action_space, norm_obs=False, hidden_size=128, log_std_init=0.0,
        bound_mean=True,
    ):  # fmt: skip
        super().__init__()
        obs_dim, self.discrete = obs_space.shape[0], isinstance(action_space, Discrete)
        num_outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.normalize = ObservationNormalizer(obs_dim) if norm_obs else nn.Identity()
        self.scale_rewards = RewardScaler()
        first = layer_init(nn.Linear(obs_dim, hidden_size))
        second = layer_init(nn.Linear(hidden_size, hidden_size))
        self.body = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
        self.actor = nn.Sequential(layer_init(nn.Linear(hidden_size, num_outputs), std=0.01))
        self.critic = layer_init(nn.Linear(hidden_size, 1), std=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((num_outputs,), float(log_std_init)))  # cont. 2
            if bound_mean and np.all((action_space.low == -1) & (action_space.high == 1)):
                self.actor.append(nn.Tanh())

    def forward(self, obs):
        """pi(.|s), a torch.distributions.Distribution, and V(s)."""
        features = self.body(self.normalize(obs))
        output, value = self.actor(features), self.critic(features).squeeze(-1)
        # validate_args=False: validation would take longer than the network.
        if self.discrete:
            return Categorical(logits=output, validate_args=False), value
        # Independent normal distributions (cont. 1, 3).
        normal = Normal(output, self.log_std.exp().expand_as(output), validate_args=False)
        return Independent(normal, 1, validate_args=False), value

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
        if not obs[t].isfinite().all():
            raise NotFinite("an observation is not finite")
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


def update(agent, optimizer, rollout, advantages, returns, args):
    """`args.update_epochs` epochs of minibatch steps, each in a new order (detail 6).

    All ranks average their gradients, and so make the same steps.

    Returns the mean of each metric over the minibatches and ranks (explained_variance: of this
    rank), floats.
    """
    obs, actions, logprobs, values = (tensor.flatten(0, 1) for tensor in rollout[:4])
    advantages, returns = advantages.flatten(), returns.flatten()
    history = []
    for mb, mean, std in minibatches_and_moments(advantages, args):
        policy, new_values = agent(obs[mb])
        new_logprobs, mb_advantages = policy.log_prob(actions[mb]), advantages[mb]
        with torch.set_grad_enabled(args.ent_coef > 0):  # without a bonus it is only logged
            entropy = policy.entropy()
        if args.norm_adv:  # detail 7
            mb_advantages = (mb_advantages - mean) / (std + 1e-8)
        loss, metrics = ppo_loss(
            new_logprobs, logprobs[mb], mb_advantages, new_values, values[mb], returns[mb],
            entropy, args.clip_coef, args.vf_coef, args.ent_coef, args.clip_vloss)  # fmt: skip
        history.append(metrics)
        if args.target_kl is not None and all_mean(metrics["approx_kl"]) > 1.5 * args.target_kl:
            break  # before a step that would increase it
        optimizer.zero_grad()
        loss.backward()
        average_gradients(agent)
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # detail 11
        optimizer.step()

    history = {name: torch.stack([m[name] for m in history]) for name in metrics}
    means = {name: all_mean(metric.mean()).item() for name, metric in history.items()}
    means["explained_variance"] = 1 - ((returns - values).var() / (returns.var() + 1e-8)).item()
    return means


def average_gradients(agent):
    """Replace the gradients by their means over all ranks, by one all-reduce."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in agent.parameters()]
        vector = all_mean(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(vector, gradients)


def minibatches_and_moments(advantages, args):
    """Indices of the minibatches of all epochs; each epoch visits each transition once.

    With each come mean and standard deviation of its advantages over all ranks, by one all-reduce
    per epoch.
    """
    for _ in range(args.update_epochs):
        order = torch.randperm(len(advantages), device=advantages.device)
        batches = order.tensor_split(args.num_minibatches)
        parts = [advantages[mb].double() for mb in batches]
        sums = [torch.stack([part.sum(), (part**2).sum()]) for part in parts]
        counts = torch.tensor([len(part) * world_size() for part in parts], device=order.device)
        sums, squares = all_sum(torch.stack(sums)).T
        variances = (squares - sums**2 / counts) / (counts - 1)
        means, stds = (sums / counts).float(), variances.clamp(min=0).sqrt().float()
        yield from zip(batches, means, stds, strict=True)


def train(args: Args) -> dict | None:
    """PPO, Algorithm 1; returns the content of result.json, on rank 0.

    FloatingPointError if a number is not finite; ChildProcessError if a worker fails;
    ConnectionError if another rank does; SystemExit, with code 130 or 143, if SIGINT or SIGTERM
    ended the run. Unless it is killed, the state of its last whole iteration is saved.
    """
    torch.set_num_threads(1)  # faster than more for networks this small
    torch.manual_seed(args.seed)
    envs = make_vector_env(args)  # before connections and CUDA start, which workers would inherit
    device = join_ranks(args)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = Agent(*spaces, args.norm_obs, args.hidden_size, args.log_std_init, args.bound_mean)
    agent.to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # detail 3
    progress = start_progress(args, agent, optimizer)
    for parameter in agent.parameters():  # machines may round differently: begin with the mean
        all_mean(parameter.data)
    next_obs = reset_envs(envs, args, progress.iteration)
    batch_size = args.num_envs * args.num_steps * WORLD_SIZE
    total_steps = math.ceil(args.total_timesteps / batch_size) * batch_size

    opened = open_run(args, progress, total_steps) if RANK == 0 else nullcontext()
    with catch_signals() as stopped, closing(envs), opened as run:
        while not any_rank(stopped) and progress.global_step < total_steps:
            started = time.perf_counter()
            remaining = 1 - progress.global_step / total_steps if args.anneal_lr else 1.0
            for group in optimizer.param_groups:
                group["lr"] = remaining * args.learning_rate  # detail 4
            rollout, next_obs = collect_rollout(agent, envs, next_obs, args, device)
            rewards = rollout.rewards
            if args.norm_reward:
                dones = rollout.terminations | rollout.truncations
                agent.scale_rewards.update(rewards, dones, args.gamma)
                rewards = agent.scale_rewards(rewards)
            advantages, returns = compute_gae(
                rewards, rollout.values, rollout.next_values, rollout.terminations,
                rollout.truncations, args.gamma, args.gae_lambda)  # fmt: skip
            metrics = update(agent, optimizer, rollout, advantages, returns, args)
            check_finite(**rollout._asdict(), **metrics, **agent.state_dict())
            if args.norm_obs:
                agent.normalize.update(rollout.obs)
            progress.iteration += 1
            progress.global_step += batch_size
            progress.learning_seconds += time.perf_counter() - started
            everything = rollout_of_all_ranks(rollout)
            if RANK == 0:
                log_iteration(run, progress, everything, metrics, optimizer)
                run.checkpoint = snapshot(args, agent, optimizer, progress)
                if progress.iteration % args.checkpoint_interval == 0:
                    save_checkpoint(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped[0])
    return report(args, agent, run, progress, device) if RANK == 0 else None


def any_rank(stopped):
    """Whether any rank received SIGINT or SIGTERM, which then counts as received by this one."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    counts = all_sum(torch.tensor([stopped.count(number) for number in numbers]))
    if counts.any() and not stopped:
        stopped.append(numbers[0] if counts[0] else numbers[1])
    return bool(counts.any())


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


class WorkerError(ChildProcessError):
    """A worker process died, raised an error or gave no answer."""


class RankError(ConnectionError):
    """Another process of torchrun is gone or silent."""


class NotFinite(FloatingPointError):
    """A number that training cannot go on with."""


def refuse(condition, reason):
    if condition:
        raise BadInput(reason)


def check_args(args):
    """BadInput, which names the flag, if `args` cannot work. Resets and steps an environment."""
    at_least = {"seed": 0, "eval_episodes": 0, "max_grad_norm": 1e-8, "target_kl": 1e-8}
    at_least |= {"num_steps": 2 if args.num_envs == 1 else 1, "log_std_init": -20}
    at_least |= {"num_workers": 0, "step_timeout": 0.1, "rank_timeout": 0.1}
    at_most = {"gamma": 1, "gae_lambda": 1, "log_std_init": 20}
    at_most |= {"step_timeout": 1e6, "rank_timeout": 1e6}
    if not args.evaluate:
        at_most["num_minibatches"] = args.num_envs * args.num_steps // 2
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = at_least.get(name, 1 if type(getattr(Args, name)) is int else 0)
            high, flag = at_most.get(name, sys.maxsize), f"--{name.replace('_', '-')}"
            refuse(not low <= value <= high, f"{flag} must be from {low} to {high}, not {value}")
    refuse(args.cuda and LOCAL_SIZE > torch.cuda.device_count(), "--cuda needs a GPU per process")
    refuse(args.evaluate and WORLD_SIZE > 1, "--evaluate is for one process, without torchrun")
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
    usable = isinstance(env.action_space, Discrete) or is_real_vector(env.action_space)
    refuse(not usable, f"{flag}: {env.action_space} is not Discrete or a Box of real vectors")
    obs, _ = env.reset(seed=2**32 - 1)  # the largest seed of `evaluate`
    shapes = {obs.shape, env.step(env.action_space.sample())[0].shape}
    refuse(shapes != {env.observation_space.shape}, f"{flag}: observations {shapes} not in {space}")
    if RANK == 0 and env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: evaluation episodes end after 10,000 steps")
    if RANK == 0 and len(space.shape or ()) == 3:
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
    """FloatingPointError, on all ranks, if one of the tensors or floats is not finite on any."""
    bad = [n for n, number in numbers.items() if not torch.as_tensor(number).isfinite().all()]
    if all_sum(torch.tensor(len(bad))) > 0:
        raise NotFinite(f"not finite: {', '.join(bad[:3]) or 'numbers of another process'}")


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
        spaces = env.observation_space, env.action_space
        agent = Agent(*spaces, args.norm_obs, args.hidden_size, args.log_std_init, args.bound_mean)
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
        if "RANK" not in os.environ:  # torchrun itself sends each signal twice
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError):
            print("\nstopping after this iteration", flush=True)

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
            fixed = "env_id", "env_kwargs", "norm_obs", "norm_reward", "hidden_size", "bound_mean"
            for name in (*fixed, "log_std_init"):
                old, new = getattr(saved, name), getattr(args, name)
                refuse(old != new, f"--{name.replace('_', '-')} is {old} in {path}, not {new}")
        check_args(args)
        if args.evaluate:
            device = torch.device("cuda" if args.cuda else "cpu")
            play(agent.to(device), args, args.eval_episodes or 100, device)
        else:
            train(args)
    except (BadInput, NotFinite, WorkerError, RankError) as error:
        if LOCAL_RANK == 0 or not isinstance(error, BadInput):  # bad input: once per machine
            print("error:", *str(error).split(), *getattr(error, "__notes__", []), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except Exception as error:
        if RANK == 0 and not hasattr(error, "__notes__"):
            error.add_note(f"({args.env_id}, before or after training)")
        raise


if __name__ == "__main__":
    main()
