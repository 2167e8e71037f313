"""Training on a GPU does what training on a CPU does.

Each check also compares the CPU with itself, at another number of threads, which needs no GPU. The
checks are functions without fixtures: benchmark/gpu.py calls them where pytest is missing.
"""

import contextlib
import copy
import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cuda

NO_GPU = not torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU, reason="needs a GPU"))]
CPU = torch.device("cpu")
LEARNING_RATE = 1e-3
CUT = {"env_kwargs": ("max_episode_steps=5",)}  # so that a rollout holds truncations
SCRIPTS = {
    "ppo_discrete": CUT,
    "ppo_continuous": CUT | {"env_id": "Pendulum-v1"},
    "ppo_carracing_cnn": {"env_kwargs": ("max_episode_steps=20",)},  # frames, four an action
    "ppo_multienv": CUT | {"env_id": "CartPole-v1", "num_workers": 0},
}


def small_args(name, device, **changes):
    """The script, and the settings of one iteration of a single minibatch an epoch.

    The order of the transitions, which CPU and GPU draw differently, does not matter then.
    """
    script = importlib.import_module(name)
    args = script.Args(
        num_envs=2, num_steps=12, total_timesteps=24, num_minibatches=1, update_epochs=3,
        learning_rate=LEARNING_RATE, eval_episodes=0, cuda=device == "cuda", **SCRIPTS[name],
    )  # fmt: skip
    return script, dataclasses.replace(args, **changes)


@contextlib.contextmanager
def full_precision():
    """Convolutions on the GPU in float32; by default they are in TF32, of 10 bits."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_update(name, device):
    """A rollout is worth the same on both devices, and one update from it gives the same weights.

    The tolerance of a weight is a tenth of the learning rate, which is what a step of Adam changes
    it by.
    """
    script, args = small_args(name, device)
    envs = script.make_vector_env(args)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():  # away from the nearly uniform policy of the start
        for weight in agent.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    start, reference = copy.deepcopy(agent), copy.deepcopy(agent)
    agent.to(device)
    device = torch.device(device)
    with full_precision(), threads(3), contextlib.closing(envs):
        obs = script.reset_envs(envs, args, 0)
        rollout, _ = script.collect_rollout(agent, envs, obs, args, device)
    assert {tensor.device.type for tensor in rollout} == {device.type}
    on_cpu = type(rollout)(*(tensor.to(CPU, copy=True) for tensor in rollout))

    inside = ~(on_cpu.terminations | on_cpu.truncations)[:-1]
    assert on_cpu.truncations[:-1].any() and inside.any()
    equal = on_cpu.next_values[:-1] == on_cpu.values[1:]
    assert equal[inside].all() and not equal[on_cpu.truncations[:-1]].any()
    with threads(1), torch.no_grad():
        flat_obs, flat_actions = on_cpu.obs.flatten(0, 1), on_cpu.actions.flatten(0, 1)
        _, logprobs, _, values = reference.get_action_and_value(flat_obs, flat_actions)
    torch.testing.assert_close(on_cpu.logprobs.flatten(), logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(on_cpu.values.flatten(), values, rtol=1e-4, atol=1e-4)

    metrics = []
    for learner, its_rollout, number in ((agent, rollout, 3), (reference, on_cpu, 1)):
        _, _, _, values, rewards, next_values, terminations, truncations = its_rollout
        with full_precision(), threads(number):
            advantages, returns = script.compute_gae(
                rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
            )
            optimizer = torch.optim.Adam(learner.parameters(), LEARNING_RATE, eps=1e-5, fused=True)
            metrics.append(
                script.update(learner, optimizer, its_rollout, advantages, returns, args)
            )
    assert metrics[0].keys() == metrics[1].keys()
    for metric, value in metrics[1].items():
        np.testing.assert_allclose(metrics[0][metric], value, rtol=1e-3, atol=1e-4, err_msg=metric)
    before, expected, moved = start.state_dict(), reference.state_dict(), 0.0
    for key, weight in agent.state_dict().items():
        weight = weight.to(CPU)
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=LEARNING_RATE / 10)
        moved = max(moved, (weight - before[key]).abs().max().item())
    assert moved > LEARNING_RATE


def check_checkpoint(name, device, folder):
    """What was trained on one device plays, and continues to learn, on the other."""
    for first, second in sorted({(device, "cpu"), ("cpu", device)}):
        with contextlib.chdir(folder):
            script, args = small_args(name, first)
            path = Path(script.train(args)["run_dir"], "agent.pt").resolve()
            (trained, _), (agent, saved) = (script.load_agent(path, d) for d in (first, second))
            assert saved.cuda == (first == "cuda")
            assert {weight.device.type for weight in agent.parameters()} == {second}
            space = script.make_env(args).observation_space
            random = np.random.default_rng(0)
            obs = random.integers(256, size=(8, *space.shape)).astype(space.dtype)
            obs = torch.from_numpy(obs if space.dtype == np.uint8 else obs / 128 - 1)
            obs = obs if space.dtype == np.uint8 else obs.float()
            with full_precision(), torch.no_grad():
                with threads(3):
                    actions, *expected = trained.get_action_and_value(obs.to(first))
                with threads(1):
                    _, *outputs = agent.get_action_and_value(obs.to(second), actions.to(second))
            for output, value in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output.to(CPU), value.to(CPU), rtol=1e-4, atol=1e-4)
            args = dataclasses.replace(saved, cuda=second == "cuda")
            returns = script.evaluate(agent, args, 3, seed=1, device=torch.device(second))
            assert returns.shape == (3,) and np.isfinite(returns).all() and returns.any()

            resumed = dataclasses.replace(args, resume=path, total_timesteps=48)
            result = script.train(resumed)
            assert result["global_step"] == 48
            later, saved = script.load_agent(Path(result["run_dir"], "agent.pt"), "cpu")
            assert saved.cuda == (second == "cuda")
            same = [
                torch.equal(weight, other.to(CPU))
                for weight, other in zip(later.parameters(), agent.parameters(), strict=True)
            ]
            assert not all(same)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_update_is_the_same_on_both_devices(name, device):
    check_update(name, device)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint_moves_between_devices(name, device, tmp_path):
    check_checkpoint(name, device, tmp_path)


@pytest.mark.skipif(not NO_GPU, reason="needs a machine without a GPU")
def test_checkpoint_of_a_gpu_evaluates_without_one(tmp_path, monkeypatch):
    """By `--evaluate` alone, without `--no-cuda`."""
    monkeypatch.chdir(tmp_path)
    script, args = small_args("ppo_discrete", "cpu")
    path = Path(script.train(args)["run_dir"], "agent.pt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"]["cuda"] = True
    torch.save(checkpoint, path)
    flags = ["--evaluate", str(path), "--eval-episodes", "1"]
    monkeypatch.setattr("sys.argv", ["ppo_discrete.py", *flags])
    script.main()
