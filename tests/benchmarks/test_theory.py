"""The theory's experiments run, their parts are right where the answer is known, docs/theory.md has what they found."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from robustdiff.mismatch.exact import ExactModel, GaussianMixture

ROOT = Path(__file__).parents[2]
THEORY = runpy.run_path(str(ROOT / "benchmarks" / "theory.py"))
NAMES = ["accumulation", "one-step", "robust-bound", "dimension", "norms"]
DOCUMENT = "\n".join(["before", *(f"<!-- {name} -->\nto be replaced\n<!-- /{name} -->" for name in NAMES), "after\n"])


def test_all_experiments_run_at_a_tiny_size(tmp_path):
    out, document = tmp_path / "results" / "theory.json", tmp_path / "theory.md"
    document.write_text(DOCUMENT)
    THEORY["main"](["--tiny", "--out", str(out), "--document", str(document)])
    record = json.loads(out.read_text())
    assert list(record) == NAMES
    text = document.read_text()
    assert "to be replaced" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for name in NAMES:
        section = THEORY["section"](name, record[name])
        assert f"<!-- {name} -->\n{section}\n<!-- /{name} -->" in text
        assert (tmp_path / "theory" / f"{name}.png").stat().st_size > 10_000
    # The mathematics that holds at every size.
    for case in record["accumulation"]["result"]["cases"].values():
        assert case["holds"]
    assert max(abs(kl) for kl in record["one-step"]["result"]["kl"][0]) < 1e-12
    for case in record["robust-bound"]["result"]["times"].values():
        for row in case["rows"]:
            assert case["clean"] <= row["adversarial"] <= row["w2_ball"] * (1 + 1e-6)
            assert case["clean"] < row["kl_ball"] * (1 + 1e-3)  # by quadratures of their own

    # One experiment alone replaces its own part.
    before = out.read_text()
    THEORY["main"](["--tiny", "--only", "one-step", "--out", str(out)])
    again, first = json.loads(out.read_text()), json.loads(before)
    for name in NAMES:
        assert again[name]["result"] == first[name]["result"]

    # And the document can be written again without computing anything.
    written = document.read_text()
    document.write_text(DOCUMENT)
    THEORY["main"](["--reuse", "--only", "norms", "--out", str(out), "--document", str(document)])
    assert document.read_text().partition("<!-- norms -->")[2] == written.partition("<!-- norms -->")[2]


def test_reuse_needs_something_to_reuse(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        THEORY["main"](["--reuse", "--out", str(tmp_path / "absent.json")])
    assert stop.value.code == 2
    assert "--reuse needs --out" in capsys.readouterr().err


def test_a_document_without_the_section_is_refused():
    with pytest.raises(SystemExit, match="no section <!-- norms -->"):
        THEORY["rewritten"]("nothing here", "norms", "text")


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        THEORY["main"](["--only", "proposition-9"])
    assert stop.value.code == 2
    assert "proposition-9" in capsys.readouterr().err


# -- the page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_made_from_the_committed_numbers(name):
    record = json.loads((ROOT / "benchmarks" / "results" / "theory.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{THEORY['section'](name, record[name])}\n<!-- /{name} -->" in page
    assert f"](theory/{name}.png)" in page
    assert (ROOT / "docs" / "theory" / f"{name}.png").exists()
    assert record[name]["size"] == json.loads(json.dumps(THEORY["sizes"](name, THEORY["Size"]()))), "a size of its own"


# -- parts of the experiments --------------------------------------------------------------------------------


def test_an_exponent_is_found():
    x = [1.0, 2.0, 4.0, 8.0]
    fit = THEORY["slope"](x, [3 * v**-1.5 for v in x])
    assert fit["exponent"] == pytest.approx(-1.5, abs=1e-12)
    assert fit["half_width"] < 1e-6


def test_the_poincare_constant_of_a_gaussian_is_its_variance():
    q = GaussianMixture(torch.ones(1), torch.tensor([[0.7]]), torch.tensor([0.49]))
    assert THEORY["_poincare"](q) == pytest.approx(0.49, rel=1e-4)


def test_the_supremum_over_a_kl_ball_around_a_gaussian():
    # Of E x it is reached by the shifted Gaussian: σ√(2ρ).
    x = np.linspace(-12, 12, 4001)
    masses = stats.norm.pdf(x) / stats.norm.pdf(x).sum()
    for radius in (0.01, 0.5):
        assert THEORY["_kl_ball"](x, masses, radius) == pytest.approx(math.sqrt(2 * radius), rel=1e-5)


def test_the_supremum_over_a_w2_ball():
    # Of (c + δ)² for one point it is (c + r)²; of δ it is r, whoever moves.
    deltas = np.linspace(-3, 3, 6001)
    ball = THEORY["_w2_ball"]
    assert ball((0.5 + deltas)[None] ** 2, deltas**2, np.ones(1), 0.4) == pytest.approx(0.81, rel=1e-4)
    assert ball(np.tile(deltas, (5, 1)), deltas**2, np.full(5, 0.2), 0.4) == pytest.approx(0.4, rel=1e-4)


def test_the_quadrature_has_the_moments_of_the_data_and_the_noise():
    x0, noise, weights = THEORY["_quadrature"](32)
    three = THEORY["THREE"]
    assert weights @ x0 == pytest.approx(float(three.mean), abs=1e-12)
    assert weights @ (x0 - weights @ x0) ** 2 == pytest.approx(float(three.covariance), rel=1e-12)
    assert weights @ noise**4 == pytest.approx(3, rel=1e-10)
    assert weights @ (x0 * noise) == pytest.approx(0, abs=1e-12)


def test_transport_of_a_shifted_gaussian_is_the_shift():
    q = GaussianMixture(torch.ones(1), torch.tensor([[0.0]]), torch.tensor([0.25]))
    shifted = GaussianMixture(torch.ones(1), torch.tensor([[0.3]]), torch.tensor([0.25]))
    p = THEORY["Density"].on_lattice(shifted.log_prob, [-4.0], [4.5], 2001)
    found = THEORY["_displaced"](p, q)
    middle = np.abs(found["from"]) < 2
    np.testing.assert_allclose(found["delta"][middle], 0.3, atol=1e-3)
    assert found["w2"] == pytest.approx(0.3, rel=1e-3)
    assert found["kl"] == pytest.approx(0.3**2 / (2 * 0.25), rel=1e-6)
    assert found["covered_by_2_w2"] == pytest.approx(1, abs=1e-6)


def test_the_paired_interval_is_that_of_the_t_test():
    a, b = np.array([1.0, 1.4, 0.9, 1.3]), np.array([0.8, 1.1, 1.0, 0.9])
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = THEORY["_paired"](a, b)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["mean"] == pytest.approx(float((a - b).mean()))


def test_sliced_distances_of_shifted_points():
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert THEORY["_sliced_w2"](x, x[torch.randperm(200)]) == 0
    # A shift by s is s·u along each direction u, and E (s·u)² = ‖s‖²/d.
    shift = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert THEORY["_sliced_w2"](x, x + shift, projections=20_000) == pytest.approx(3 / math.sqrt(3), rel=0.02)


def test_the_reverse_divergence_of_ddim_is_that_of_the_density():
    # In one dimension the density on a lattice gives the same number.
    exact = ExactModel(THEORY["THREE"], THEORY["PROCESS"])
    estimate, folded = THEORY["_reverse_kl"](THEORY["THREE"], exact, 10, 20_000, 0)
    p = THEORY["standard_normal"](8001)
    for step in THEORY["sampler_steps"](THEORY["PROCESS"], "ddim", 10):
        p = p.push(step, exact)
    logs = p.log_density - THEORY["THREE"].log_prob(p.points)
    expected = float((p.masses * logs).sum())
    spread = math.sqrt(float((p.masses * (logs - expected).square()).sum()) / 20_000)
    assert folded == 0
    assert abs(estimate - expected) < 4 * spread


def test_training_lowers_the_loss():
    from robustdiff import DenoisingObjective
    from robustdiff.perturbation import NoAdversary

    mixture, objective = THEORY["_centres"](4), DenoisingObjective(THEORY["PROCESS"])
    draw = objective.draw(mixture.sample(4000, torch.Generator().manual_seed(9)).float(),
                          generator=torch.Generator().manual_seed(9))  # fmt: skip
    losses = [
        float(objective(model, draw)["loss"].mean())
        for model in (
            THEORY["train"](mixture, NoAdversary(), 1, 0),
            THEORY["train"](mixture, NoAdversary(), 150, 0),
            ExactModel(mixture, THEORY["PROCESS"]),
        )
    ]
    assert losses[0] > losses[1] > losses[2]


def test_the_figure_of_accumulation_reaches_the_end_that_the_table_is_about():
    record = json.loads((ROOT / "benchmarks" / "results" / "theory.json").read_text(encoding="utf-8"))
    result = record["accumulation"]["result"]
    for panel, case in zip(THEORY["accumulation_figure"](result).axes, result["cases"].values(), strict=True):
        for line, key in zip(panel.get_lines(), ("uniform_bound", "sum_bound", "kl"), strict=True):
            assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (0, case[key][-1])


def test_numbers_have_minus_signs_and_no_exponents_where_they_are_large():
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    assert not [line for line in tables if re.search(r"(?<!\w)-\d|e[-+]\d|[−+]0\.000\b", line)]
