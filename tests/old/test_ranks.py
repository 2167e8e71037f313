"""Several processes under torchrun: one run, equal weights on all, one end for all."""

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

import ppo_multienv

ROOT = Path(__file__).parents[2]
SMALL = (
    "--env-ids", "CartPole-v1", "--num-envs", "4", "--num-steps", "16", "--total-timesteps", "1024",
    "--num-minibatches", "4", "--update-epochs", "2", "--num-workers", "1", "--eval-episodes", "2",
    "--checkpoint-interval", "3", "--learning-rate", "0.01",
)  # fmt: skip
ENDLESS = (*SMALL, "--total-timesteps", "100000000", "--checkpoint-interval", "1")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def torchrun(ranks, *command):
    """Starts a command in so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "--master-port", str(free_port()), *map(str, command)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def agent_of(folder):
    (path,) = folder.glob("runs/*/agent.pt")
    return torch.load(path, weights_only=True)["agent"]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_one_rank_equals_no_torchrun_to_the_bit(tmp_path, monkeypatch):
    agents = []
    for name in ("plain", "torchrun"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        script = ROOT / "ppo_multienv.py"
        if name == "plain":
            subprocess.run([sys.executable, script, *SMALL], check=True, capture_output=True)
        else:
            code, _, errors = finish(torchrun(1, script, *SMALL))
            assert code == 0, errors
        agents.append(agent_of(tmp_path / name))
    assert_equal(*agents)


SPY = """
import hashlib, json, sys, torch
import ppo_multienv

hashes, seeds, step = [], [], torch.optim.Adam.step
reset = ppo_multienv.WorkerVectorEnv.reset

def spying_step(optimizer, *args):
    result = step(optimizer, *args)
    weights = optimizer.param_groups[0]["params"][0].detach()
    hashes.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    return result

def spying_reset(envs, *, seed, options=None):
    seeds.extend(seed)
    return reset(envs, seed=seed)

torch.optim.Adam.step = spying_step
ppo_multienv.WorkerVectorEnv.reset = spying_reset
original = ppo_multienv.RankLog.close

def close(log):
    original(log)
    record = {"hashes": hashes, "seeds": seeds}
    with open(f"rank{log.ranks.rank}.json", "w") as file:
        json.dump(record, file)

ppo_multienv.RankLog.close = close
ppo_multienv.main()
"""


@pytest.mark.parametrize("flags", [(), ("--target-kl", "0.0005")])
def test_weights_are_equal_on_all_ranks_after_every_step(in_tmp, flags):
    Path("spy.py").write_text(SPY)
    code, output, errors = finish(torchrun(2, "spy.py", *SMALL, "--norm-reward", *flags))
    assert code == 0, errors
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["hashes"] == second["hashes"]
    assert len(set(first["hashes"])) == len(first["hashes"]) <= 8 * 8
    assert (len(first["hashes"]) < 8 * 8) == bool(flags), "a KL stop stops all"
    assert not set(first["seeds"]) & set(second["seeds"]), "ranks share no environments"
    assert output.count("run folder") == 1 and "trained agent" in output
    (path,) = in_tmp.glob("runs/*/agent.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["progress"]["global_step"] == 1024
    assert checkpoint["agent"]["normalize.count"] == 1024, "the moments are of all ranks' steps"
    assert checkpoint["agent"]["scale_rewards.count"] == 1024


COMPARE = """
import torch
import ppo_multienv

args = ppo_multienv.Args(num_minibatches=3, update_epochs=2)
ranks = ppo_multienv.Ranks(args)
torch.manual_seed(ranks.rank)
normalizer = ppo_multienv.ObservationNormalizer(3)
history = []
for steps in (5, 7):
    obs = torch.randn(steps, 4, 3) * (1 + ranks.rank) + 100 * ranks.rank
    normalizer.update(obs, ranks)
    history.append(ranks.gather(obs.flatten(0, 1).T.contiguous()).T)
everything = torch.cat(history).double()
torch.testing.assert_close(normalizer.mean, everything.mean(0), rtol=1e-12, atol=0)
torch.testing.assert_close(normalizer.var, everything.var(0, correction=0), rtol=1e-9, atol=0)
assert normalizer.count == len(everything) == 96

advantages = torch.randn(20) * 3 + ranks.rank
for mb, mean, std in ppo_multienv.minibatches(advantages, args, ranks):
    both = ranks.gather(advantages[mb])
    torch.testing.assert_close(mean, both.mean())
    torch.testing.assert_close(std, both.std())
