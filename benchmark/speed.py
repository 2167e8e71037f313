"""Compare speed with Stable-Baselines3, in turns, on this machine; prints the ratios.

    pip install stable-baselines3
    python benchmark/speed.py                  # all comparisons
    python benchmark/speed.py bipedalwalker    # one of them

Every measurement is a process of its own, after a short warm-up in it. Ours is `learning_seconds`:
rollouts and updates, without TensorBoard; theirs is the time of `learn`, with no logger. For the
small networks PyTorch has one thread, which is the faster setting for both; for CarRacing both
have what PyTorch takes.
"""

import functools
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def ours(script, warm_up=2000, **settings):
    """Seconds of learning, and steps, of one of our scripts."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(script)
    os.chdir(tempfile.mkdtemp())
    script.report = lambda *args: {"eval_returns": []}  # no evaluation
    logs, close = [], script.RunLog.close
    script.RunLog.close = lambda log: (logs.append(log), close(log))
    total = settings.pop("total_timesteps", script.Args.total_timesteps)
    for steps in (warm_up, total):
        script.train(script.Args(total_timesteps=steps, **settings))
    return logs[-1].progress.learning_seconds, logs[-1].progress.global_step


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
    sys.path.insert(0, str(ROOT))
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
    sys.path.insert(0, str(ROOT))
    import ppo_multienv

    args = ppo_multienv.Args(env_ids=(env_id,), num_workers=2 if kind == "workers" else 0)
    if kind == "async":
        make = functools.partial(ppo_multienv.make_env, args)
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

# name: description, ours, theirs
COMPARISONS = {
    "cartpole": (
        "CartPole-v1: our default command, SB3 with the rl-zoo recipe",
        lambda: ours("ppo_discrete"),
        lambda: theirs(
            "MlpPolicy", lambda: gym.make("CartPole-v1"), 8, 100_000, n_steps=32, batch_size=256,
            n_epochs=20, gamma=0.98, gae_lambda=0.8,
            learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2,
        ),
    ),
    "cleanrl": (
        "CartPole-v1: both with CleanRL's hyper-parameters",
        lambda: ours("ppo_discrete", **CLEANRL),
        lambda: theirs(
            "MlpPolicy", lambda: gym.make("CartPole-v1"), 4, 100_000, n_steps=128, batch_size=128,
            n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
        ),
    ),
    "bipedalwalker": (
        "BipedalWalker-v3: both with the rl-zoo's hyper-parameters",
        lambda: ours(
            "ppo_continuous", num_envs=32, num_steps=2048, num_minibatches=1024, update_epochs=10,
            gamma=0.999, gae_lambda=0.95, learning_rate=3e-4, clip_coef=0.18, ent_coef=0.0,
            total_timesteps=131_072, warm_up=1,
        ),
        their_bipedalwalker,
    ),
    "bipedalwalker-default": (
        "BipedalWalker-v3: our default command, SB3 with the rl-zoo recipe",
        lambda: ours("ppo_continuous", total_timesteps=131_072),
        their_bipedalwalker,
    ),
    "lunarlander": (
        "LunarLander-v3: ppo_multienv.py and SB3, both with the rl-zoo's hyper-parameters",
        lambda: ours(
            "ppo_multienv", num_envs=16, num_steps=1024, num_minibatches=256, update_epochs=4,
            learning_rate=3e-4, total_timesteps=131_072, warm_up=1,
        ),
        their_lunarlander,
    ),
    "lunarlander-default": (
        "LunarLander-v3: the default command of ppo_multienv.py, SB3 with the rl-zoo recipe",
        lambda: ours("ppo_multienv"),
        their_lunarlander,
    ),
    **{
        f"{name.lower()}-{kind}": (
            f"{name}-v3: 32 environments alone, ours in 2 workers, Gymnasium's {kind}",
            functools.partial(environments, f"{name}-v3", "workers"),
            functools.partial(environments, f"{name}-v3", kind),
        )
        for name in ("LunarLander", "BipedalWalker")
        for kind in ("sync", "async")
    },
    "carracing": (
        "CarRacing-v3: decisions, both with 8 x 128, batch 256, 4 epochs",
        lambda: ours(
            "ppo_carracing_cnn", num_steps=128, num_minibatches=4, update_epochs=4,
            total_timesteps=4096, warm_up=1024,
        ),
        lambda: theirs(
            "CnnPolicy", make_carracing, 8, 2048, warm_up=1024, threads=0, stack=4, processes=True,
            n_steps=128, batch_size=256, n_epochs=4, gamma=0.99,
        ),
    ),
    "carracing-frame": (
        "CarRacing-v3: a drawn frame, ours and Gymnasium's",
        lambda: frames(lazy=True),
        lambda: frames(lazy=False),
    ),
}  # fmt: skip


def compare(name):
    """Measure both sides in turns; print each figure, and the median ratio with its range."""
    description, *_ = COMPARISONS[name]
    print(description, flush=True)
    seconds_a_step = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        for side, figures in seconds_a_step.items():
            line = [sys.executable, __file__, name, side]
            output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
            used, steps = json.loads(output.splitlines()[-1])
            figures.append(used / steps)
            print(f"  {side:6} {used:7.2f} s {steps / used:8.0f} steps/s", flush=True)
    ratios = sorted(b / a for a, b in zip(*seconds_a_step.values(), strict=True))
    print(
        f"  ours is {statistics.median(ratios):.2f} x as fast ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f} in {ROUNDS} rounds)",
        flush=True,
    )


if __name__ == "__main__":
    names = sys.argv[1:] or list(COMPARISONS)
    if sys.argv[2:] in (["ours"], ["theirs"]):
        print(json.dumps(COMPARISONS[names[0]][1 + (sys.argv[2] == "theirs")]()))
    elif importlib.util.find_spec("stable_baselines3") is None:
        sys.exit("this comparison needs Stable-Baselines3: pip install stable-baselines3")
    elif set(names) <= set(COMPARISONS):
        for each in names:
            compare(each)
    else:
        sys.exit(f"usage: python benchmark/speed.py [{' | '.join(COMPARISONS)}]...")
