"""README and docs: blocks of Python run, diffs apply, commands work, names and links resolve."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, only

sys.path.insert(0, str(ROOT / "benchmark"))
import run

PAGES = {path: (ROOT / path).read_text() for path in ("README.md", "docs/ppo.md")}
PAGES |= {path: (ROOT / path).read_text() for path in ("docs/adapting.md", "benchmark/README.md")}
README, ADAPTING = PAGES["README.md"], PAGES["docs/adapting.md"]
CONTINUOUS = only("ppo_continuous")
DISCRETE = only("ppo_discrete")


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """The indented lines that are commands, without comments."""
    first = "python|pip|pytest|uv|torchrun|tensorboard|ruff"
    lines = re.findall(rf"^    ((?:{first})\b.*)$", text, re.M)
    return [line.partition("  #")[0].strip() for line in lines]


# Python


@pytest.fixture
def corridor(in_tmp, monkeypatch):
    """The README's environment, saved where the README says."""
    (source,) = (block for block in blocks(README) if "class Corridor" in block)
    assert 15 <= len([line for line in source.splitlines() if line]) <= 25
    (in_tmp / "corridor.py").write_text(source)
    monkeypatch.syspath_prepend(in_tmp)
    yield
    sys.modules.pop("corridor", None)


def test_check_env_finds_no_mistake(corridor, recwarn):
    (call,) = re.findall(r"`(gymnasium.*check_env.*?)`", README)
    exec(f"import gymnasium.utils.env_checker\nfrom corridor import Corridor\n{call}", {})
    assert not [warning for warning in recwarn if "corridor" in str(warning.message).lower()]


@pytest.mark.parametrize(
    ("script", "row"), [("ppo_discrete", "LunarLander-v3"), ("ppo_continuous", "Pendulum-v1")]
)
def test_agent_in_ones_own_code(script, row, monkeypatch, capsys):
    """For continuous actions, the import is all that differs."""
    (source,) = (block for block in blocks(README) if "load_agent" in block)
    source = source.replace("ppo_discrete", script).replace("LunarLander-v3", row)
    monkeypatch.chdir(ROOT)
    exec(source, {})
    assert float(capsys.readouterr().out) > {"LunarLander-v3": 100, "Pendulum-v1": -600}[row]


def test_every_block_of_python_is_run_by_a_test():
    found = [block for text in PAGES.values() for block in blocks(text)]
    known = ("class Corridor", "load_agent", "class EnvPool", "class RandomPhysics")
    assert len(found) == len(known)
    for mark in known:
        assert sum(mark in block for block in found) >= 1


@DISCRETE
def test_randomized_physics(script, small, in_tmp, monkeypatch):
    """Mass, friction and noise differ between episodes; the command trains."""
    (source,) = (block for block in blocks(ADAPTING) if "class RandomPhysics" in block)
    (in_tmp / "random_lander.py").write_text(source)
    monkeypatch.syspath_prepend(in_tmp)
    args = dataclasses.replace(small, env_id="random_lander:RandomLander-v0", total_timesteps=64)
    env, masses, noises = script.make_env(args), set(), set()
    for seed in range(3):
        env.reset(seed=seed)
        masses.add(env.unwrapped.lander.mass)
        noises.add(env.get_wrapper_attr("noise"))
    assert len(masses) == len(noises) == 3
    assert script.train(args)["global_step"] == 64
    sys.modules.pop("random_lander", None)


@only("ppo_multienv")
def test_envpool(script, in_tmp, monkeypatch):
    """The recipe's environments, where EnvPool is installed: no transition that never happened."""
    pytest.importorskip("envpool")
    (source,) = (block for block in blocks(ADAPTING) if "class EnvPool" in block)
    (in_tmp / "ppo_envpool.py").write_text(source)
    monkeypatch.setattr(script, "make_vector_env", script.make_vector_env)
    recipe = runpy.run_path(str(in_tmp / "ppo_envpool.py"))
    envs = recipe["EnvPool"]("CartPole-v1", 8)
    (obs, _), rng, ended = envs.reset(seed=[1] * 8), np.random.default_rng(0), 0
    for _ in range(200):
        previous = obs.copy()
        obs, _, terminated, truncated, infos = envs.step(rng.integers(2, size=8))
        # x moves by 0.02 times its speed in every step that is real.
        moved = infos["final_obs"][:, 0] - previous[:, 0]
        assert moved == pytest.approx(0.02 * previous[:, 1], abs=1e-5)
        ended += int((terminated | truncated).sum())
        assert abs(obs[terminated | truncated]).max(initial=0) <= 0.05
    assert ended > 20


