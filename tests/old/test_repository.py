"""The repository agrees with itself: dependencies, flags, documentation, shared text."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from old.conftest import SCRIPTS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
import run  # noqa: E402


def test_inline_metadata_equals_requirements(script):
    """`uv run` needs what requirements.txt lists, but for pytest."""
    source = Path(script.__file__).read_text()
    block = re.match(r"# /// script\n(?:#.*\n)*?# ///\n", source)[0]
    listed = re.findall(r'^#     "(.*)",$', block, re.M)
    required = (ROOT / "requirements.txt").read_text().split()
    assert sorted([*listed, "pytest"]) == sorted(required)


def test_every_flag_is_explained(main, script):
    code, output, _ = main("--help")
    assert code == 0
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in output
    (args,) = [
        node
        for node in ast.parse(Path(script.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    body = [node for node in args.body[1:] if not isinstance(node, ast.FunctionDef)]
    for first, second in itertools.pairwise(body):
        if isinstance(first, ast.AnnAssign):
            assert isinstance(second, ast.Expr), f"{first.target.id} has no docstring"
    assert isinstance(body[-1], ast.Expr)


VARIANTS = {  # what may differ between scripts; all else of one name is of one text
    "Args", "Agent", "Rollout", "check_args", "make_env", "make_vector_env", "collect_rollout",
    "update", "train", "evaluate", "Progress", "load_agent", "reward_threshold", "main",
    "kl_divergence",
}  # fmt: skip
ALL_RANKS = {"ObservationNormalizer", "RewardScaler", "minibatches", "start_episodes"}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(SCRIPTS, 2)))
def test_shared_text_is_the_same(first, second):
    texts = []
    for name in (first, second):
        source = (ROOT / f"{name}.py").read_text()
        texts.append(
            {
                node.name: ast.get_source_segment(source, node)
                for node in ast.parse(source).body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            }
        )
    several = ALL_RANKS if "ppo_multienv" in (first, second) else set()
    shared = (texts[0].keys() & texts[1].keys()) - VARIANTS - several
    assert {"compute_gae", "ppo_loss", "save_checkpoint", "RunLog", "report"} <= shared
    for name in shared:
        assert texts[0][name] == texts[1][name], name


def test_readme_knows_the_flags():
    readme = (ROOT / "README.md").read_text()
    known = {"--logdir", "--help", "--nproc-per-node"}
    for name in ["ppo_discrete", *SCRIPTS]:
        fields = dataclasses.fields(importlib.import_module(name).Args)
        known |= {f"--{field.name.replace('_', '-')}" for field in fields}
        known |= {f"--no-{field.name.replace('_', '-')}" for field in fields}
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= known
    for path in re.findall(r"\]\(([^):]+)\)|src=\"([^\"]+)\"|(benchmark/\S+\.\w+)", readme):
        assert (ROOT / "".join(path).partition("#")[0]).exists(), path


def test_readme_links_lead_to_what_they_name():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`([^`]+)`\]\(([\w/]+\.py)#L(\d+)\)", readme)
    assert len(links) == readme.count(".py#L") > 50
    for text, path, number in links:
        if path.removesuffix(".py") not in SCRIPTS:
            continue  # of a rebuilt script: the README follows when all are
        lines = (ROOT / path).read_text().splitlines()
        there = [i for i, line in enumerate(lines, 1) if text in line]
        assert int(number) in there, f"{path}: `{text}` is in lines {there}, not {number}"


def test_readme_gives_the_defaults():
    args = importlib.import_module("ppo_discrete").Args()
    readme = (ROOT / "README.md").read_text()
    assert f"| `--num-envs`, `--num-steps` | {args.num_envs}, {args.num_steps} |" in readme
    assert f"| `--gamma`, `--gae-lambda` | {args.gamma}, {args.gae_lambda} |" in readme
    assert f"| `--total-timesteps` | {args.total_timesteps} |" in readme
    assert f"| {args.num_minibatches}, {args.update_epochs} | minibatches" in readme
    assert f"| `--checkpoint-interval` | {args.checkpoint_interval} |" in readme


SLOW = {
    "LunarLander-v3", "LunarLanderContinuous", "LunarLander-v3-multienv", "BipedalWalker-v3",
    "BipedalWalkerHardcore-v3", "CarRacing-v3",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name, (_, command) in run.ROWS.items()
        if command.split(".py")[0] in SCRIPTS
    ],
)
def test_recorded_checkpoints_play_as_recorded(name):
    """The mean of its seed, to within a standard error: other machines may round otherwise."""
    script = importlib.import_module(run.ROWS[name][1].split(".py")[0])
    agent, args = script.load_agent(ROOT / "benchmark" / name / "agent.pt", "cpu")
    record = json.loads((ROOT / "benchmark" / name / f"seed{args.seed}.json").read_text())
    assert record["args"] == json.loads(json.dumps(dataclasses.asdict(args)))
    episodes = 4 if name == "CarRacing-v3" else 100
    recorded = record["eval_returns"][:episodes]
    returns = script.evaluate(agent, args, episodes, args.seed, torch.device("cpu"))
    error = statistics.pstdev(recorded) / episodes**0.5
    assert returns.mean() == pytest.approx(statistics.mean(recorded), abs=error + 1e-3)


def test_readme_holds_the_tables_of_the_records(capsys):
    run.comparison()
    run.table()
    readme = (ROOT / "README.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in readme, "its tables are printed by `python benchmark/run.py`"
