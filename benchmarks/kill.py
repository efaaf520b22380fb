"""Kill the commands at any moment, run them again, and compare with a run that nothing interrupted.

A trial runs one command in a folder of its own, kills it once to four times, and then lets it finish. What the folder
then holds must equal what the uninterrupted command left: parameters, optimiser, samples and pictures bit for bit,
the lines of ``metrics.jsonl``, the numbers of results and cells, and the names of all files. Only times and speeds may
differ. There are four kinds of kills:

    start       SIGKILL at a uniformly random time of the start-up of ``python -m robustdiff``
    time        SIGKILL at a uniformly random time of the work
    operation   SIGKILL just before a random file operation: open, fsync, rename, remove, mkdir, rmdir
    write       in the middle of a write: the kernel stops the process at a random byte of a file (RLIMIT_FSIZE, whose
                signal SIGXFSZ is left at its default, which is to end the process without its being asked)

All but the first are of processes forked from this one, which has imported everything, so that they take little time.
Hidden temporary files, which nothing takes for a result, are counted as ``leftovers`` where a command leaves them.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 100 --output benchmarks/results/kill.json
"""

import argparse
import faulthandler
import hashlib
import importlib
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process with threads cannot be forked

KINDS = ("operation", "time", "write", "operation", "time", "start", "operation", "time", "write", "operation")
"""The kinds of kill, taken in turns."""

MOST = 4  # kills of one trial
TRAIN = [
    *("model.channels=[8,16]", "model.groups=4", "batch_size=8", "threads=1", "warmup=0"),
    *("steps=12", "checkpoint_every=3", "log_every=3"),
]
STUDY = """
title: Two methods
recipe: digits
set:
  {model.channels: [8, 16], model.groups: 4, batch_size: 8, threads: 1, warmup: 0, steps: 6, checkpoint_every: 3}
baseline: plain
methods:
  plain: {set: {adversary: {name: none}}}
  free: {}
measure:
  {samplers: [ddim], steps: [2], num: 16, batch_size: 8, features: digits, mismatch: 40, mismatch_methods: [free]}
"""


@dataclass(frozen=True)
class Scenario:
    """A command.

    Attributes:
        arguments: Those of ``robustdiff``; paths are relative to the trial's folder.
        processes: How many share the work. The first is killed, the others go on.
        files: What the folder holds before.
    """

    arguments: tuple[str, ...]
    processes: int = 1
    files: dict[str, str] = field(default_factory=dict)


_SAMPLE = ("sample", "../trained", "--sampler", "iddpm", "--steps", "5", "--num", "24", "--batch-size", "4", "--output")
_STUDY = ("study", "study.yaml", "--output", "study")
SCENARIOS = {
    "train": Scenario(("train", "digits", "--resume", *(a for s in [*TRAIN, "output=run"] for a in ("--set", s)))),
    "sample to .npz": Scenario((*_SAMPLE, "samples.npz")),
    "sample to PNGs": Scenario((*_SAMPLE, "samples")),
    "evaluate": Scenario(
        ("evaluate", "../trained", "--steps", "2,3", "--num", "16", "--batch-size", "8", "--output", "results")
    ),
    "study": Scenario(_STUDY, files={"study.yaml": STUDY}),
    "study of two processes": Scenario(_STUDY, processes=2, files={"study.yaml": STUDY}),
}

STAGES = {
    "trainer.py:export": "export of the model",
    "checkpoint.py:save_checkpoint": "checkpoint write",
    "checkpoint.py:load_checkpoint": "checkpoint read",
    "checkpoint.py:newest_checkpoint": "checkpoint read",
    "run.py:_prepare": "preparation of the run",
    "trainer.py:__init__": "preparation of the run",
    "build.py:build_model": "preparation of the run",
    "registry.py:load": "preparation of the run",
    "recipe.py:load_recipe": "preparation of the run",
    "metrics_log.py:_drop_after": "metrics",
    "metrics_log.py:flush": "metrics",
    "trainer.py:updates": "training",
    "run.py:train": "preparation of the run",
    "run.py:_run": "training, between updates",
    "generate.py:write_npz": "write of samples",
    "generate.py:write_pngs": "write of samples",
    "generate.py:load": "load of the model",
    "generate.py:sample": "sampling",
    "reference.py:reference_statistics": "statistics of the real images",
    "results.py:write_results": "write of results",
    "grid.py:evaluate_grid": "evaluation",
    "grid.py:evaluate_cell": "evaluation",
    "measure.py:measure_mismatch": "mismatch",
    "store.py:write": "write of a study's file",
    "files.py:held": "locks of a study",
    "run.py:_work": "a study's other work",
    "schema.py:load_study": "read of a study",
}
"""The stage of a program by the innermost of these functions that is being executed."""