ranks.close()
"""


def test_statistics_are_those_of_all_ranks(in_tmp):
    Path("compare.py").write_text(COMPARE)
    code, _, errors = finish(torchrun(2, "compare.py"))
    assert code == 0, errors


def test_resumed_run_of_two_ranks_equals_straight_run(tmp_path, monkeypatch):
    script = ROOT / "ppo_multienv.py"
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "straight")
    assert finish(torchrun(2, script, *SMALL))[0] == 0
    monkeypatch.chdir(tmp_path / "stopped")
    Path("die.py").write_text(
        "import os, ppo_multienv\\n"
        "save = ppo_multienv.save_checkpoint\\n"
        "def save_and_die(*args):\\n    save(*args)\\n    os._exit(9)\\n"
        "ppo_multienv.save_checkpoint = save_and_die\\n"
        "ppo_multienv.main()\\n".replace("\\n", "\n")
    )
    assert finish(torchrun(2, "die.py", *SMALL))[0] != 0
    (path,) = Path().glob("runs/*/agent.pt")
    assert torch.load(path, weights_only=True)["progress"]["iteration"] == 3
    assert finish(torchrun(2, script, "--resume", path))[0] == 0
    assert_equal(agent_of(tmp_path / "straight"), agent_of(tmp_path / "stopped"))
    code, output, _ = finish(torchrun(1, script, "--resume", path, "--total-timesteps", "2048"))
    assert code == 0 and "2 processes and goes on with 1" in output


def children_of(pid):
    output = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(line) for line in output.stdout.split()]


def wait_for_checkpoint(folder, process):
    for _ in range(600):
        if paths := list(folder.glob("runs/*/agent.pt")):
            return paths[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no checkpoint within a minute")


@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_death_of_one_ends_all(in_tmp, victim):
    process = torchrun(2, ROOT / "ppo_multienv.py", *ENDLESS)
    path = wait_for_checkpoint(in_tmp, process)
    ranks = children_of(process.pid)
    workers = [worker for rank in ranks for worker in children_of(rank)]
    assert len(ranks) == 2 and len(workers) >= 2
    os.kill(ranks[1] if victim == "rank" else workers[-1], signal.SIGKILL)
    code, _, errors = finish(process, timeout=60)
    assert code != 0
    sentences = re.findall(r"error: .*", errors)
    if victim == "worker":
        assert "error: the process of an environment died" in sentences
    assert all("process" in sentence for sentence in sentences)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in (*ranks, *workers)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)
    ppo_multienv.load_agent(path, "cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_torchrun_saves(in_tmp, number):
    process = torchrun(2, ROOT / "ppo_multienv.py", *ENDLESS[:-1], "1000000")
    while not list(in_tmp.glob("runs/*/events*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(number)
    code, output, errors = finish(process, timeout=60)
    assert code != 0 and "--resume" in output, errors
    (path,) = in_tmp.glob("runs/*/agent.pt")
    ppo_multienv.load_agent(path, "cpu")


def test_rank_that_never_arrives_is_told(in_tmp):
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    command = [sys.executable, ROOT / "ppo_multienv.py", *SMALL, "--rank-timeout", "3"]
    result = subprocess.run(
        command, env={**os.environ, **lonely, "MASTER_PORT": str(free_port())},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("error: this process of the run hears nothing of another one (")


def test_not_a_number_on_one_rank_stops_all(in_tmp):
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
    code, _, errors = finish(torchrun(2, "poison.py", *SMALL), timeout=60)
    assert code != 0
    assert "error: reward is not finite at step 128" in errors
    assert not list(in_tmp.glob("runs/*/agent.pt"))


def test_several_environments_in_one_run(in_tmp, capsys):
    """CartPole beside a copy of it that ends after 20 steps, each with its returns."""
    games = ("CartPole-v1", "toy_envs:ShortCartPole-v0")
    result = ppo_multienv.train(
        ppo_multienv.Args(
            env_ids=games,
            num_envs=4,
            num_steps=64,
            total_timesteps=2048,
            num_workers=2,
            eval_episodes=4,
            num_minibatches=4,
        )
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(result["run_dir"])
    events.Reload()
    long, short = (
        [event.value for event in events.Scalars(f"charts/episodic_return/{game}")]
        for game in games
    )
    assert max(short) <= 20 < max(long)
    assert len(events.Scalars("charts/episodic_return")) == len(short) + len(long)
    assert max(result["eval_returns"][1::2]) <= 20, "they are evaluated in turns"
    assert result["threshold"] is result["solved"] is None
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, game, turn in zip(lines, games, (0, 1), strict=True):
        mean = sum(result["eval_returns"][turn::2]) / 2
        assert line.split()[:2] == [game, f"{mean:.1f}"]
    agent, args = ppo_multienv.load_agent(f"{result['run_dir']}/agent.pt", "cpu")
    assert args.env_ids == games and agent.discrete


@pytest.mark.parametrize("script", ["ppo_multienv"], indirect=True)
def test_environments_with_unequal_spaces_are_refused(script, main, in_tmp):
    code, output, errors = main("--env-ids", "CartPole-v1", "LunarLander-v3")
    assert code == 2 and output == "" and errors.count("\n") == 1
    assert "equal spaces" in errors and "LunarLander-v3" in errors


@pytest.mark.parametrize("script", ["ppo_multienv"], indirect=True)
def test_continuous_actions(script, in_tmp):
    args = script.Args(
        env_ids=("toy_envs:FarTarget-v0",), num_envs=8, num_steps=32, total_timesteps=30_000,
        update_epochs=8, num_minibatches=4, learning_rate=2e-3, gamma=0.9, ent_coef=0.0,
        num_workers=0, eval_episodes=3,
    )  # fmt: skip
    result = script.train(args)
    assert -1 < result["eval_mean"] <= 0
