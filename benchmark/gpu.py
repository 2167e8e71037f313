"""Measure what an NVIDIA GPU brings to the scripts; writes gpu.json and gpu.txt.

    python benchmark/gpu.py                        # nine minutes, into benchmark/
    python benchmark/gpu.py --minutes 5 FOLDER     # shorter, into another folder
    python benchmark/gpu.py --dry-run FOLDER       # all stages on the CPU, tiny: do they run?

The stages, each a process of its own with a time limit; the next one starts however one ends:

    tests     those marked `cuda`: GPU and CPU compute the same, and exchange checkpoints
    speed     ppo_carracing_cnn.py with and without --cuda: rollout, update, memory, for several
              splits of a batch over --num-envs and --num-steps
    options   memory format, TF32 matrix products (convolutions use TF32 by default), bfloat16 and
              torch.compile, put around the script from outside; all first learn from one rollout
    scripts   the other scripts with --cuda, one under torchrun, interrupted after 20 seconds
    training  CarRacing with the best of these in the time that is left, and an evaluation
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock, patch

import gymnasium
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PAYS = 1.1  # what is faster than this, relative to the script as it is, pays
LOSS_TOLERANCE = 0.02  # the training uses no option that changes the loss by more
COMPILE = {"compile": "default", "compile, reduce-overhead": "reduce-overhead"}
OPTIONS = ["plain", "channels-last", "TF32", "bfloat16", "plain again", *COMPILE, "together"]


def tests(record, results, seconds, dry):
    """Run tests/test_cuda.py; where pytest is missing, its checks without it."""
    if find_spec("pytest"):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        command += ["tests/test_cuda.py", "-v", *(["-k", "ppo_discrete"] if dry else [])]
        with open("pytest.txt", "w+") as log:  # which is told if the stage reaches its limit, too
            run = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        output = Path("pytest.txt").read_text().strip()
        with record(check="pytest -m cuda", outcome=output.split("\n")[-1]):
            if run.returncode:
                raise RuntimeError(output)
        return
    sys.modules["pytest"] = MagicMock()  # the file only marks and parametrizes with it
    sys.path.insert(0, str(ROOT / "tests"))
    module = importlib.import_module("test_cuda")
    for device in ["cpu"] if dry else ["cpu", "cuda"]:
        for name in ["ppo_discrete"] if dry else module.SCRIPTS:
            with record(check=f"update {name} {device}") as row:
                module.check_update(name, device)
                row["outcome"] = "passed"
            with record(check=f"checkpoint {name} {device}") as row:
                module.check_checkpoint(name, device, Path.cwd())
                row["outcome"] = "passed"


def carracing(dry, cuda, num_envs, num_steps):
    """The script, and its settings."""
    script = importlib.import_module("ppo_carracing_cnn")
    tiny = {"num_minibatches": 2, "update_epochs": 1} if dry else {}
    args = script.Args(cuda=cuda, num_envs=num_envs, num_steps=num_steps, eval_episodes=0, **tiny)
    return script, replace(args, checkpoint_interval=10**9)


@contextlib.contextmanager
def with_options(script, args, options):
    """The script with some of OPTIONS, put around its Agent and its loss."""
    device_type = "cuda" if args.cuda else "cpu"
    mode = next((COMPILE[name] for name in options if name in COMPILE), None)
    # Rollouts and minibatches; other batches, such as final observations, are not compiled.
    sizes = {args.num_envs, args.num_envs * args.num_steps // args.num_minibatches}

    class Agent(script.Agent):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            if "channels-last" in options:
                self.to(memory_format=torch.channels_last)
            if "bfloat16" in options:  # the network alone, not distribution and loss
                for head in (self.actor, self.critic):
                    head.register_forward_hook(lambda _, inputs, output: output.float())
            if mode:
                self.compiled = torch.compile(super().forward, mode=mode, dynamic=False)

        def forward(self, obs):
            with torch.autocast(device_type, torch.bfloat16, enabled="bfloat16" in options):
                if not mode or len(obs) not in sizes:
                    return super().forward(obs)
                torch.compiler.cudagraph_mark_step_begin()  # the last outputs may be overwritten
                return self.compiled(obs)

    ppo_loss = script.ppo_loss
    if mode:
        compiled_loss = torch.compile(ppo_loss, mode=mode, dynamic=False)

        def ppo_loss(*inputs):  # `update` keeps the metrics of all minibatches
            loss, metrics = compiled_loss(*inputs)
            return loss, {name: metric.clone() for name, metric in metrics.items()}

    torch.set_float32_matmul_precision("high" if "TF32" in options else "highest")
    try:
        with patch.multiple(script, Agent=Agent, ppo_loss=ppo_loss):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()


def measure(script, args, iterations, options=(), first=None):
    """Train for some iterations, of which the first, a warm-up, is not timed.

    `first` (rollout, advantages, returns) replaces what the first update would learn from, so that
    its mean loss can be compared. Returns (numbers, first).
    """
    seconds, losses = {"collect_rollout": [], "update": []}, []
    synchronize = torch.cuda.synchronize if args.cuda else lambda: None

    def timed(function):
        def run(*inputs):
            synchronize()
            started = time.perf_counter()
            output = function(*inputs)
            synchronize()
            seconds[function.__name__].append(time.perf_counter() - started)
            return output

        return run

    timed_update = timed(script.update)

    def update(agent, optimizer, *inputs):
        nonlocal first
        if not losses:
            first = first or inputs[:3]
            inputs = (*first, *inputs[3:])
            torch.manual_seed(args.seed)  # the same minibatches
        metrics = timed_update(agent, optimizer, *inputs)
        loss = metrics["policy_loss"] + args.vf_coef * metrics["value_loss"]
        losses.append(loss - args.ent_coef * metrics["entropy"])
        return metrics

    batch_size = args.num_envs * args.num_steps
    args = replace(args, total_timesteps=iterations * batch_size)
    gc.collect()
    if torch.cuda.is_initialized():  # by an earlier measurement
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    memory = torch.cuda.memory_allocated()
    with with_options(script, args, options), patch.multiple(
        script, collect_rollout=timed(script.collect_rollout), update=update,
        save_plot=lambda *_: None,
    ):  # fmt: skip
        ends = script.train(args)["curve"]["seconds"]
    numbers = {"steps_per_second": batch_size * (iterations - 1) / (ends[-1] - ends[0])}
    numbers["rollout_seconds"] = statistics.mean(seconds["collect_rollout"][1:])
    numbers["update_seconds"] = statistics.mean(seconds["update"][1:])
    numbers |= {"warm_up_seconds": ends[0], "loss": losses[0]}
    if args.cuda:
        numbers["gpu_mb"] = (torch.cuda.max_memory_allocated() - memory) / 2**20
    return numbers, first


def speed(record, results, seconds, dry):
    """Several splits of the same batch: the default, and 1, 2 and 4 processes a core."""
    numbers = sorted({8, CORES} | {n for n in (2 * CORES, 4 * CORES) if n <= 128})
    splits = [("cuda", n) for n in numbers] + [("cpu", n) for n in sorted({8, CORES})]
    for device, num_envs in [("cpu", 2), ("cpu", 4)] if dry else splits:
        split = {"num_envs": num_envs, "num_steps": max((32 if dry else 4096) // num_envs, 2)}
        with record(device=device, **split) as row:
            script, args = carracing(dry, device == "cuda", **split)
            row |= measure(script, args, 3 if args.cuda else 2)[0]


def measured(results, stage, device=None):
    """The rows of a stage that hold a speed; of a device, or all."""
    rows = results["stages"].get(stage, {}).get("rows", [])
    rows = [row for row in rows if "steps_per_second" in row]
    return [row for row in rows if device in (None, row.get("device"))]


def fastest(rows, default=None):
    return max(rows, key=lambda row: row["steps_per_second"], default=default)


def best_split(results, dry):
    rows = measured(results, "speed", "cpu" if dry else "cuda")
    default = {"num_envs": CORES, "num_steps": max(4096 // CORES, 2), "steps_per_second": 500.0}
    row = fastest(rows, default)
    return {name: row[name] for name in ("num_envs", "num_steps")}, row["steps_per_second"]


def options(record, results, seconds, dry):
    """Each option against the script as it is, and those that pay together."""
    script, args = carracing(dry, not dry, **best_split(results, dry)[0])
    first, loss = None, None
    for name in OPTIONS:
        chosen = [name]
        if name == "together":
            chosen = [row["option"] for row in paying(measured(record.results(), "options"))]
            slower = [other for other in chosen if other in COMPILE][1:]
            chosen = [other for other in chosen if other not in slower]
            if len(chosen) < 2:
                return
        with record(option=" + ".join(chosen), of=chosen) as row:
            if dry and name in COMPILE:
                row["skipped"] = "compiling takes longer than a dry run"
                continue
            numbers, first = measure(script, args, 2 if dry else 3, chosen, first)
            loss = numbers["loss"] if loss is None else loss
            row |= numbers | {"loss_difference": numbers["loss"] - loss}


def paying(rows):
    """The rows of the options that pay by more than a tenth, the fastest first."""
    plain = fastest([row for row in rows if row["option"].startswith("plain")])
    limit = PAYS * plain["steps_per_second"] if plain else float("inf")
    rows = [row for row in rows if row["steps_per_second"] > limit]
    return sorted(rows, key=lambda row: -row["steps_per_second"])


def scripts(record, results, seconds, dry):
    """The scripts for vectors: interrupted after some seconds, they save what they learned."""
    flags = ["--num-steps=32", "--num-minibatches=4"] if dry else ["--cuda"]
    flags += ["--total-timesteps=1000000000", "--checkpoint-interval=1000000000"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    for launch, name in ([], "ppo_discrete"), ([], "ppo_continuous"), (torchrun, "ppo_multienv"):
        command = [sys.executable, *launch, str(ROOT / f"{name}.py"), *flags]
        with record(script=f"{'torchrun ' if launch else ''}{name}.py") as row:
            folder = Path(name)
            folder.mkdir()
            log = folder / "output.txt"
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
            while "run folder" not in log.read_text() and process.poll() is None:
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1 if dry else 20)
            process.send_signal(signal.SIGINT)  # no effect if it has ended
            interrupted = time.monotonic()
            try:
                row["exit_code"] = process.wait(40)
            finally:
                process.terminate()
            row["seconds_to_end"] = time.monotonic() - interrupted
            paths = list(folder.glob("runs/*/agent.pt"))  # saved because of the signal alone
            if not paths or (row["exit_code"] != 130 and not launch):  # torchrun has its own code
                raise RuntimeError(log.read_text())
            progress = torch.load(paths[0], map_location="cpu", weights_only=True)["progress"]
            row["steps"] = progress["global_step"]
            row["steps_per_second"] = progress["global_step"] / progress["learning_seconds"]


def training(record, results, seconds, dry):
    """Train with the fastest split and options, and evaluate the last agent, in `seconds`."""
    until = time.monotonic() + seconds - 10  # the process has started, and has to end
    budget = 0.8 * (until - time.monotonic())
    split, rate = best_split(results, dry)
    rows = paying(measured(results, "options"))
    rows = [row for row in rows if abs(row["loss_difference"]) < LOSS_TOLERANCE]
    chosen, rate = (rows[0]["of"], rows[0]["steps_per_second"]) if rows else ([], rate)
    script, args = carracing(dry, not dry, **split)
    steps = 3 * 32 if dry else int(0.9 * rate * budget)
    with record(**split, options=" + ".join(chosen) or "none", planned_steps=steps) as row:
        # In case that it is slower than it was measured to be. `train` stops at SIGTERM; what
        # comes after it must not.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        timer = threading.Timer(budget, os.kill, [os.getpid(), signal.SIGTERM])
        timer.daemon = True
        timer.start()
        with with_options(script, args, chosen), contextlib.suppress(SystemExit):
            script.train(replace(args, total_timesteps=steps))
        timer.cancel()
        (path,) = Path("runs").glob("*/agent.pt")
        progress = torch.load(path, map_location="cpu", weights_only=True)["progress"]
        row |= {"steps": progress["global_step"], "learning_seconds": progress["learning_seconds"]}
        names = ("seconds", "step", "episodic_return")
        columns = (progress["curve"][name] for name in names)
        points = [dict(zip(names, point, strict=True)) for point in zip(*columns, strict=True)]
        row["curve"] = [*points[: -1 : len(points) // 40 + 1], points[-1]]
        record.save(rows=record.rows)

        device = torch.device("cuda" if args.cuda else "cpu")
        agent, args = script.load_agent(path, device)
        short = {"env_kwargs": ("max_episode_steps=40",)} if dry else {}
        args = replace(args, num_envs=2 if dry else CORES, **short)
        returns, took = [], 0.0
        while time.monotonic() + 1.5 * took < until and len(returns) < (2 if dry else 100):
            started = time.monotonic()
            seed = args.seed + len(returns)
            returns += script.evaluate(agent, args, args.num_envs, seed, device).tolist()
            took = time.monotonic() - started
            mean, std = np.mean(returns).item(), np.std(returns).item()
            row |= {"eval_episodes": len(returns), "eval_mean": mean, "eval_std": std}
            record.save(rows=record.rows)


# The limit of each stage in seconds, of nine minutes; the training takes what is left.
STAGES = {tests: 80, speed: 100, options: 140, scripts: 130, training: 540}


class Record:
    """The rows of a stage, saved as they are completed; an error becomes a part of its row."""

    def __init__(self, path, stage):
        self.path, self.stage, self.rows = path, stage, []

    @contextlib.contextmanager
    def __call__(self, **row):
        self.rows.append(row)
        try:
            yield row
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[-1500:]
        self.save(rows=self.rows)

    def results(self):
        return json.loads(self.path.read_text())

    def save(self, **values):
        """Add to what gpu.json holds of the stage."""
        results = self.results()
        results["stages"].setdefault(self.stage, {}).update(values)
        write(self.path, json.dumps(results, indent=1) + "\n")


def write(path, text):
    """A kill at any time leaves a whole file."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def machine():
    """The card, its driver, the cores, and the versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        card, driver, memory = run.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        card = driver = memory = "unknown"
    found = {"card": card, "driver": driver, "memory": memory, "cores": CORES}
    found |= {"threads": torch.get_num_threads(), "python": sys.version.split()[0]}
    found |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return found | {"gymnasium": gymnasium.__version__}


def run_stage(name, seconds, path, dry):
    """Run a stage in a process and a folder of its own; its duration, and its error if any."""
    command = [sys.executable, __file__, "--stage", name, "--seconds", str(seconds)]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "SDL_VIDEODRIVER": "dummy"}
    settings |= {"OMP_NUM_THREADS": "1"} if dry else {}
    outcome, started = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, open(f"{scratch}/output.txt", "w+") as output:
        process = subprocess.Popen(
            [*command, *["--dry-run"] * dry, path.parent], cwd=scratch, env=os.environ | settings,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            problem = "failed" if process.wait(seconds) else None
        except subprocess.TimeoutExpired:
            problem = f"stopped at its limit of {seconds:.0f} s"
        finally:
            end_group(process)
        if problem:
            texts = [path.read_text() for path in sorted(Path(scratch).glob("*.txt"))]
            lines = [x for x in "\n".join(texts).splitlines() if "step/s" not in x]
            outcome["error"] = "\n".join([problem, *lines[-15:]])
    return outcome | {"seconds": time.monotonic() - started}


def end_group(process):
    """End a stage's process and all that it started, by SIGTERM or, after 5 seconds, SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(100):
            process.poll()
            os.killpg(process.pid, 0)  # ProcessLookupError if none is left
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(results):
    """The text of gpu.txt: the machine, each stage, and what paid."""
    kind = "dry run on the CPU, its numbers mean nothing" if results["dry_run"] else "on a GPU"
    lines = [f"benchmark/gpu.py, {kind}", ""]
    lines += [f"{name:14}{value}" for name, value in results["machine"].items()]
    for name, stage in results["stages"].items():
        lines += ["", f"{name}, {stage.get('seconds', 0):.0f} s", "", *table(stage.get("rows", []))]
        lines += [f"error: {stage['error']}"] if "error" in stage else []
        for row in stage.get("rows", []):
            lines += ["", *table(row["curve"])] if "curve" in row else []
    return "\n".join([*lines, "", conclusion(results)]) + "\n"


