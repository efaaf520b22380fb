"""The README is short, and its numbers are those of the committed results. tests/test_docs.py runs its commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import robustdiff

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARY = (ROOT / "docs" / "results-summary.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "docs" / f"results{name}.md" for name in ("", "-constant-rate", "-consistency", "-length", "-one-sampler")
]
CHANGE = r"[+−]\d+\.\d% \([+−]\d+\.\d% … [+−]\d+\.\d%\)(?:, p = [\d.]*\d)?"


EFFECT = re.compile(r"^\| (.+?) \| (.+?) \| (\d+) \| (\S+) \| (\S+ … \S+) \| (\S.*?) \|$", re.MULTILINE)
"""A row of a table of effects: comparison, sampler, trainings, change, interval and p-value."""


def text_of(page: Path) -> str:
    """Return the text of a page without emphasis, in which the row of an effect is also as it is quoted."""
    text = page.read_text(encoding="utf-8").replace("**", "")
    quoted = "".join(
        f"{change} ({interval}), p {p if p.startswith('<') else f'= {p}'}\n"
        for *_, change, interval, p in EFFECT.findall(text)
    )
    return f"{text}\n{quoted}"


def effects(page: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the trainings, change, interval and p-value of a page's effects, by comparison and sampler, unmarked."""
    found = EFFECT.findall(page.read_text(encoding="utf-8").replace("**", ""))
    return {(comparison, sampler): tuple(rest) for comparison, sampler, *rest in found}


def test_it_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("text", [README, SUMMARY], ids=["README.md", "results-summary.md"])
def test_the_table_by_length_is_that_of_the_page(text):
    found = effects(ROOT / "docs" / "results-length.md")
    for updates in ("600", "1,700", "4,800"):
        plain = updates.replace(",", "")
        own = [found[f"free-{plain} vs repeat-{plain}", sampler] for sampler in ("iddpm", "dpm++")]
        changes = [f"{change} ({interval})" for _, change, interval, _ in own]
        assert f"| {' | '.join([updates, own[0][0], *changes])} |" in text.splitlines()


def summary_rows() -> list[list[str]]:
    return [row.strip("| ").split(" | ") for row in SUMMARY.splitlines() if re.match(r"\| (plain|random|three) ", row)]


@pytest.mark.parametrize("row", summary_rows(), ids=lambda row: f"{row[0]}, {row[1]}".replace("`", ""))
def test_a_row_of_the_summary_is_that_of_the_page(row):
    against, sampler, change, interval, p, trainings = row
    method = {
        "plain fine-tuning": "plain",
        "random perturbations of the same size": "random-k3-a0.3",
        "three clean passes over the same batches": "repeat-k3",
    }[against]
    expected = effects(PAGES[0])[f"free-k3-a0.3 vs {method}", sampler.replace("`", "")]
    assert (trainings, change, interval, p) == expected


@pytest.mark.parametrize("text", [README, SUMMARY], ids=["README.md", "results-summary.md"])
def test_quoted_results_are_those_of_the_pages(text):
    pages = "\n".join(map(text_of, PAGES))
    quoted = [line.removeprefix("> ").replace("**", "") for line in text.splitlines() if line.startswith("> ")]
    changes = re.findall(CHANGE, text.replace("\n", " "))
    assert changes
    for line in quoted:
        assert line in pages.splitlines()
    for change in changes:
        assert change in pages


def test_the_levels_in_the_summary_are_those_of_the_page():
    """FID at 10 steps: of the checkpoint, plainly fine-tuned, and adversarially."""
    page = PAGES[0].read_text(encoding="utf-8")
    table = (
        page.partition("\n## FID\n")[2].partition("| 10 steps | iddpm | ddim | es | dpm++ |\n")[2].partition("\n\n")[0]
    )
    for method in ("plain", "free-k3-a0.3", "base, as it is"):
        (cells,) = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {method} |")]
        for level in (cells[1], cells[4]):
            assert level.split(" ±")[0] in SUMMARY
    length = (ROOT / "docs" / "results-length.md").read_text(encoding="utf-8")
    (real,) = re.findall(r"^\| real images \| (\S+) ", length, re.MULTILINE)
    assert f"10,000 other real images have an FID of {real}." in SUMMARY.replace("\n", " ")


