"""A recipe or study file of somebody else runs no code, takes no more time or memory than its size, and loses nothing.

Each text is read through the command line; what is refused is refused in one line, before anything is made.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.yaml_reader import MOST_BYTES, MOST_VALUES, parse_yaml, read_yaml

SRC = Path(__file__).resolve().parents[2] / "src" / "robustdiff"


def bomb(levels: int = 9, width: int = 10) -> str:
    """Aliases nested so that they stand for width**levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels: int = 30) -> str:
    """Merge keys nested so that they stand for 2**levels pairs."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases": (bomb(), "aliases written out"),
    "merged aliases": (merge_bomb(), "aliases written out"),
    "a chain of aliases": (
        "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)),
        "nested more than",
    ),
    "an alias of itself": ("data: &a [*a]", "within its own anchor"),
    "nested lists": ("data: " + "[" * 100_000, "nested more than"),
    "nested mappings": ("{a: " * 50_000, "nested more than"),
    "nested sequences": ("- " * 100_000, "nested more than"),
    "many values": ("data: [" + "1," * 100_000 + "1]", "values"),
    "a key twice": ("steps: 1\nlr: 1.0\nsteps: 1000", "the key 'steps' is given twice (line 3)"),
    "a key twice below": ("data: {name: digits, name: fashion-16}", "the key 'name' is given twice"),
    "a key twice in two spellings": ("data: {1: a, 0x1: b}", "given twice"),
    "a key that is a list": ("? [a, b]\n: 1", "key"),
    "an object": ("data: !!python/object/apply:os.system ['touch pwned']", "tag"),
    "bytes": ("output: !!binary aGVsbG8=", "tag"),
    "a set": ("data: !!set {a, b}", "tag"),
    "a tagged number without digits": ("steps: !!int ''", "tag"),
    "a number without digits": ("steps: 0x_", "not YAML"),
    "a long integer": ("steps: " + "9" * 5000, "a number of 5000 characters"),
    "a long hexadecimal integer": ("steps: 0x" + "f" * 100_000, "a number of"),
    "two documents": ("--- {steps: 1}\n--- {steps: 2}", "not YAML"),
    "a NUL byte": ("output: a\0b", "not YAML"),
    "a large file": ("# " + "x" * MOST_BYTES, "bytes"),
    "not UTF-8": ("output: caf\udce9", "not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["train", "study"])
def test_hostile_yaml_is_refused_in_one_line(tmp_path, monkeypatch, robustdiff, command, name):
    text, words = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    outcome = robustdiff(command, "bad.yaml")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert os.listdir() == ["bad.yaml"], "nothing ran or was made"


def test_aliases_within_bounds_are_read():
    text = "base: &base {lr: 1.0, steps: 3}\nother: {<<: *base, steps: 4}\nlist: [*base, *base]"
    assert parse_yaml(text, "x") == yaml.safe_load(text)
    assert len(parse_yaml(f"[{'1,' * (MOST_VALUES - 2)}1]", "x")) == MOST_VALUES - 1


@pytest.mark.parametrize("date", ["2020-99-01", "2020-01-01", "2020-01-01 25:61:61", "0000-00-00"])
def test_what_looks_like_a_date_is_a_name(tmp_path, date):
    """PyYAML would make an object of it, or raise ValueError where there is no such day."""
    (tmp_path / "r.yaml").write_text(f"data: digits\noutput: {date}\n")
    assert load_recipe(str(tmp_path / "r.yaml"), [f"data.root={date}"]).output == date
    with pytest.raises(InputError, match="steps"):
        load_recipe(str(tmp_path / "r.yaml"), [f"steps={date}"])


@pytest.mark.parametrize(
    "assignment",
    [
        "process.T=1000000000",
        "model.layers=1000000000",
        "model.channels=[65536]",
        "model.channels=[1000000000]",
        "model.channels=[4096,4096,4096,4096,4096,4096,4096,4096]",
        f"model.channels=[{'32,' * 100}32]",
        "model.groups=1000000000",
        "model.head_width=1000000000",
        "data.workers=1000000",
        "data.size=1000000",
        "batch_size=1e12",
        "batch_size=9999999999999999999999",
        "accumulate=10000000000",
        "steps=1e18",
        "warmup=1e18",
        "threads=1000000",
        "keep=1e18",
        "seed=99999999999999999999",
        "adversary.steps=1000000000",
        "sampler.steps=1000000000",
        "lr=.inf",
        "lr=.nan",
        "lr=1e400",
        "steps=true",
        'output="a\\0b"',
        'output="\\e[31mred"',
        'output="\\ud800"',
        f"output={'x' * 10_000}",
        "data.root=[a]",
        "objective.name=[denoising]",
        "objective.1=2",
        f"lr={'[' * 10_000}",
    ],
)
def test_a_field_out_of_bounds_is_refused_before_anything_is_made(tmp_path, monkeypatch, robustdiff, assignment):
    monkeypatch.chdir(tmp_path)
    outcome = robustdiff("train", "digits", "--set", "output=run", "--set", assignment)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert assignment.partition("=")[0].split(".")[0] in outcome.err
    assert outcome.err[:-1].isprintable()
    assert not list(tmp_path.iterdir())


def test_bounds_leave_room_for_real_recipes():
    """Larger than what is published: Imagen's largest UNet has 2 billion parameters."""
    large = {"channels": [512, 1024, 1536, 2048], "layers": 8, "groups": 32}
    recipe = Recipe.model_validate(
        {"model": large, "batch_size": 65_536, "accumulate": 64, "steps": 10**8, "process": {"T": 4000}}
    )
    assert recipe.model.layers == 8


def test_a_recipe_that_is_no_file_is_not_waited_for(tmp_path, robustdiff):
    os.mkfifo(tmp_path / "pipe.yaml")
    for command in "train", "study":
        outcome = robustdiff(command, tmp_path / "pipe.yaml")
        assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)
        outcome = robustdiff(command, "x" * 5000 + ".yaml")
        assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)


def test_names_in_messages_are_escaped(tmp_path, robustdiff):
    (tmp_path / "r.yaml").write_text('"\\e]0;title\\a\\e[2J": 1')
    outcome = robustdiff("train", tmp_path / "r.yaml")
    assert (outcome.code, outcome.err[:-1].isprintable()) == (2, True)
    assert "\\x1b[2J" in outcome.err
    outcome = robustdiff("train", "\x1b[2J.yaml")
    assert (outcome.code, outcome.err[:-1].isprintable()) == (2, True)


def test_yaml_is_read_in_one_place():
    """Elsewhere PyYAML only writes."""
    readers = [
        p.name for p in SRC.rglob("*.py") if any(w in p.read_text() for w in ("safe_load", "yaml.load", "Loader)"))
    ]
    assert set(readers) <= {"yaml_reader.py"}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates().map(str)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
PIECES = [
    "&a ",
    "*a ",
    "<<: ",
    "!!int ",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "  ",
    "a",
    "1",
    "'",
    '"',
    "|\n",
    "#",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*PIECES, *Recipe.model_fields]), max_size=30).map("".join)
    | st.text(max_size=40)
    | st.dictionaries(st.sampled_from(list(Recipe.model_fields)), VALUES, max_size=3).map(yaml.safe_dump)
)
def test_any_text_is_read_or_refused_in_one_line(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for read in (lambda: read_yaml(path), lambda: load_recipe(str(path))):
        try:
            read()
        except InputError as error:
            assert len(str(error).splitlines()) == 1