def table(rows):
    """Rows as aligned lines; errors, and reasons to skip, follow them."""
    apart = ("of", "curve", "skipped", "error")
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in apart]
    cells = [[name.replace("_", " ") for name in names]]
    for row in rows:
        values = [row.get(name, "-") for name in names]
        cells.append([f"{x:.5g}" if isinstance(x, float) else str(x) for x in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    for row in rows:
        found = [f"{name}: {row[name]}" for name in apart[2:] if name in row]
        lines += [f"{next(iter(row.values()))}: {text}" for text in found]
    return lines


def conclusion(results):
    """Which options paid by more than a tenth."""
    words, gpu = [], fastest(measured(results, "speed", "cuda"))
    if cpu := fastest(measured(results, "speed", "cpu")) if gpu else None:
        ratio = gpu["steps_per_second"] / cpu["steps_per_second"]
        words.append(f"--cuda is {ratio:.2f} times as fast as the CPU, each with its best split.")
    for row in measured(results, "speed", "cuda"):
        ratio = row["steps_per_second"] / gpu["steps_per_second"]
        words.append(f"{row['num_envs']} x {row['num_steps']}: {ratio:.2f} of the best split.")
    rows = measured(results, "options")
    names = [row["option"] for row in rows]
    paid = ", ".join(row["option"] for row in paying(rows)) or "none"
    words.append(f"Options that paid by more than a tenth: {paid}.")
    if missing := [name for name in OPTIONS[:-1] if name not in names]:
        words.append(f"Not measured: {'; '.join(missing)}.")
    return " ".join(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmark")
    parser.add_argument("--minutes", type=float, default=9, help="time for all stages")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what this process is to run,
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # and its limit
    args = parser.parse_args()
    path, stages = args.folder.resolve() / "gpu.json", {s.__name__: s for s in STAGES}
    if args.stage:
        record = Record(path, args.stage)
        stages[args.stage](record, json.loads(path.read_text()), args.seconds, args.dry_run)
        failed = sum("error" in row for row in record.rows)
        sys.exit(f"{failed} of {len(record.rows)} failed" if failed else 0)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("error: no GPU that PyTorch can use; --dry-run runs on the CPU")
    until = time.monotonic() + 60 * args.minutes - 10
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {"dry_run": args.dry_run, "minutes": args.minutes, "machine": machine(), "stages": {}}
    write(path, json.dumps(results))
    for name, stage in stages.items():
        seconds = min(STAGES[stage] * args.minutes / 9, until - time.monotonic())
        outcome = {"error": "no time was left"}
        if seconds > 10:
            outcome = run_stage(name, seconds, path, args.dry_run)
        record = Record(path, name)
        record.save(**outcome)
        results = record.results()
        write(path.with_suffix(".txt"), report(results))
        print(f"{name}: {outcome.get('error', 'ok')}", flush=True)
    print("", report(results), sep="\n")
    sys.exit(any("error" in stage for stage in results["stages"].values()))


if __name__ == "__main__":
    main()
