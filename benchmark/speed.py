"""Compare speed with Stable-Baselines3, in turns, on this machine; prints the ratios.

    pip install stable-baselines3
    python benchmark/speed.py

Every measurement is a process of its own, after a short warm-up in it, with one thread for PyTorch
(for these networks that is the faster setting for both). Ours is `learning_seconds`: rollouts and
updates, without TensorBoard; theirs is the time of `learn`, with no logger.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def ours(**changes):
    """Seconds of learning, and steps, of ppo_discrete.py."""
    sys.path.insert(0, str(ROOT))
    import ppo_discrete

    os.chdir(tempfile.mkdtemp())
    ppo_discrete.train(ppo_discrete.Args(total_timesteps=2000, eval_episodes=1, exp_name="warm-up"))
    result = ppo_discrete.train(ppo_discrete.Args(eval_episodes=1, **changes))
    return result["learning_seconds"], result["global_step"]


def theirs(num_envs, steps, **settings):
    """Seconds of learning, and steps, of Stable-Baselines3."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    PPO("MlpPolicy", make_vec_env("CartPole-v1", num_envs), device="cpu", **settings).learn(2000)
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", num_envs), device="cpu", **settings)
    started = time.perf_counter()
    model.learn(steps)
    return time.perf_counter() - started, model.num_timesteps


CLEANRL = dict(  # its ppo.py
    num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4, learning_rate=2.5e-4,
    gamma=0.99, gae_lambda=0.95, ent_coef=0.01, total_timesteps=100_000,
)  # fmt: skip
MEASUREMENTS = {
    "CartPole-v1 by the default command": lambda: ours(),
    "CartPole-v1 by SB3 with the rl-zoo recipe": lambda: theirs(
        8, 100_000, n_steps=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8,
        learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2,
    ),
    "CleanRL's hyper-parameters, ours": lambda: ours(**CLEANRL),
    "CleanRL's hyper-parameters, SB3": lambda: theirs(
        4, 100_000, n_steps=128, batch_size=128, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
    ),
}  # fmt: skip


def main():
    if importlib.util.find_spec("stable_baselines3") is None:
        sys.exit("this comparison needs Stable-Baselines3: pip install stable-baselines3")
    seconds = {name: [] for name in MEASUREMENTS}
    for _ in range(ROUNDS):
        for name in MEASUREMENTS:
            line = [sys.executable, __file__, name]
            output = subprocess.run(line, check=True, capture_output=True, text=True).stdout
            used, steps = json.loads(output.splitlines()[-1])
            seconds[name].append(used)
            print(f"{name:42} {used:6.1f} s {steps / used:8.0f} steps/s", flush=True)
    for a, b in zip(*[iter(MEASUREMENTS)] * 2, strict=True):
        ratios = sorted(their / our for our, their in zip(seconds[a], seconds[b], strict=True))
        print(
            f"{a}: {statistics.median(ratios):.2f} x as fast as SB3 "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {ROUNDS} rounds)"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(MEASUREMENTS[sys.argv[1]]()))
    else:
        main()
