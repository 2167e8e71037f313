"""ppo_multienv.py under torchrun: one run, equal weights on all ranks, one end for all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load
from gymnasium.spaces import Box, Discrete

import ppo_multienv

SMALL = (
    "--env-id", "CartPole-v1", "--num-envs", "4", "--num-steps", "16", "--total-timesteps", "1024",
    "--num-minibatches", "4", "--update-epochs", "2", "--num-workers", "1", "--eval-episodes", "2",
    "--learning-rate", "0.01", "--checkpoint-interval", "1",
)  # fmt: skip
ENDLESS = (*SMALL, "--total-timesteps", "100000000")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture
def torchrun(in_tmp):
    """Starts a command in so many ranks; the test's end kills it."""
    started = []

    def torchrun(ranks, *command):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        process = subprocess.Popen(
            [*launcher, "--master-port", str(free_port()), *map(str, command)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield torchrun
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture
def run_ranks(start_script):
    """Runs a command in so many ranks, as torchrun would: each one's exit code and output."""

    def run_ranks(ranks, *command):
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        runs = [
            start_script(*command, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(ranks)
        ]
        return list(zip(*(run.communicate(120) for run in runs), strict=True))

    return run_ranks


SPY = """
import hashlib, json, os, torch
import ppo_multienv

hashes, seeds, metrics, step = [], [], [], torch.optim.Adam.step
reset, update = ppo_multienv.WorkerVectorEnv.reset, ppo_multienv.update

def spying_update(agent, *args):
    if not metrics:
        torch.save(agent.state_dict(), f"start{os.environ['RANK']}.pt")
    metrics.append(update(agent, *args))
    return metrics[-1]

def spying_step(optimizer, *args):
    result = step(optimizer, *args)
    weights = torch.cat([w.detach().flatten() for w in optimizer.param_groups[0]["params"]])
    hashes.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    return result

def spying_reset(envs, *, seed, options=None):
    seeds.extend(seed)
    return reset(envs, seed=seed)

torch.optim.Adam.step = spying_step
ppo_multienv.WorkerVectorEnv.reset = spying_reset
ppo_multienv.update = spying_update
try:
    ppo_multienv.main()
finally:
    with open(f"rank{os.environ['RANK']}.json", "w") as file:
        json.dump({"hashes": hashes, "seeds": seeds[:4], "metrics": metrics}, file)
"""


def test_weights_are_equal_on_all_ranks_after_every_step(in_tmp, run_ranks):
    """One KL stop stops all."""
    Path("spy.py").write_text(SPY)
    flags = ("--norm-reward", "--target-kl", "0.0005")
    codes, outputs, errors = run_ranks(2, "spy.py", *SMALL, *flags)
    assert codes == (0, 0), errors
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["hashes"] == second["hashes"]
    assert 8 <= len(set(first["hashes"])) == len(first["hashes"]) < 8 * 8
    for own, others in zip(first["metrics"], second["metrics"], strict=True):
        assert own.pop("explained_variance") != others.pop("explained_variance")
        assert own == others, "means over all ranks"
    torch.manual_seed(1)
    spaces = Box(-9, 9, (4,)), Discrete(2)
    started = load("start0.pt")
    for name, weight in ppo_multienv.Agent(*spaces, norm_obs=True).named_parameters():
        torch.testing.assert_close(started[name], weight.detach(), msg=name)
    assert not set(first["seeds"]) & set(second["seeds"]), "ranks share no environments"
    assert "run folder" in outputs[0] and "trained agent" in outputs[0] and not outputs[1]
    (path,) = in_tmp.glob("runs/*/agent.pt")
    checkpoint = load(path)
    assert checkpoint["progress"]["global_step"] == 1024
    assert checkpoint["agent"]["normalize.count"] == 1024, "the moments are of all ranks' steps"
    assert checkpoint["agent"]["scale_rewards.count"] == 1024
    episodes = checkpoint["progress"]["episodes"]
    assert all(total == length for _, total, length in episodes), "as CartPole pays"
    assert {(step - 1) % 8 for step, *_ in episodes} == set(range(8)), "of all environments"
    assert len({step for step, *_ in episodes}) == len(episodes) > 20


COMPARE = """
import types
import torch
import torch.distributed as dist
import ppo_multienv

args = ppo_multienv.Args(num_minibatches=3, update_epochs=2)
ppo_multienv.join_ranks(args)
rank = dist.get_rank()
torch.manual_seed(rank)

def both(tensor):
    parts = [torch.zeros_like(tensor), torch.zeros_like(tensor)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)

normalizer, history = ppo_multienv.ObservationNormalizer(3), []
for steps in (5, 7):
    obs = torch.randn(steps, 4, 3) * (1 + rank) + 100 * rank
    normalizer.update(obs)
    history.append(both(obs.flatten(0, 1)))
everything = torch.cat(history).double()
torch.testing.assert_close(normalizer.mean, everything.mean(0), rtol=1e-12, atol=0)
torch.testing.assert_close(normalizer.var, everything.var(0, correction=0), rtol=1e-9, atol=0)
assert normalizer.count == len(everything) == 96

ppo_multienv.WORLD_SIZE = 1  # what it is if something else than torchrun starts the processes
model = torch.nn.Linear(2, 2)
for weight in model.parameters():
    weight.grad = torch.randn_like(weight)
expected = [both(w.grad.unsqueeze(0)).mean(0) for w in model.parameters()]
ppo_multienv.average_gradients(model)
for weight, gradient in zip(model.parameters(), expected):
    torch.testing.assert_close(weight.grad, gradient)

advantages = torch.randn(30) * (1 + rank) + 5 * rank
for batch, mean, std in ppo_multienv.minibatches_and_moments(advantages, args):
    everything = both(advantages[batch])
    assert len(everything) == 20
    torch.testing.assert_close(mean, everything.mean())
    torch.testing.assert_close(std, everything.std())

ppo_multienv.WORLD_SIZE = 2
rewards = torch.randn(5, 3)
gathered = ppo_multienv.all_gather(rewards)
assert torch.equal(gathered, both(rewards.unsqueeze(0)).transpose(0, 1).flatten(1))
dist.destroy_process_group()
"""


def test_statistics_and_gradients_are_those_of_all_ranks(in_tmp, run_ranks):
    Path("compare.py").write_text(COMPARE)
    codes, _, errors = run_ranks(2, "compare.py")
    assert codes == (0, 0), errors


def children_of(pid):
    command = ["ps", "--ppid", str(pid), "-o", "pid="]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


def wait_until(condition, process=None):
    for _ in range(600):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("not within a minute")


@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_death_of_one_ends_all(in_tmp, torchrun, victim):
    process = torchrun(2, ROOT / "ppo_multienv.py", *ENDLESS)
    wait_until(lambda: list(in_tmp.glob("runs/*/agent.pt")), process)
    ranks = children_of(process.pid)
    workers = [worker for rank in ranks for worker in children_of(rank)]
    assert len(ranks) == 2 and len(workers) >= 2
    os.kill(ranks[1] if victim == "rank" else workers[-1], signal.SIGKILL)
    code, _, errors = finish(process)
    assert code != 0
    sentences = re.findall(r"error: .*", errors)
    if victim == "worker":
        assert "error: the process of an environment died" in sentences
    assert sentences and all("process" in sentence for sentence in sentences)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in (*ranks, *workers)))
    (path,) = in_tmp.glob("runs/*/agent.pt")
    ppo_multienv.load_agent(path, "cpu")


@pytest.mark.parametrize("target", ["torchrun", "one rank"])
def test_signal_saves(in_tmp, torchrun, target):
    process = torchrun(2, ROOT / "ppo_multienv.py", *ENDLESS, "--checkpoint-interval", "1000000")
    wait_until(lambda: list(in_tmp.glob("runs/*/events*")), process)
    time.sleep(1)
    ranks = children_of(process.pid)
    os.kill(process.pid if target == "torchrun" else ranks[1], signal.SIGTERM)
    code, output, errors = finish(process)
    assert code != 0 and "--resume" in output, errors
    assert "gone or silent" not in errors
    (path,) = in_tmp.glob("runs/*/agent.pt")
    ppo_multienv.load_agent(path, "cpu")


def test_rank_that_never_arrives_is_told(in_tmp, start_script):
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    command = ROOT / "ppo_multienv.py", *SMALL, "--rank-timeout", "2"
    code, _, errors = start_script(*command, **lonely, MASTER_PORT=str(free_port())).communicate()
    last = errors.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: another process of the run is gone")


def test_not_a_number_on_one_rank_stops_all(in_tmp, run_ranks):
    Path("poison.py").write_text(
        "import os, torch, ppo_multienv\n"
        "collect = ppo_multienv.collect_rollout\n"
        "def poisoned(*args):\n"
        "    rollout, obs = collect(*args)\n"
        "    if os.environ['RANK'] == '1':\n"
        "        rollout.rewards[3] = torch.nan\n"
        "    return rollout, obs\n"
        "ppo_multienv.collect_rollout = poisoned\n"
        "ppo_multienv.main()\n"
    )
    codes, _, errors = run_ranks(2, "poison.py", *SMALL)
    assert codes == (1, 1)
    assert "error: not finite" in errors[0] and "error: not finite: rewards" in errors[1], errors
    assert not list(in_tmp.glob("runs/*/agent.pt"))


def test_one_rank_equals_no_torchrun(in_tmp, run_ranks):
    codes, _, errors = run_ranks(1, ROOT / "ppo_multienv.py", *SMALL, "--eval-episodes", "0")
    assert codes == (0,), errors
    (path,) = in_tmp.glob("runs/*/agent.pt")
    saved = load(path)
    again = ppo_multienv.train(ppo_multienv.Args(**saved["args"] | {"exp_name": "again"}))
    for name, tensor in load(f"{again['run_dir']}/agent.pt")["agent"].items():
        torch.testing.assert_close(tensor, saved["agent"][name], rtol=1e-3, atol=1e-4)
