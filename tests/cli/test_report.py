"""The command `robustdiff report`."""

from __future__ import annotations

import pytest


def test_a_run_has_a_report(robustdiff, digits_run, tmp_path):
    output = tmp_path / "new" / "r.html"
    outcome = robustdiff("report", digits_run, "--output", output, "--num", 2, "--steps", "1,2", "--cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{output} has 0.1 MB, and loads nothing\n" or "has 0.0 MB" in outcome.out
    text = output.read_text(encoding="utf-8")
    assert "Training of a new network" in text
    assert "2 samples of last model by ddim at 2 steps" in text


def test_a_study_page_has_a_report_beside_it(robustdiff, tmp_path, in_this_process):
    study = "title: tiny\nrecipe: digits\nbaseline: plain\nmethods: {plain: {set: {adversary: none}}, free: {}}\n"
    study += "set: {steps: 2, batch_size: 4, threads: 1, model.channels: [8, 16], model.groups: 4, warmup: 0}\n"
    study += "measure: {samplers: [ddim], steps: [1, 2], num: 16, features: digits}\n"
    (tmp_path / "tiny.yaml").write_text(study)
    assert robustdiff("study", tmp_path / "tiny.yaml", "--output", tmp_path / "s").code == 0
    page = tmp_path / "page.md"
    outcome = robustdiff("study", tmp_path / "tiny.yaml", "--output", tmp_path / "s", "--report", page)
    assert outcome.code == 0, outcome.err
    assert "page.html" in outcome.out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Samples of free by ddim at 2 steps" in text
    assert "FID against steps, ddim" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "recipe.yaml", "study file"]),
        (["RUN", "RUN"], ["given twice"]),
        (["RUN", "--output", "r.pdf"], ["r.pdf", ".html"]),
        (["RUN", "a.yaml", "b.yaml"], ["b.yaml", "at most one study"]),
        (["a.yaml"], ["a.yaml"]),
        (["RUN", "--folder", "."], ["study", "folder"]),
        (["RUN", "--results", "."], ["result.json", "mismatch.json"]),
        (["RUN", "--sampler", "no"], ["no"]),
        (["RUN", "--steps", "0"], ["steps"]),
        (["RUN", "--steps", "x"], ["--steps"]),
        (["RUN", "--num", "0", "--steps", "5"], ["--steps", "pictures"]),
        (["RUN", "--prompt", "a shoe"], ["--prompt", "captions"]),
        (["RUN", "--guidance", "3"], ["guidance"]),
    ],
)
def test_bad_input_is_one_line(robustdiff, digits_run, tmp_path, monkeypatch, assert_bad_input, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [str(digits_run) if argument == "RUN" else argument for argument in arguments]
    assert_bad_input(robustdiff("report", *given, "--cpu"), *words)
    assert not list(tmp_path.iterdir())