def test_the_correlations_with_the_mismatch_are_those_of_the_pages():
    text = (ROOT / "docs" / "mismatch.md").read_text(encoding="utf-8").replace("\n", " ")
    others = []
    for page in PAGES[:2]:
        rows = page.read_text(encoding="utf-8").replace("−", "-").splitlines()
        (row,) = [line.strip("| ").split(" | ") for line in rows if line.startswith("| ranks of their changes")]
        pairs = re.findall(r"(\d+) pairs", row[0])[0]
        delta, x0, noise, *distances, divergence = map(float, row[1:])
        assert f"{min(distances):.2f} to {max(distances):.2f}" in text
        assert f"over {pairs} " in text
        others += [delta, x0, noise, divergence]
    assert f"between {min(others):.2f} and {max(others):+.2f} in both".replace("-", "−") in text


SPREADS = ("results.md", "results-length.md", "results-one-sampler.md", "results-constant-rate.md")
"""The pages whose spread over seeds docs/intervals.md and docs/moving-average.md quote, in the order of the former."""


def spreads(name: str, pattern: str = r"(\d+)%\)") -> list[list[str]]:
    """Return what matches in the rows on one pass over each batch and on three: by default the 95 % ranges."""
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    return [re.findall(pattern, line) for line in lines if re.match(r"\| \d pass(es)? over each batch \| ", line)]


def test_the_spread_over_seeds_is_quoted_for_both_rates():
    lines = (ROOT / "docs" / "moving-average.md").read_text(encoding="utf-8").splitlines()
    quoted = [re.findall(r"[\d.]+%", line) for line in lines if "over each batch | " in line]
    constant, falling = (spreads(name, r"([\d.]+%) \(") for name in ("results-constant-rate.md", "results.md"))
    assert quoted == [
        [value for pair in zip(*rows, strict=True) for value in pair] for rows in zip(constant, falling, strict=True)
    ]


def test_the_step_sizes_are_those_of_the_recipes():
    from robustdiff.recipe import load_recipe, shipped_recipes

    lines = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| `[\w-]+` \| .* \| .* \| .* \| ", line)]
    quoted = {}
    for name, d, alpha, ratio, _ in rows:
        assert f"{float(alpha) / int(d.replace(',', '')) ** 0.5:.4f}" == ratio
        quoted[name.strip("`")] = float(alpha)
    recipes = {name: load_recipe(name).adversary for name in shipped_recipes()}
    assert quoted == {name: own.step_size for name, own in recipes.items() if own.name == "free"}


@pytest.mark.parametrize("name", ["choosing.md", "intervals.md"])
def test_tables_that_are_quoted_are_those_of_the_page(name):
    """The rows on α and K, and how far apart trainings are that differ in their seed alone."""
    page = PAGES[0].read_text(encoding="utf-8").replace("**", "")
    rows = [line for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    if name == "choosing.md":
        alphas = [row for row in rows if row.startswith("| α = ")]
        assert len(alphas) == 5
        assert set(alphas) <= set(page.splitlines())
        cells = ROOT / "benchmarks" / "results" / "fashion-16" / "cells"
        for k in (2, 3, 5):
            of_seed = [
                json.loads((cells / f"free-k{k}-a0.3-s1-{sampler}-10.json").read_text())["fid"]
                / json.loads((cells / f"plain-s1-{sampler}-10.json").read_text())["fid"]
                for sampler in ("iddpm", "dpm++")
            ]
            assert f"| K = {k} | {' | '.join(f'{ratio - 1:+.1%}' for ratio in of_seed)} |".replace("-", "−") in rows
    else:
        own = [re.findall(r"(\d+) %", line) for line in rows if re.search(r"\| [135] \|", line)]
        assert own == [spread for passes in map(spreads, SPREADS) for spread in passes]
        (ranks,) = re.findall(r"Spearman's rank correlation: (.*?)\. \(", page)
        ends = sorted(re.findall(r"\+(0\.\d\d)", ranks))
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert f"rank correlations of {ends[0]} to {ends[-1]}" in text


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == robustdiff.__version__


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README + contributing, re.MULTILINE)
    assert {"test", "docs"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
