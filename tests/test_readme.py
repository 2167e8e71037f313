"""README and records agree with the scripts."""

import dataclasses
import importlib
import json
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
import run


def test_readme_knows_the_flags():
    readme = (ROOT / "README.md").read_text()
    known = {"--logdir", "--help", "--nproc-per-node"}
    for name in SCRIPTS:
        fields = dataclasses.fields(importlib.import_module(name).Args)
        known |= {f"--{field.name.replace('_', '-')}" for field in fields}
        known |= {f"--no-{field.name.replace('_', '-')}" for field in fields}
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= known
    for path in re.findall(r"\]\(([^):]+)\)|src=\"([^\"]+)\"|(benchmark/\S+\.\w+)", readme):
        assert (ROOT / "".join(path).partition("#")[0]).exists(), path


def test_readme_gives_the_defaults():
    args = importlib.import_module("ppo_discrete").Args()
    readme = (ROOT / "README.md").read_text()
    assert f"| `--num-envs`, `--num-steps` | {args.num_envs}, {args.num_steps} |" in readme
    assert f"| `--gamma`, `--gae-lambda` | {args.gamma}, {args.gae_lambda} |" in readme
    assert f"| `--total-timesteps` | {args.total_timesteps} |" in readme
    assert f"| {args.num_minibatches}, {args.update_epochs} | minibatches" in readme
    assert f"| `--checkpoint-interval` | {args.checkpoint_interval} |" in readme


@pytest.mark.parametrize("name", ["CartPole-v1", "MountainCar-v0", "Pendulum-v1"])
def test_recorded_checkpoints_play_as_recorded(name):
    """The mean of its seed, to within a standard error: other machines may round otherwise."""
    script = importlib.import_module(run.ROWS[name][1].split(".py")[0])
    agent, args = script.load_agent(ROOT / "benchmark" / name / "agent.pt", "cpu")
    record = json.loads((ROOT / "benchmark" / name / f"seed{args.seed}.json").read_text())
    recorded_args, now = record["args"], json.loads(json.dumps(dataclasses.asdict(args)))
    known = recorded_args.keys() & now.keys() - {"kl_coef"}  # which is adapted
    assert len(known) > 20 and all(recorded_args[name] == now[name] for name in known)
    recorded = record["eval_returns"][:20]
    returns = script.evaluate(agent, args, 20, args.seed, torch.device("cpu"))
    error = statistics.pstdev(recorded) / 20**0.5
    assert returns.mean() == pytest.approx(statistics.mean(recorded), abs=error + 1e-3)


def test_readme_holds_the_tables_of_the_records(capsys):
    run.comparison()
    run.table()
    readme = (ROOT / "README.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in readme, "its tables are printed by `python benchmark/run.py`"