# Diffs


def changed(section, script, folder):
    """A copy of the script, as a module, with all changes of a section of docs/adapting.md."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", ADAPTING, re.M | re.S)
    source = (ROOT / f"{script}.py").read_text()
    diffs = blocks(text, f"diff {script}.py")
    assert diffs
    for diff in diffs:
        lines = diff.splitlines()
        old, new = (
            "\n".join(line[1:] for line in lines if not line.startswith(mark)) for mark in "+-"
        )
        assert source.count(old) == 1, f"{section}: not once in {script}.py:\n{old}"
        source = source.replace(old, new)
    path = folder / f"{script}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"changed_{script}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rest_of(args, script):
    return script.Args(**dataclasses.asdict(args))


@DISCRETE
def test_relu(small, in_tmp):
    script = changed("Network", "ppo_discrete", in_tmp)
    assert script.train(rest_of(small, script))["global_step"] == 512


@CONTINUOUS
def test_deviation_that_depends_on_the_state(small, in_tmp):
    script = changed("Network", "ppo_continuous", in_tmp)
    result = script.train(rest_of(small, script))
    agent, _ = script.load_agent(in_tmp / result["run_dir"] / "agent.pt", "cpu")
    deviations = agent.get_policy(torch.randn(5, 3)).base_dist.stddev
    assert len(set(deviations.flatten().tolist())) == 5


@DISCRETE
@pytest.mark.parametrize("surrogate", ["clip", "kl-penalty"])
def test_multi_discrete(small, surrogate, in_tmp):
    """Learns an environment whose reward is 1 for either right component."""
    script = changed("Action space", "ppo_discrete", in_tmp)
    small = dataclasses.replace(
        small, env_id="TwoChoices-v0", total_timesteps=1024, surrogate=surrogate, update_epochs=4,
        learning_rate=1e-2, target_kl=0.05 if surrogate == "kl-penalty" else None,
    )  # fmt: skip
    result = script.train(rest_of(small, script))
    agent, args = script.load_agent(in_tmp / result["run_dir"] / "agent.pt", "cpu")
    assert script.evaluate(agent, args, 4, 1, torch.device("cpu")).mean() > 19


def test_other_images(in_tmp):
    """Learns an environment whose reward is 1 for naming the quarter of the image that is lit."""
    script = changed("Other images", "ppo_carracing_cnn", in_tmp)
    args = script.Args(
        env_id="toy_envs:Lit-v0", num_envs=2, num_steps=64, num_minibatches=4, update_epochs=4,
        total_timesteps=1024, learning_rate=1e-3, reward_scale=1.0, gamma=0.5, eval_episodes=4,
    )  # fmt: skip
    result = script.train(args)
    agent, args = script.load_agent(in_tmp / result["run_dir"] / "agent.pt", "cpu")
    script.check_args(args)
    assert script.evaluate(agent, args, 4, 1, torch.device("cpu")).mean() > 9


@DISCRETE
def test_kl_penalty_against_a_reference(small, trained, in_tmp, monkeypatch):
    """The first update sees rewards without a penalty, for the agent starts from the reference."""
    shutil.copy(trained.path, in_tmp / "reference.pt")
    script = changed("A KL penalty against a reference policy", "ppo_discrete", in_tmp)
    rewards, compute_gae = [], script.compute_gae
    spy = lambda *inputs: rewards.append(inputs[0]) or compute_gae(*inputs)  # noqa: E731
    monkeypatch.setattr(script, "compute_gae", spy)
    script.train(rest_of(dataclasses.replace(small, learning_rate=1e-2), script))
    assert torch.allclose(rewards[0], torch.ones_like(rewards[0]), atol=1e-6)
    assert (rewards[-1] - 1).abs().max() > 1e-4


# Commands

SHORT = [
    "--total-timesteps", "64", "--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2",
    "--update-epochs", "1",
]  # fmt: skip


@DISCRETE
@pytest.mark.parametrize("page", ["README.md", "docs/adapting.md"])
def test_commands(page, trained, corridor, monkeypatch, tmp_path):
    """Those that run a script, with few steps; a checkpoint stands for those of the text."""
    for block in blocks(ADAPTING):
        if "RandomLander" in block:
            (tmp_path / "random_lander.py").write_text(block)
    lines = [line for line in commands(PAGES[page]) if "ppo_" in line and "torchrun" not in line]
    assert lines
    for line in lines:
        words = shlex.split(line.rpartition("ppo_")[2].replace("runs/<run>/agent.pt", "PATH"))
        name, flags = f"ppo_{words[0].removesuffix('.py')}", words[1:]
        if "--cuda" in flags or name == "ppo_carracing_cnn":
            continue  # tests/test_cuda.py
        path = tmp_path / "agent.pt"
        shutil.copy(trained.path, path)
        if name != trained.args.exp_name:
            assert "PATH" not in flags
        flags = [str(path) if word == "PATH" else word for word in flags]
        short = [] if "--evaluate" in flags else SHORT
        if "--resume" in flags:
            short = ["--total-timesteps", "640"]
        monkeypatch.setattr(
            sys, "argv", [name, *flags, *short, "--eval-episodes", "1" if not short else "0"]
        )
        importlib.import_module(name).main()


def test_flags_and_rows_of_commands_exist():
    known = {
        "--logdir",
        "--help",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--check",
    }
    known |= {"--seeds", "--at-once", "--save-model"}  # of benchmark/run.py, of CleanRL
    for name in SCRIPTS:
        fields = dataclasses.fields(importlib.import_module(name).Args)
        known |= {f"--{field.name.replace('_', '-')}" for field in fields}
        known |= {f"--no-{field.name.replace('_', '-')}" for field in fields}
    for path, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known, path
        for row in re.findall(r"benchmark/(?:run|sb3)\.py ([A-Z][\w-]+)", text):
            assert row in run.ROWS or row == "ROW", path


# Names, links, tables


def test_names_exist():
    """Names of functions, classes and tests in backticks."""
    sources = [path.read_text() for path in ROOT.glob("*.py")]
    tests = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    defined = {
        node.name
        for source in [*sources, *tests]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for path in ("docs/ppo.md", "docs/adapting.md"):
        prose = re.sub(r"^```.*?^```", "", PAGES[path], flags=re.M | re.S)
        names = re.findall(r"`([a-z]+_[a-z_0-9]+|[A-Z]\w+)`", prose)
        assert len(names) > 10
        for name in names:
            text = "\n".join(sources)
            assert name in defined or re.search(rf"\b{name}\b", text), f"{path}: {name}"
            if name.startswith("test_"):
                assert name in defined


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^):]+)\)|src=\"([^\"]+)\"", PAGES[page])
    for link in map("".join, links):
        file, _, anchor = link.partition("#")
        target = folder / file if file else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not anchor or anchor in slugs, link


def test_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_tables_are_those_of_the_records(capsys):
    run.comparison()
    run.mujoco()
    for line in capsys.readouterr().out.splitlines():
        assert line in README, "its tables are printed by `python benchmark/run.py`"
    run.carracing()
    run.table()
    run.commands()
    for line in capsys.readouterr().out.splitlines():
        assert line in PAGES["benchmark/README.md"], "printed by `python benchmark/run.py`"


@pytest.mark.parametrize("name", [row for row in run.ROWS if run.records(row)])
def test_records_are_of_the_commands(name):
    """With the flags' present defaults."""
    script, *flags = run.ROWS[name][1].split()
    module = importlib.import_module(script.removesuffix(".py"))
    now = json.loads(json.dumps(dataclasses.asdict(tyro.cli(module.Args, args=flags))))
    for record in run.records(name):
        assert now == record["args"] | {"seed": 1}


