"""Train Stable-Baselines3's PPO by rl-baselines3-zoo's recipes; play its agents as ours are played.

    pip install stable-baselines3
    python benchmark/sb3.py CartPole-v1                   # train seeds 1 to 5; MuJoCo: 1 to 3
    python benchmark/sb3.py BipedalWalker-v3 --seeds 2 3  # or these; the others' records stay

The recipes are those of rl_zoo3 2.9.2 (hyperparams/ppo.yml), with all their steps; for MuJoCo its
default, which is SB3's own settings with `normalize: true`. The agents are evaluated by our
script's `evaluate`: deterministic actions, the very episodes that our agents of the same seed play.
`benchmark/<row>/sb3.json` holds what came out; `python benchmark/run.py` puts it beside ours.
Seconds are those of `learn`, on a CPU, PyTorch with one thread, without a logger.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import gymnasium as gym
import stable_baselines3
import torch
from run import MUJOCO, ROWS, THREE, thin
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

LUNAR_LANDER = dict(
    n_envs=16, timesteps=1_000_000, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999,
    n_epochs=4, ent_coef=0.01,
)  # fmt: skip

# name of the row: our script, the environment's id, the recipe
RECIPES = {
    "CartPole-v1": (
        "ppo_discrete", "CartPole-v1",
        dict(
            n_envs=8, timesteps=100_000, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
            n_epochs=20, ent_coef=0.0, learning_rate=lambda left: left * 1e-3,
            clip_range=lambda left: left * 0.2,
        ),
    ),
    "Acrobot-v1": (
        "ppo_discrete", "Acrobot-v1",
        dict(
            normalize=True, n_envs=16, timesteps=1_000_000, n_steps=256, gae_lambda=0.94,
            gamma=0.99, n_epochs=4, ent_coef=0.0,
        ),
    ),
    "MountainCar-v0": (
        "ppo_discrete", "MountainCar-v0",
        dict(
            normalize=True, n_envs=16, timesteps=1_000_000, n_steps=16, gae_lambda=0.98,
            gamma=0.99, n_epochs=4, ent_coef=0.0,
        ),
    ),
    "LunarLander-v3": ("ppo_discrete", "LunarLander-v3", LUNAR_LANDER),
    "Pendulum-v1": (
        "ppo_continuous", "Pendulum-v1",
        dict(
            n_envs=4, timesteps=100_000, n_steps=1024, gae_lambda=0.95, gamma=0.9, n_epochs=10,
            ent_coef=0.0, learning_rate=1e-3, clip_range=0.2, use_sde=True, sde_sample_freq=4,
        ),
    ),
    "MountainCarContinuous-v0": (
        "ppo_continuous", "MountainCarContinuous-v0",
        dict(
            normalize=True, n_envs=1, timesteps=20_000, batch_size=256, n_steps=8, gamma=0.9999,
            learning_rate=7.77e-5, ent_coef=0.00429, clip_range=0.1, n_epochs=10, gae_lambda=0.9,
            max_grad_norm=5, vf_coef=0.19, use_sde=True,
            policy_kwargs=dict(log_std_init=-3.29, ortho_init=False),
        ),
    ),
    "LunarLanderContinuous-v3": (
        "ppo_continuous", "LunarLanderContinuous-v3", LUNAR_LANDER,
    ),
    "BipedalWalker-v3": (
        "ppo_continuous", "BipedalWalker-v3",
        dict(
            normalize=True, n_envs=32, timesteps=5_000_000, n_steps=2048, batch_size=64,
            gae_lambda=0.95, gamma=0.999, n_epochs=10, ent_coef=0.0, learning_rate=3e-4,
            clip_range=0.18,
        ),
    ),
}  # fmt: skip
for task in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"):
    defaults = dict(normalize=True, n_envs=1, timesteps=1_000_000, gamma=0.99)
    RECIPES[task] = ("ppo_continuous", task, defaults)


class Player:
    """SB3's agent, for our `evaluate`."""

    def __init__(self, model):
        self.model, self.normalizer = model, model.get_vec_normalize_env()

    def get_deterministic_action(self, obs):
        obs = obs.numpy()
        obs = self.normalizer.normalize_obs(obs) if self.normalizer else obs
        actions, _ = self.model.predict(obs, deterministic=True)
        if isinstance(self.model.action_space, gym.spaces.Box):
            actions = self.model.policy.scale_action(actions)  # to -1 and 1, as our scripts count
        return torch.as_tensor(actions)


class Curve(BaseCallback):
    """The mean return of the last 100 episodes, after each rollout."""

    def __init__(self):
        super().__init__()
        self.points, self.started = {"step": [], "seconds": [], "episodic_return": []}, 0.0

    def _on_training_start(self):
        self.started = time.perf_counter()

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        self.points["step"].append(self.num_timesteps)
        self.points["seconds"].append(time.perf_counter() - self.started)
        self.points["episodic_return"].append(sum(returns) / len(returns) if returns else None)


def train(name, seed):
    """Train and evaluate one seed; what there is to record of it."""
    script, env_id, recipe = RECIPES[name]
    recipe = dict(recipe)
    n_envs, timesteps = recipe.pop("n_envs"), recipe.pop("timesteps")
    envs = DummyVecEnv([lambda: Monitor(gym.make(env_id))] * n_envs)
    if recipe.pop("normalize", False):
        envs = VecNormalize(envs, gamma=recipe["gamma"])
    model, curve = PPO("MlpPolicy", envs, seed=seed, device="cpu", **recipe), Curve()
    started = time.perf_counter()
    model.learn(timesteps, callback=curve)
    seconds = time.perf_counter() - started
    script = importlib.import_module(script)
    args = script.Args(env_id=env_id)
    returns = script.evaluate(Player(model), args, 100, seed, torch.device("cpu"))
    return {
        "seed": seed,
        "global_step": model.num_timesteps,
        "learning_seconds": seconds,
        "eval_mean": returns.mean(),
        "eval_std": returns.std(),
        "eval_returns": returns.tolist(),
        "curve": thin(curve.points),
        "versions": {m.__name__: m.__version__ for m in (stable_baselines3, torch, gym)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="+", metavar="row", choices=RECIPES, help=", ".join(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the row's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in args.rows:
        path = ROOT / "benchmark" / row / "sb3.json"
        for seed in args.seeds or (THREE if row in MUJOCO else ROWS[row][0]):
            result = train(row, seed)
            print(
                "{seed}: {eval_mean:.1f} ± {eval_std:.1f} after {global_step:,} steps, "
                "{learning_seconds:.0f} s".format(**result),
                flush=True,
            )
            path.parent.mkdir(exist_ok=True)
            results = json.loads(path.read_text()) if path.exists() else []
            others = [other for other in results if other["seed"] != seed]
            results = sorted([*others, result], key=lambda each: each["seed"])
            path.write_text(json.dumps(results) + "\n")
