"""Every command is a file, is thin, has help, and answers bad input with one clear line."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustdiff import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(p.stem for p in Path(cli.__file__).parent.glob("*.py") if p.stem not in ("__init__", "options"))


def command(name: str) -> ast.FunctionDef:
    """Return the function of a command's file."""
    tree = ast.parse(Path(cli.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list)
    return function


@pytest.mark.parametrize("name", COMMANDS)
def test_each_file_is_a_command_of_at_most_fifteen_lines(name):
    function = command(name)
    assert function.name == name
    assert ast.get_docstring(function)
    assert sum(statement.end_lineno - statement.lineno + 1 for statement in function.body[1:]) <= 15


def test_help_names_every_command_without_torch():
    code = "import sys; sys.argv[1:] = ['--help']; from robustdiff.cli import app; app(standalone_mode=False)"
    code += "; print([m for m in ('torch', 'numpy', 'diffusers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert listed[:-1] == [name.replace("_", "-") for name in COMMANDS]  # and the epilog
    assert done.stdout.splitlines()[-1] == "[]"
    assert "..." not in done.stdout.partition("Commands:")[2], "no summary is cut"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_for_each_option(robustdiff, name):
    outcome = robustdiff(name.replace("_", "-"), "--help")
    assert outcome.code == 0
    options = outcome.out.partition("Options:")[2]
    assert options
    assert not re.search(r"<(int|float|str|path|list)", options), "values have names, and not Python's types"


def test_version(robustdiff):
    assert robustdiff("--version").out.strip().count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such-recipe"], ["no-such-recipe", "digits"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["train", "digits", "--set", "learning_rate=1"], ["learning_rate", "lr"]),
        (["train", "digits", "--set", "adversary.alpha=1"], ["adversary.alpha", "step_size"]),
        (["train", "digits", "--set", "steps=0"], ["steps"]),
        (["train", "digits", "--set", "lr"], ["--set lr: write it as KEY=VALUE"]),
        (["train", "digits", "--set", "data=cifar"], ["cifar", "fashion-16"]),
        (["train", "digits", "--set", "data=imagefolder", "--set", "data.root=/no/such"], ["/no/such"]),
        (["train", "digits", "--set", "model.channels=[8,16,32,64,64]"], ["8×8", "model.channels"]),
        (["train", "digits", "--set", "batch_size=7", "--set", "accumulate=2"], ["batch_size", "accumulate"]),
        (["train", "digits", "--set", "process=flow"], ["flow"]),
        (["train", "fashion-16-at", "--set", "data=digits"], ["16×16", "data.size=16"]),
        (  # before the images are looked for
            ["train", "fashion-16-at", "--set", "data=imagefolder", "--set", "data.root=none", "--set", "data.size=8"],
            ["16×16", "8×8", "set data.size=16"],
        ),
        (["train", "fashion-16-at", "--set", "data.channels=3"], ["channels", "data.channels=1"]),
        (["sample", "no-such-run"], ["no-such-run", "fashion-16"]),
        (["evaluate", "no-such-run"], ["no-such-run"]),
        (["sample", ""], ["an argument is empty"]),
        (["sample", "fashion-16", "--sampler", ""], ["--sampler is empty"]),
        (["evaluate", "fashion-16", "--output="], ["--output is empty"]),
        (["evaluate", "fashion-16", "--root", ""], ["--root is empty"]),
        (["demo", "--seed", str(2**63)], ["--seed", str(2**63 - 1)]),
        (["tune", "fashion-16-at", "--sampler", "ddim", "--steps", "2", "--seed", str(2**64)], ["--seed"]),
        (["tune", "fashion-16-at", "--sampler", "ddim", "--steps", "2", "--processes", "1000000"], ["--processes"]),
        (["study", "x.yaml", "--dry-run", "--report", "x.md"], ["--dry-run", "--report"]),
        (["sample"], ["argument"]),  # typers before 0.20 write the name in capitals
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_arguments_are_one_line(robustdiff, tmp_path, monkeypatch, arguments, words, assert_bad_input):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(robustdiff(*arguments), *words)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EFBIG, "limit of the size of a file")]
)
def test_a_full_disk_fails_with_1(robustdiff, digits_run, tmp_path, monkeypatch, number, words):
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    outcome = robustdiff("sample", digits_run, "--output", tmp_path / "s.npz", "--num", 4, "--steps", 2)
    assert outcome.code == 1
    assert words in outcome.err
    assert not (tmp_path / "s.npz").exists()