SMALL_ROWS = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1"]
SMALL_ROWS += [row for row in run.MUJOCO if (ROOT / "benchmark" / row / "agent.pt").exists()]


@pytest.mark.parametrize("name", SMALL_ROWS)
def test_recorded_checkpoints_play_as_recorded(name):
    """Within three standard errors of the difference of the means."""
    if name in run.MUJOCO:
        pytest.importorskip("mujoco")
    script = importlib.import_module(run.ROWS[name][1].split(".py")[0])
    agent, args = script.load_agent(ROOT / "benchmark" / name / "agent.pt", "cpu")
    record = json.loads((ROOT / "benchmark" / name / f"seed{args.seed}.json").read_text())
    recorded_args, now = record["args"], json.loads(json.dumps(dataclasses.asdict(args)))
    known = recorded_args.keys() & now.keys() - {"kl_coef"}  # which is adapted
    assert len(known) > 20 and all(recorded_args[name] == now[name] for name in known)
    recorded = record["eval_returns"]
    returns = script.evaluate(agent, args, 20, args.seed, torch.device("cpu")).tolist()
    error = (statistics.variance(recorded) / 100 + statistics.variance(returns) / 20) ** 0.5
    assert statistics.mean(returns) == pytest.approx(statistics.mean(recorded), abs=3 * error + 0.1)
