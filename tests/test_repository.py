"""The repository agrees with itself: dependencies, flags, documentation, shared text."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import SCRIPTS, only

ROOT = Path(__file__).parents[1]


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
    for name in SCRIPTS:
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


@only("ppo_discrete")
@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3"]
)
def test_recorded_checkpoints_play_as_recorded(main, env_id):
    """The mean of the median seed, from its checkpoint (Box2D may round otherwise elsewhere)."""
    folder = ROOT / "benchmark" / env_id
    records = [json.loads(path.read_text()) for path in folder.glob("seed*.json")]
    code, output, _ = main("--evaluate", folder / "agent.pt")
    assert code == 0
    mean = float(re.match(r"trained agent +(-?[\d.]+)", output)[1])
    recorded = statistics.median(record["eval_mean"] for record in records)
    assert mean == pytest.approx(recorded, abs=0.06 if env_id != "LunarLander-v3" else 5)
