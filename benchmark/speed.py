"""Compare speed with Stable-Baselines3 and Gymnasium on this machine; prints the ratios.

    pip install stable-baselines3
    python benchmark/speed.py                           # all comparisons
    python benchmark/speed.py bipedalwalker --rounds 3  # one of them

In each round both sides are measured one after the other, each in a process of its own after a
short warm-up. Our time is `learning_seconds`, of rollouts and updates without logs and checkpoints;
that of Stable-Baselines3 (SB3) is the time of `learn` without a logger. For the small networks
PyTorch has one thread, which is the faster setting for both; for CarRacing both have PyTorch's
default. SB3's environments are in its own process, except for CarRacing's.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def ours(script, warm_up=2000, **settings):
    """Seconds of learning, and steps, of one of our scripts."""
    script = importlib.import_module(script)
    os.chdir(tempfile.mkdtemp())
    settings["eval_episodes"] = 0
    script.train(script.Args(**settings | {"total_timesteps": warm_up}))
    result = script.train(script.Args(**settings))
    return result["learning_seconds"], result["global_step"]


def theirs(policy, make, num_envs, steps, warm_up=2000, threads=1, stack=0, **settings):
    """Seconds of learning, and steps, of Stable-Baselines3; `make` makes an environment."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import (
        DummyVecEnv,
        SubprocVecEnv,
        VecFrameStack,
        VecNormalize,
    )

    if threads:
        torch.set_num_threads(threads)
    vec_env = SubprocVecEnv if settings.pop("processes", False) else DummyVecEnv
    normalize = settings.pop("normalize", False)

    def model():
        envs = vec_env([lambda: Monitor(make())] * num_envs)
        envs = VecFrameStack(envs, stack) if stack else envs
        envs = VecNormalize(envs, gamma=settings["gamma"]) if normalize else envs
        return PPO(policy, envs, device="cpu", **settings)

    model().learn(warm_up)
    measured = model()
    started = time.perf_counter()
    measured.learn(steps)
    return time.perf_counter() - started, measured.num_timesteps


class RepeatAction(gym.Wrapper):
    """Holds each action for four frames, as ours does."""

    def step(self, action):
        total = 0.0
        for _ in range(4):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_carracing():
    env = RepeatAction(gym.make("CarRacing-v3"))
    return gym.wrappers.GrayscaleObservation(env, keep_dim=True)


def frames(lazy):
    """Seconds, and frames, of CarRacing drawn at every step, on the road."""
    from gymnasium.envs.box2d.car_racing import CarRacing

    from ppo_carracing_cnn import LazyCarRacing

    env = (LazyCarRacing if lazy else CarRacing)()
    env.reset(seed=1)
    seconds, count = 0.0, 300
    for i in range(60 + count):  # the first 50 frames zoom in
        started = time.perf_counter()
        env.step(np.array([0.0, 0.02, 0.0]))
        seconds += time.perf_counter() - started if i >= 60 else 0
    return seconds, count


def environments(env_id, kind):
    """Seconds, and steps, of 32 environments alone under random actions."""
    import ppo_multienv

    args = ppo_multienv.Args(env_id=env_id, num_workers=2 if kind == "workers" else 0)
    if kind == "async":
        make = partial(ppo_multienv.make_env, args)
        mode = gym.vector.AutoresetMode.SAME_STEP
        envs = gym.vector.AsyncVectorEnv([make] * args.num_envs, autoreset_mode=mode)
    else:
        envs = ppo_multienv.make_vector_env(args)
    envs.reset(seed=list(range(args.num_envs)))
    space = gym.vector.utils.batch_space(envs.single_action_space, args.num_envs)
    space.seed(1)
    actions = [space.sample() for _ in range(300)]
    for action in actions[:50]:
        envs.step(action)
    started = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = time.perf_counter() - started
    envs.close()
    return seconds, len(actions) * args.num_envs


def ranks(number):
    """Seconds of learning, and steps, of ppo_multienv.py in this many processes of torchrun."""
    from scaling import train

    return train(number)


def their_bipedalwalker():
    """Some of the rl-zoo recipe's 5 million steps."""
    return theirs(
        "MlpPolicy", lambda: gym.make("BipedalWalker-v3"), 32, 131_072, warm_up=65_536,
        n_steps=2048, batch_size=64, n_epochs=10, gamma=0.999, gae_lambda=0.95,
        learning_rate=3e-4, clip_range=0.18, normalize=True,
    )  # fmt: skip


def their_lunarlander():
    """Some of the rl-zoo recipe's million steps."""
    return theirs(
        "MlpPolicy", lambda: gym.make("LunarLander-v3"), 16, 131_072, warm_up=16_384,
        n_steps=1024, batch_size=64, n_epochs=4, gamma=0.999, gae_lambda=0.98, ent_coef=0.01,
    )  # fmt: skip


CLEANRL = dict(  # its ppo.py
    num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4, learning_rate=2.5e-4,
    gamma=0.99, gae_lambda=0.95, ent_coef=0.01, total_timesteps=100_000,
)  # fmt: skip

