"""How ppo_multienv.py scales over processes: measured for two, modelled for up to 64.

    python benchmark/scaling.py

Every rank has the environments and minibatches of the default command, so n ranks take n times the
steps an iteration (weak scaling), and the efficiency is the steps/s of n ranks over n times those
of one. Ranks step their environments themselves (`--num-workers 0`), one rank a core.

The model. An iteration of a rank is a rollout and K * M minibatches, and every minibatch ends in an
all-reduce of its gradient, which waits for the slowest rank:

    T(n) = (R + K M U) stragglers(n) + K M C(n)

R and U are the times of a rollout and of a minibatch's computation, K M the minibatches of an
iteration. C(n), the all-reduce, is a ring's: 2 (n - 1) messages one after the other, each of 1/n of
the gradient's G bytes, so C(n) = 2 (n - 1) (latency + G / (n bandwidth)). Of n times that vary with
a standard deviation of s, the longest is about s sqrt(2 ln n) above the mean. The rollout's s is
over iterations (episodes end, and environments differ in cost, at other times on every rank), and
the minibatches' over minibatches, as if each rank were slowed down independently.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ppo_multienv  # noqa: E402

ITERATIONS, ROUNDS = 8, 3
# Assumed for machines beside each other: a message's latency, seconds, and bytes a second.
NETWORKS = {"10 Gbit Ethernet": (30e-6, 1.25e9), "100 Gbit InfiniBand": (3e-6, 12.5e9)}


def train(num_ranks):
    """Seconds of learning, and steps, of some iterations with this many ranks."""
    args = ppo_multienv.Args()
    total = ITERATIONS * num_ranks * args.num_envs * args.num_steps
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    flags = ["--num-workers", "0", "--total-timesteps", str(total), "--eval-episodes", "0"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*launch, ROOT / "ppo_multienv.py", *flags],
            cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (path,) = Path(folder).glob("runs/*/result.json")
        result = json.loads(path.read_text())
    return result["learning_seconds"], result["global_step"]


def measure_parts():
    """Mean and deviation of the seconds of a rollout and of a minibatch, on one rank."""
    torch.set_num_threads(1)
    args = ppo_multienv.Args(num_workers=0)
    envs = ppo_multienv.make_vector_env(args)
    agent = ppo_multienv.Agent(
        envs.single_observation_space, envs.single_action_space, args.norm_obs, args.hidden_size
    )
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    obs = ppo_multienv.reset_envs(envs, args, 0)
    rollouts, minibatches = [], []
    # `update` calls this where a minibatch's gradient is ready.
    ppo_multienv.average_gradients = lambda agent: minibatches.append(time.perf_counter())
    for _ in range(ITERATIONS):
        started = time.perf_counter()
        rollout, obs = ppo_multienv.collect_rollout(agent, envs, obs, args, torch.device("cpu"))
        rollouts.append(time.perf_counter() - started)
        advantages, returns = ppo_multienv.compute_gae(
            rollout.rewards, rollout.values, rollout.next_values, rollout.terminations,
            rollout.truncations, args.gamma, args.gae_lambda,
        )  # fmt: skip
        ppo_multienv.update(agent, optimizer, rollout, advantages, returns, args)
    gaps = [b - a for a, b in itertools.pairwise(minibatches)]
    longest = 10 * statistics.median(gaps)
    gaps = [gap for gap in gaps if gap < longest]  # without those over a rollout
    envs.close()
    return {
        "rollout": [statistics.mean(rollouts[1:]), statistics.stdev(rollouts[1:])],
        "minibatch": [statistics.mean(gaps), statistics.stdev(gaps)],
        "gradient": 4 * sum(parameter.numel() for parameter in agent.parameters()),
        "per_iteration": args.update_epochs * args.num_minibatches,
    }


def measure_all_reduce(numel):
    """Median seconds of an all-reduce of so many floats between the ranks of this machine."""
    dist.init_process_group("gloo")
    tensor, seconds = torch.zeros(numel), []
    for _ in range(2000):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return statistics.median(seconds)


def model(parts, num_ranks, latency, bandwidth):
    """Seconds of an iteration: computing, waiting for the slowest, communicating."""
    (rollout, rollout_std), (minibatch, minibatch_std) = parts["rollout"], parts["minibatch"]
    count = parts["per_iteration"]
    late = math.sqrt(2 * math.log(num_ranks))
    message = latency + parts["gradient"] / num_ranks / bandwidth
    return (
        rollout + count * minibatch,
        late * (rollout_std + count * minibatch_std),
        count * 2 * (num_ranks - 1) * message,
    )


def main():
    print(f"{os.cpu_count()} cores, PyTorch {torch.__version__}")
    print("Measured, steps/s in turns, and efficiency:")
    for _ in range(ROUNDS):
        one, two = (steps / seconds for seconds, steps in (train(1), train(2)))
        print(
            f"  1 rank {one:6.0f}, 2 ranks {two:6.0f}, efficiency {two / one / 2:.2f}", flush=True
        )

    parts = measure_parts()
    for name in ("rollout", "minibatch"):
        mean, std = parts[name]
        print(f"{name}: {1000 * mean:.2f} ms ± {1000 * std:.2f}")
    print(f"{parts['per_iteration']} minibatches an iteration, gradient {parts['gradient']} bytes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    for numel in (1, parts["gradient"] // 4):
        seconds = float(subprocess.run(
            [*launch, str(numel)], check=True, stdout=subprocess.PIPE, text=True,
        ).stdout.split()[0])  # fmt: skip
        print(f"all-reduce of {4 * numel} bytes between 2 ranks here: {1e6 * seconds:.0f} us")

    for network, (latency, bandwidth) in NETWORKS.items():
        print(f"\nModel, {network}: {1e6 * latency:.0f} us, {bandwidth / 1e9:g} GB/s")
        print("ranks  computing  waiting  all-reduce  efficiency  of one rank's steps/s")
        for num_ranks in (1, 2, 4, 8, 16, 32, 64):
            times = model(parts, num_ranks, latency, bandwidth)
            efficiency = times[0] / sum(times)
            columns = "".join(f"{seconds:9.2f} s" for seconds in times)
            print(f"{num_ranks:5}{columns}{efficiency:11.2f}{num_ranks * efficiency:20.1f} x")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        seconds = measure_all_reduce(int(sys.argv[1]))
        if os.environ["RANK"] == "0":
            print(seconds)
    else:
        main()
