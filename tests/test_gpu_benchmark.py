"""benchmark/gpu.py, which measures on a GPU, runs all of its stages here on the CPU."""

import json
import math
import os
import subprocess
import sys

from conftest import ROOT

COLUMNS = {
    "tests": {"check", "outcome"},
    "speed": {"device", "num_envs", "num_steps", "steps_per_second", "rollout_seconds", "loss"},
    "options": {"option", "steps_per_second", "update_seconds", "loss", "loss_difference"},
    "scripts": {"script", "exit_code", "steps", "steps_per_second"},
    "training": {"steps", "learning_seconds", "curve", "eval_episodes", "eval_mean", "eval_std"},
}


def test_dry_run(dry_run):
    process, tmp_path = dry_run
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert sorted(os.listdir(tmp_path / "out")) == ["gpu.json", "gpu.txt"]
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["dry_run"] and results["machine"].keys() >= {"card", "driver", "cores", "torch"}
    stages = results["stages"]
    assert list(stages) == list(COLUMNS)
    for name, stage in stages.items():
        assert stage["seconds"] > 0 and "error" not in stage
        rows = [row for row in stage["rows"] if "skipped" not in row]
        for row in rows:
            assert row.keys() >= COLUMNS[name] and "error" not in row, row
            assert row.get("steps_per_second", 1) > 0 and math.isfinite(row.get("loss", 0))

    assert "passed" in stages["tests"]["rows"][0]["outcome"]
    for row in stages["speed"]["rows"]:
        steps = row["num_envs"] * row["num_steps"]
        assert row["rollout_seconds"] + row["update_seconds"] < steps / row["steps_per_second"]
    options = {row["option"]: row for row in stages["options"]["rows"]}
    assert {"plain", "channels-last", "TF32", "bfloat16", "plain again"} <= options.keys()
    assert [name for name, row in options.items() if "skipped" in row] == [
        "compile", "compile, reduce-overhead",
    ]  # fmt: skip
    assert abs(options["plain again"]["loss_difference"]) < 1e-6
    assert 1e-6 < abs(options["bfloat16"]["loss_difference"]) < 0.02  # the option has an effect
    codes = {row["script"]: row["exit_code"] for row in stages["scripts"]["rows"]}
    assert codes["ppo_discrete.py"] == codes["ppo_continuous.py"] == 130
    assert "torchrun ppo_multienv.py" in codes
    (row,) = stages["training"]["rows"]
    assert row["steps"] == row["planned_steps"] == row["curve"][-1]["step"]
    assert row["eval_episodes"] == 2 and math.isfinite(row["eval_mean"])

    text = (tmp_path / "out" / "gpu.txt").read_text()
    for name, stage in stages.items():
        assert f"\n{name}, {stage['seconds']:.0f} s\n" in text
    assert "compiling takes longer than a dry run" in text
    assert "paid by more than a tenth" in text.splitlines()[-1]


def test_needs_a_gpu_or_a_dry_run(tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "gpu.py", tmp_path / "out"]
    settings = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=100)
    assert run.returncode == 1 and run.stderr.startswith("error: no GPU")
    assert run.stderr.count("\n") == 1 and not os.listdir(tmp_path)