# name: description, and the two sides, first against second
COMPARISONS = {
    # equal hyper-parameters
    "cleanrl": (
        "CartPole-v1 with CleanRL's hyper-parameters",
        {
            "ppo_discrete.py": lambda: ours("ppo_discrete", **CLEANRL),
            "SB3": lambda: theirs(
                "MlpPolicy", lambda: gym.make("CartPole-v1"), 4, 100_000, n_steps=128,
                batch_size=128, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
            ),
        },
    ),
    "bipedalwalker": (
        "BipedalWalker-v3 with the rl-zoo's hyper-parameters, one core each",
        {
            "ppo_continuous.py": lambda: ours(
                "ppo_continuous", num_envs=32, num_steps=2048, num_minibatches=1024,
                update_epochs=10, gamma=0.999, gae_lambda=0.95, learning_rate=3e-4, clip_coef=0.18,
                ent_coef=0.0, total_timesteps=131_072, warm_up=1,
            ),
            "SB3": their_bipedalwalker,
        },
    ),
    "lunarlander": (
        "LunarLander-v3 with the rl-zoo's hyper-parameters",
        {
            "ppo_multienv.py": lambda: ours(
                "ppo_multienv", num_envs=16, num_steps=1024, num_minibatches=256, update_epochs=4,
                learning_rate=3e-4, total_timesteps=131_072, warm_up=1,
            ),
            "SB3": their_lunarlander,
        },
    ),
    "carracing": (
        "CarRacing-v3: actions, with 8 x 128, batch 256, 4 epochs",
        {
            "ppo_carracing_cnn.py": lambda: ours(
                "ppo_carracing_cnn", num_steps=128, num_minibatches=4, update_epochs=4,
                total_timesteps=4096, warm_up=1024,
            ),
            "SB3": lambda: theirs(
                "CnnPolicy", make_carracing, 8, 2048, warm_up=1024, threads=0, stack=4,
                processes=True, n_steps=128, batch_size=256, n_epochs=4, gamma=0.99,
            ),
        },
    ),
    # default commands
    "cartpole": (
        "CartPole-v1",
        {
            "ppo_discrete.py, default command": lambda: ours("ppo_discrete"),
            "SB3, rl-zoo recipe": lambda: theirs(
                "MlpPolicy", lambda: gym.make("CartPole-v1"), 8, 100_000, n_steps=32,
                batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8,
                learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2,
            ),
        },
    ),
    "bipedalwalker-default": (
        "BipedalWalker-v3, one core each",
        {
            "ppo_continuous.py, default command": lambda: ours(
                "ppo_continuous", total_timesteps=131_072
            ),
            "SB3, rl-zoo recipe": their_bipedalwalker,
        },
    ),
    "lunarlander-default": (
        "LunarLander-v3",
        {
            "ppo_multienv.py, default command": lambda: ours("ppo_multienv"),
            "SB3, rl-zoo recipe": their_lunarlander,
        },
    ),
    # parts
    **{
        f"{name.lower()}-{kind}": (
            f"{name}-v3: 32 environments alone",
            {
                "ppo_multienv.py, 2 workers": partial(environments, f"{name}-v3", "workers"),
                f"{kind.title()}VectorEnv": partial(environments, f"{name}-v3", kind),
            },
        )
        for name in ("LunarLander", "BipedalWalker")
        for kind in ("sync", "async")
    },
    "ranks": (
        "LunarLander-v3: default command of ppo_multienv.py with --num-workers 0",
        {"2 processes of torchrun": lambda: ranks(2), "1 process": lambda: ranks(1)},
    ),
    "carracing-frame": (
        "CarRacing-v3: a drawn frame",
        {"LazyCarRacing": lambda: frames(lazy=True), "CarRacing": lambda: frames(lazy=False)},
    ),
}  # fmt: skip


def compare(name, rounds):
    """Measure both sides in turns; print each figure, and the median ratio with its range."""
    description, sides = COMPARISONS[name]
    print(f"{name}: {description}", flush=True)
    seconds_per_step = {side: [] for side in sides}
    for _ in range(rounds):
        for side, figures in seconds_per_step.items():
            line = [sys.executable, __file__, name, "--side", side]
            output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds, steps = json.loads(output.splitlines()[-1])
            figures.append(seconds / steps)
            print(f"  {side:34} {seconds:7.2f} s {steps / seconds:8.0f} steps/s", flush=True)
    ratios = sorted(b / a for a, b in zip(*seconds_per_step.values(), strict=True))
    print(
        f"  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in "
        f"{rounds} rounds)\n",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="comparison", help=", ".join(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # measure it in this process
    args = parser.parse_args()
    if unknown := set(args.names) - set(COMPARISONS):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    if importlib.util.find_spec("stable_baselines3") is None:
        parser.error("these comparisons need Stable-Baselines3: pip install stable-baselines3")
    if args.side:
        print(json.dumps(COMPARISONS[args.names[0]][1][args.side]()))
    else:
        for each in args.names or COMPARISONS:
            compare(each, args.rounds)
