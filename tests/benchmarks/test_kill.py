"""Commands that are killed and run again end as if nothing had happened; six kills here, a hundred in the result."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCENARIOS = ["train", "sample to .npz", "sample to PNGs", "evaluate", "study", "study of two processes"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def kill():
    return runpy.run_path(str(BENCHMARKS / "kill.py"))


def check(result, kills):
    assert result["mismatches"] == []
    assert result["kills"] == result["resumptions"] == kills
    for count in ("by_scenario", "by_kind"):
        assert sum(result[count].values()) == kills
    assert list(result["by_scenario"]) == SCENARIOS
    assert min(result["by_scenario"].values()) >= kills // len(SCENARIOS)
    for name, stages in result["by_stage"].items():
        assert sum(stages.values()) == result["by_scenario"][name]
    assert sum(result["by_operation"].values()) == result["by_kind"]["operation"]
    for name, leftovers in result["leftovers"].items():  # at most one of each kill
        assert sum(leftovers.values()) <= result["by_scenario"][name]
    assert result["leftovers"]["train"] == {}


def test_six_kills(tmp_path):
    out = tmp_path / "results" / "kill.json"
    command = [sys.executable, str(BENCHMARKS / "kill.py"), "--kills", "6", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check(json.loads(out.read_text()), 6)
    assert "6 kills, 6 resumptions, 0 mismatches" in done.stdout


def test_the_published_hundred_kills():
    result = json.loads((BENCHMARKS / "results" / "kill.json").read_text())
    check(result, 100)
    assert set(result["by_kind"]) == {"operation", "time", "write", "start"}


def test_the_stages_are_functions_of_the_package(kill):
    source = BENCHMARKS.parent / "src" / "robustdiff"
    functions = {f"{p.name}:{name}" for p in source.rglob("*.py") for name in re.findall(r"def (\w+)\(", p.read_text())}
    assert not set(kill["STAGES"]) - functions


def outcome(folder):
    folder.mkdir()
    (folder / "result.json").write_text('{"fid": 1.5, "seconds": 3.0}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 7.0}\n{"step": 2}\n')
    (folder / "a.png").write_bytes(b"pixels")
    return folder


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("result.json", '{"fid": 1.5, "seconds": 4.0}', None),
        ("result.json", '{"fid": 1.6, "seconds": 3.0}', "result.json differs"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 1}\n{"step": 2}\n', "metrics.jsonl differs"),
        ("metrics.jsonl", '{"step": 2}\n', "metrics.jsonl differs"),
        ("a.png", "other pixels", "a.png differs"),
        ("b.png", "", "b.png is there, and is not without kills"),
        (".b.png.0123456789ab.tmp", "", None),
    ],
)
def test_what_is_compared(kill, tmp_path, name, text, reason):
    expected, _ = kill["snapshot"](outcome(tmp_path / "expected"))
    (outcome(tmp_path / "found") / name).write_text(text)
    found, leftovers = kill["snapshot"](tmp_path / "found")
    assert kill["difference"](expected, found) == reason
    assert leftovers == ({name} if name.endswith(".tmp") else set())
    if reason is not None and "without" in reason:
        assert kill["difference"](found, expected) == f"{name} is missing"


WRITER = """
import os, pathlib, runpy, signal, resource, sys
kill = runpy.run_path(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
kill["Operations"](folder, int(sys.argv[3]), eval(sys.argv[4]), os.open(os.devnull, os.O_WRONLY))
pathlib.Path(sys.argv[1]).read_text()
(folder.parent / "elsewhere").write_text("not counted")
os.mkdir(folder / "made")
with open(folder / "new", "w") as file:
    file.write("twelve bytes")
    file.flush()
    os.fsync(file.fileno())
os.rename(folder / "new", folder / "renamed")
os.remove(folder / "renamed")
os.rmdir(folder / "made")
"""


@pytest.mark.parametrize(
    ("target", "limit", "number", "left"),
    [
        (1, None, signal.SIGKILL, {}),
        (2, None, signal.SIGKILL, {"made": None}),
        (3, None, signal.SIGKILL, {"made": None, "new": "twelve bytes"}),
        (4, None, signal.SIGKILL, {"made": None, "new": "twelve bytes"}),
        (5, None, signal.SIGKILL, {"made": None, "renamed": "twelve bytes"}),
        (6, None, signal.SIGKILL, {"made": None}),
        (7, None, None, {}),
        (1, 5, signal.SIGXFSZ, {"made": None, "new": "twelv"}),
    ],
)
def test_a_process_ends_at_the_operation_that_is_asked_for(tmp_path, target, limit, number, left):
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = [BENCHMARKS / "kill.py", folder, target, limit]
    done = subprocess.run([sys.executable, "-c", WRITER, *map(str, arguments)], timeout=240)
    assert done.returncode == (0 if number is None else -number)
    assert {p.name: p.read_text() if p.is_file() else None for p in folder.iterdir()} == left