def test_a_full_gpu_is_one_line_that_names_what_takes_less_memory(robustdiff, digits_run, tmp_path, monkeypatch):
    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    for where in ("robustdiff.evaluation.generate.sample", "robustdiff.training.trainer.Trainer.updates"):
        monkeypatch.setattr(where, full)
    train = ("train", "digits", "--cpu", "--set", f"output={tmp_path / 'run'}")
    for command in (("sample", digits_run, "--output", tmp_path / "s.npz", "--cpu"), train):
        outcome = robustdiff(*command)
        assert outcome.code == 1
        line = outcome.err.splitlines()[-1]
        assert "Traceback" not in outcome.err
        assert "Tried to allocate 2.00 GiB" in line
        for word in ("accumulate", "gradient_checkpointing", "capture", "--batch-size", "--precision"):
            assert word in line


def test_a_traceback_is_never_shown_for_bad_input(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "robustdiff", "train", "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_ctrl_c_before_the_work_is_one_line(robustdiff, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("robustdiff.recipe.load_recipe", lambda *given, **settings: signal.raise_signal(signal.SIGINT))
    outcome = robustdiff("train", "digits")
    assert (outcome.code, outcome.err) == (130, "robustdiff: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_command_even_in_a_destructor():
    code = """if True:
        import signal
        from robustdiff import cli

        class Dying:
            def __del__(self):
                signal.raise_signal(signal.SIGTERM)

        cli._check_values = lambda arguments: Dying() and None
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "robustdiff: interrupted\n")


def test_sigterm_leaves_no_temporary_files(tmp_path):
    code = """if True:
        import signal
        from robustdiff import cli
        from robustdiff.files import atomic_folder, atomic_write, scratch_folder

        def work(arguments):
            with scratch_folder() as scratch, atomic_folder("folder") as folder, atomic_write("file") as file:
                for path in (scratch, folder):
                    (path / "part").write_text("half")
                file.write(b"half")
                signal.raise_signal(signal.SIGTERM)

        cli._check_values = work
        cli.main()
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "robustdiff: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_reader_that_has_ended_gets_no_message():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "robustdiff", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_without_a_character_is_no_error(robustdiff, monkeypatch, encoding):
    """As that of a file to which stdout is redirected on Windows."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr("robustdiff.backbones.adm.convert.convert", lambda source, output: None)
    assert robustdiff("convert", "a", "b").code == 0
    cli.say("−2 ≤ ‖δ‖ ☃")
    sys.stdout.flush()
    assert written.getvalue() == rb"a -> b" + b"\n" + rb"-2 <= ||delta|| \u2603" + b"\n"


@pytest.mark.parametrize(
    ("arguments", "works", "returned"),
    [
        (["train", "digits"], "robustdiff.training.run.train", None),
        (["study", "STUDY"], "robustdiff.study.run.run_study", False),
        (
            ["tune", "fashion-16-at", "--sampler", "ddim", "--steps", "2", "--updates", "8"],
            "robustdiff.study.tune.tune",
            (),
        ),
        (["demo"], "robustdiff.demo.run_demo", None),
        (["reproduce", "cell.json"], "robustdiff.study.run.reproduce", None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_was_stopped_is_told_from_what_is_finished(robustdiff, monkeypatch, tmp_path, arguments, works, returned):
    """By the exit code, so that no shell or scheduler goes on as if it were finished."""
    monkeypatch.chdir(tmp_path)
    study = ROOT / "benchmarks" / "studies" / "length.yaml"
    monkeypatch.setattr(works, lambda *arguments, **settings: returned)
    outcome = robustdiff(*(study if word == "STUDY" else word for word in arguments))
    assert outcome.code == 130
    assert "goes on from" in outcome.err


def test_without_a_command_the_help_is_shown(robustdiff):
    assert robustdiff() == robustdiff("--help")