TIMES = ("seconds", "images_per_second")
OPERATION = "file operation: "
RANDOM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{12}|\d{6}")  # what differs in the names of temporary files of one kind
SECRET = "cache/key"  # a random number in the user's cache, if there is one


# -- one process -------------------------------------------------------------------------------------------------


class Operations:
    """Counts the file operations below a folder; before the one numbered ``target`` it ends the process.

    Args:
        folder: Where.
        target: The number, from 1; 0 is none.
        limit: Let the operation be, but allow no file to grow beyond so many bytes from then on. None: SIGKILL.
        report: A file descriptor: one line for each operation, and the traceback of where the process ended.
    """

    def __init__(self, folder, target, limit, report):
        self.folder, self.target, self.limit, self.report = str(folder), target, limit, report
        self.count = 0
        self.fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._audit)

    def _fsync(self, descriptor):
        self._one("fsync")
        self.fsync(descriptor)

    def _audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._at("open", path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self._at(event.removeprefix("os."), arguments[0], arguments[-1])

    def _at(self, name, path, directory=-1):
        if not isinstance(path, str | bytes | os.PathLike):
            return
        # Relative to an open folder: shutil.rmtree, which knows where it is.
        inside = isinstance(directory, int) and directory >= 0 and name in ("remove", "rmdir")
        if inside or os.path.abspath(os.fsdecode(path)).startswith(self.folder + os.sep):
            self._one(name)

    def _one(self, name):
        self.count += 1
        os.write(self.report, f"{OPERATION}{name}\n".encode())
        if self.count != self.target:
            return
        if self.limit is None:
            faulthandler.dump_traceback(self.report)
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


class Process:
    """A command in a process forked from this one.

    Args:
        arguments: Those of ``robustdiff``.
        folder: Where it works.
        target: As in :class:`Operations`.
        limit: As in :class:`Operations`.
    """

    def __init__(self, arguments, folder, target=0, limit=None):
        self.lines, self.rest = [], b""
        self.reader, writer = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reader)
            _work(arguments, folder, target, limit, writer)
        os.close(writer)

    def read(self, seconds):
        """Take what the process reports, for at most so many seconds; False where it has ended."""
        ready, _, _ = select.select([self.reader], [], [], max(0.0, seconds))
        if not ready:
            return True
        data = os.read(self.reader, 2**16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.lines += [line.decode(errors="replace") for line in lines]
        return bool(data)

    def kill_after(self, seconds):
        """End it at a time after its start, when it has said where it is."""
        while (left := self.started + seconds - time.monotonic()) > 0:
            if not self.read(left):
                return
        os.kill(self.pid, signal.SIGUSR1)
        for _ in range(20):
            if not self.read(0.005) or any(line.startswith("  File") for line in self.lines):
                break
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        """Return the exit code, negative for a signal."""
        while self.read(3600):
            pass
        os.close(self.reader)
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.monotonic() - self.started
        return os.waitstatus_to_exitcode(status)

    @property
    def operations(self):
        return [line.removeprefix(OPERATION) for line in self.lines if line.startswith(OPERATION)]

    @property
    def said(self):
        return "\n".join(line for line in self.lines if not line.startswith(OPERATION))[-2000:]

    @property
    def stage(self):
        """Return the stage that the process was in when it ended."""
        frames = re.findall(r'File "(.*?)", line \d+ in (\S+)', "\n".join(self.lines))
        package = str(Path(sys.modules["robustdiff"].__file__).parent)
        own = [(Path(path).name, function) for path, function in frames if path.startswith(package)]
        for file, function in own:
            if (stage := STAGES.get(f"{file}:{function}")) is not None:
                return stage
        # The first import of what only some commands use is a part of the start-up too.
        return "start-up" if not own or own[0][1] in ("<module>", "main") else "elsewhere in the command"


def _work(arguments, folder, target, limit, report):
    """Be the command; does not return."""
    code = 1
    try:
        os.chdir(folder)
        os.dup2(report, 1)  # a pipe, which RLIMIT_FSIZE is not for
        os.dup2(report, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(report), "w", buffering=1)
        faulthandler.register(signal.SIGUSR1, file=report)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        faulthandler.register(signal.SIGXFSZ, file=report, chain=True)
        os.environ["ROBUSTDIFF_CACHE"] = str(folder / "cache")
        sys.argv = ["robustdiff", *arguments]
        from robustdiff import cli

        Operations(folder, target, limit, report)
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def start_up(arguments, folder, seconds):
    """Run a command in an interpreter of its own, and kill it after so many seconds; returns its exit code."""
    environment = {**os.environ, "ROBUSTDIFF_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "robustdiff", *arguments]
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=seconds).returncode
    except subprocess.TimeoutExpired:  # and killed
        return -signal.SIGKILL


# -- what a command left -----------------------------------------------------------------------------------------


def _numbers(value):
    """Return what JSON holds but for times and speeds."""
    if isinstance(value, dict):
        return {name: _numbers(v) for name, v in value.items() if name not in TIMES}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def _content(path):
    """Return what must be equal of a file."""
    if path.suffix == ".json":
        return _numbers(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [_numbers(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".npz":  # its bytes hold the time
        with zipfile.ZipFile(path) as archive:
            members = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
            return {"members": members, "comment": archive.comment.decode()}
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder):
    """Return what a folder holds, by relative path, and its hidden temporary files and folders."""
    contents, leftovers = {}, set()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        temporary = [i for i, p in enumerate(relative.parts) if p[0] == "." and p.endswith((".tmp", ".parts"))]
        if temporary:
            leftovers.add(str(Path(*relative.parts[: temporary[0] + 1])))
        elif path.is_file():
            contents[str(relative)] = None if str(relative) == SECRET else _content(path)
    return contents, leftovers


def difference(expected, found):
    """Return the first difference between two snapshots in words, or None."""
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is there, and is not without kills"
        if expected[name] != found[name]:
            return f"{name} differs"
    return None


# -- trials ------------------------------------------------------------------------------------------------------


class Experiment:
    """Trials of all scenarios, and their counts.

    Args:
        work: A folder for them.
        seed: Decides kinds, times and operations.
    """

    def __init__(self, work, seed):
        self.work, self.random = work, random.Random(seed)
        self.kills = {name: Counter() for name in SCENARIOS}
        self.stages = {name: Counter() for name in SCENARIOS}
        self.operations = Counter()
        self.leftovers = {name: Counter() for name in SCENARIOS}
        self.trials = self.resumptions = 0
        self.mismatches = []
        self.expected, self.seconds, self.counts = {}, {}, {}

    def _folder(self, name, scenario):
        folder = self.work / name
        folder.mkdir()
        for file, text in scenario.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    def reference(self, name):
        """Run a scenario to its end, and keep what it leaves, its time and the number of its file operations."""
        scenario = SCENARIOS[name]
        folder = self._folder(f"reference {name}", scenario)
        process = Process(scenario.arguments, folder)
        if process.wait() != 0:
            raise SystemExit(f"{name} fails without kills: {process.said}")
        self.expected[name], leftovers = snapshot(folder)
        if leftovers:
            raise SystemExit(f"{name} leaves {leftovers} without kills")
        self.seconds[name], self.counts[name] = process.seconds, len(process.operations)

    def measure_start_up(self):
        """Measure how long an interpreter takes until it works."""
        start = time.monotonic()
        start_up(["sample", "nothing"], self._folder("start-up", Scenario(())), 600)
        self.start_up = time.monotonic() - start

    def trial(self, name, kinds):
        """Kill a command as the kinds say, let it finish, and compare; returns how many of the kills hit it."""
        scenario = SCENARIOS[name]
        self.trials += 1
        folder = self._folder(f"trial {self.trials}", scenario)
        partners = [Process(scenario.arguments, folder) for _ in range(scenario.processes - 1)]
        done, hits, code, left = [], 0, -1, 1.0
        for kind in kinds:
            process, what, code, share = self._attempt(scenario, folder, kind, left / scenario.processes, name)
            done.append(f"{kind} {what}")
            if code >= 0:
                break
            hits += 1
            left = max(0.1, left - share)
            self.kills[name][kind] += 1
            self.stages[name]["start-up" if process is None else process.stage] += 1
            if kind == "operation":
                self.operations[process.operations[-1]] += 1
        self.resumptions += hits
        rest = [*partners, *([Process(scenario.arguments, folder)] if code < 0 else [])]
        failed = [process.said for process in rest if process.wait() != 0]
        if code > 0:
            failed.append("start-up" if process is None else process.said)
        self._compare(name, folder, failed, done)
        return hits

    def _attempt(self, scenario, folder, kind, left, name):
        """Run once, and kill: the process, where it was to hit, its exit code, and which share of the work it did."""
        if kind == "start":
            seconds = self.random.uniform(0, self.start_up)
            return None, f"{seconds:.3f} s", start_up(scenario.arguments, folder, seconds), 0.0
        if kind == "time":
            seconds = self.random.uniform(0, left * self.seconds[name])
            process = Process(scenario.arguments, folder)
            process.kill_after(seconds)
            return process, f"{seconds:.3f} s", process.wait(), seconds / self.seconds[name]
        target = self.random.randint(1, math.ceil(left * self.counts[name]))
        limit = int(2 ** self.random.uniform(0, 14)) if kind == "write" else None
        process = Process(scenario.arguments, folder, target, limit)
        where = f"{target}" if limit is None else f"from {target} on, {limit} bytes"
        return process, where, process.wait(), target / self.counts[name]

    def _compare(self, name, folder, failed, done):
        if failed:
            reason = f"failed: {failed}"
        else:
            found, leftovers = snapshot(folder)
            reason = difference(self.expected[name], found)
            self.leftovers[name].update(RANDOM.sub("*", leftover) for leftover in leftovers)
        if reason is None:
            shutil.rmtree(folder)
        else:
            self.mismatches.append({"scenario": name, "kills": done, "reason": reason, "folder": folder.name})


def preload():
    """Import what the commands use, so that forked processes need not."""
    for module in ("cli", "training.run", "evaluation.grid", "report.results", "report.page", "study.run"):
        importlib.import_module(f"robustdiff.{module}")
    from robustdiff.recipe import load_recipe

    load_recipe("digits")  # imports the kinds of all things


def run(kills, seed, work, say):
    preload()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in a process that does not yet say where it is
    experiment = Experiment(work, seed)
    for name in SCENARIOS:
        experiment.reference(name)
        say(f"{name}: {experiment.seconds[name]:.1f} s and {experiment.counts[name]} file operations without kills")
        if name == "train":
            shutil.copytree(work / f"reference {name}" / "run", work / "trained")
    experiment.measure_start_up()
    names, number = list(SCENARIOS), 0
    wanted = {name: len(range(i, kills, len(names))) for i, name in enumerate(names)}
    for name in names:
        while (missing := wanted[name] - experiment.kills[name].total()) > 0:
            planned = min(missing, experiment.random.randint(1, MOST))
            kinds = [KINDS[(number + i) % len(KINDS)] for i in range(planned)]
            if SCENARIOS[name].processes > 1:  # the others would have finished before it works
                kinds = ["time" if kind == "start" else kind for kind in kinds]
            hits = experiment.trial(name, kinds)
            number += max(1, hits)
            say(f"{name}: {hits} kills")
            if len(experiment.mismatches) >= 10:  # something is wrong, and more says no more
                return _record(experiment, seed)
    return _record(experiment, seed)


def _record(experiment, seed):
    from importlib.metadata import version

    total = {name: counter.total() for name, counter in experiment.kills.items()}
    return {
        "kills": sum(total.values()),
        "resumptions": experiment.resumptions,
        "trials": experiment.trials,
        "mismatches": experiment.mismatches,
        "by_scenario": total,
        "by_kind": dict(sum(experiment.kills.values(), Counter())),
        "by_stage": {name: dict(counter.most_common()) for name, counter in experiment.stages.items()},
        "by_operation": dict(experiment.operations.most_common()),
        "leftovers": {name: dict(counter) for name, counter in experiment.leftovers.items()},
        "settings": {
            "seed": seed,
            "seconds": {name: round(seconds, 2) for name, seconds in experiment.seconds.items()},
            "operations": experiment.counts,
            "start_up_seconds": round(experiment.start_up, 2),
            "torch": version("torch"),
            "python": platform.python_version(),
            "system": platform.system(),
            "machine": platform.machine(),
        },
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the counts here, as JSON")
    parser.add_argument("--keep", type=Path, help="an empty or new folder for the trials, which is kept")
    options = parser.parse_args(arguments)

    def say(line):
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        work = (options.keep or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        result = run(options.kills, options.seed, work, say)
    say(f"{result['kills']} kills, {result['resumptions']} resumptions, {len(result['mismatches'])} mismatches")
    for mismatch in result["mismatches"]:
        say(f"{mismatch['scenario']} ({'; '.join(mismatch['kills'])}): {mismatch['reason']}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
