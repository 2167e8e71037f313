"""The repository agrees with itself: dependencies, flags, shared text."""

import ast
import dataclasses
import itertools
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, only

EACH = only(*SCRIPTS)


@EACH
def test_inline_metadata_equals_requirements(script):
    """`uv run` needs what requirements.txt lists, but for pytest."""
    source = Path(script.__file__).read_text()
    block = re.match(r"# /// script\n(?:#.*\n)*?# ///\n", source)[0]
    listed = re.findall(r'^#     "(.*)",$', block, re.M)
    required = (ROOT / "requirements.txt").read_text().split()
    assert sorted([*listed, "pytest"]) == sorted(required)


@EACH
def test_a_script_imports_only_what_its_metadata_lists(script):
    """And what comes with these, and the standard library; wandb only when asked for."""
    source = Path(script.__file__).read_text()
    block = source.split("# ///\n")[0]
    packages = {re.split(r"[\[>]", name)[0] for name in re.findall(r'"(.*)"', block)} | {
        "PIL",
        "pygame",
    }
    for node in ast.parse(source).body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.split(".")[0]
            assert top in packages or top in sys.stdlib_module_names, name


@EACH
def test_every_flag_is_explained(main, script):
    """By a comment behind it, which --help shows."""
    code, output, _ = main("--help")
    assert code == 0
    shown = re.sub(r"[\s│]+", " ", output)
    lines = Path(script.__file__).read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("class Args")]
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in shown
        (i,) = [i for i in range(start, start + 120) if re.match(rf"    {field.name}: ", lines[i])]
        comment = lines[i].partition("  # ")[2] or lines[i - 1].strip().partition("# ")[2]
        assert comment, f"{field.name} has no comment"
        assert comment.split(";")[0].split(":")[0].replace("`", "")[:20] in shown.replace("`", "")


VARIANTS = {  # what may differ between scripts; all else of one name is of one text
    "Args", "Agent", "Rollout", "check_args", "make_env", "make_vector_env", "collect_rollout",
    "update", "train", "evaluate", "load_agent", "main",
}  # fmt: skip
ALL_RANKS = {  # speak of all processes of torchrun in ppo_multienv.py
    "ObservationNormalizer", "reset_envs", "check_finite", "catch_signals",
}  # fmt: skip


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
    different = VARIANTS | (ALL_RANKS if "ppo_multienv" in (first, second) else set())
    different |= {"act"} if "ppo_carracing_cnn" in (first, second) else set()
    shared = (texts[0].keys() & texts[1].keys()) - different
    assert {"compute_gae", "ppo_loss", "save_checkpoint", "report"} <= shared
    for name in shared:
        assert texts[0][name] == texts[1][name], name


@EACH
def test_functions_are_short(script):
    """No function is longer than a screen, of 60 lines."""
    for node in ast.walk(ast.parse(Path(script.__file__).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
