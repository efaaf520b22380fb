"""`robustdiff evaluate`: runs and images, references, and sources that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler

from robustdiff.backbones.model import Model, load_model
from robustdiff.data import load_dataset
from robustdiff.metrics.extractors.classifier import Classifier
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.reference import reference_statistics


def test_evaluate_writes_table_figures_and_json(robustdiff, digits_run, tmp_path):
    outcome = robustdiff(
        "evaluate", digits_run, "--num", 40, "--steps", "2,3", "--sampler", "ddim,iddpm", "--output", tmp_path / "e"
    )
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "e" / "result.json").read_text())
    assert [(c["sampler"], c["steps"]) for c in record["cells"]] == [
        ("ddim", 2), ("ddim", 3), ("iddpm", 2), ("iddpm", 3),
    ]  # fmt: skip
    for cell in record["cells"]:
        assert f"{cell['fid']:.2f} (" in outcome.out
        assert cell["fid_ci"][0] < cell["fid"] < cell["fid_ci"][1]
    assert {p.name for p in (tmp_path / "e").iterdir()} == {
        "fid.png", "result.json", "samples-ddim.png", "samples-iddpm.png",
    }  # fmt: skip


def test_evaluate_does_not_sample_as_a_recipe_says(robustdiff, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["sampler"] = {"name": "iddpm", "steps": 7}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--num", 8, "--steps", 2, "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", tmp_path / "run", digits_run, *arguments)
    assert outcome.code == 0, outcome.err
    cells = json.loads((tmp_path / "e" / "result.json").read_text())["cells"]
    assert {(c["sampler"], c["steps"]) for c in cells} == {("ddim", 2)}


@pytest.mark.parametrize(("scales", "steps", "expected"), [(2, ["--steps", 1], [1]), (18, [], [1, 2, 4, 8])])
def test_evaluate_suits_a_consistency_model(robustdiff, digits_run, tmp_path, scales, steps, expected):
    unet = load_model(digits_run).network
    Model.of(unet, CMStochasticIterativeScheduler(num_train_timesteps=scales)).save(tmp_path / "model")
    arguments = ["--data", "digits", "--num", 8, *steps, "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", tmp_path / "model", *arguments)
    assert outcome.code == 0, outcome.err
    cells = json.loads((tmp_path / "e" / "result.json").read_text())["cells"]
    assert [(c["sampler"], c["steps"]) for c in cells] == [("multistep", n) for n in expected]


def test_root_is_where_the_images_of_a_recipe_are(robustdiff, digits_run, tmp_path, assert_bad_input):
    shutil.copytree(digits_run, tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"] = {"name": "npz", "root": str(tmp_path / "moved.npz")}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "here.npz", images=images)
    arguments = ["evaluate", tmp_path / "run", "--features", "digits", "--num", 8, "--steps", 1]
    assert_bad_input(robustdiff(*arguments), "moved.npz")
    outcome = robustdiff(*arguments, "--root", tmp_path / "here.npz")
    assert outcome.code == 0, outcome.err


@pytest.fixture
def images(digits_run, tmp_path) -> Path:
    """The first 30 images of the run in one step: images.npz, and beside it the folder images."""
    from accelerate import Accelerator

    from robustdiff.evaluation.generate import Generator, write_npz, write_pngs

    generator = Generator.load(digits_run, sampler="ddim", steps=1)
    write_npz(generator, 30, tmp_path / "images.npz", Accelerator(cpu=True))
    write_pngs(generator, 30, tmp_path / "images", Accelerator(cpu=True))
    return tmp_path / "images.npz"


def test_evaluate_measures_folders_and_files_beside_a_run(robustdiff, digits_run, images, tmp_path):
    arguments = ["--num", 30, "--steps", 1, "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", images, digits_run, images.with_suffix(""), *arguments)
    assert outcome.code == 0, outcome.err
    run, file, folder = json.loads((tmp_path / "e" / "result.json").read_text())["cells"]
    names = [(c["checkpoint"], c["sampler"], c["steps"], c["n"]) for c in (run, file, folder)]
    assert names == [("digits", "ddim", 1, 30), ("images.npz", "file", None, 30), ("images", "file", None, 30)]
    for metric in ("fid", "kid", "precision", "recall", "brightness"):
        if metric != "kid":  # whose groups are of other images, since those that are there have an order of their own
            assert file[metric] == pytest.approx(run[metric], rel=1e-3, abs=0.1), metric  # in batches of another size
        assert folder[metric] == pytest.approx(file[metric], rel=1e-5), metric
    rows = [line.split()[0] for line in outcome.out.splitlines() if line.startswith(("images", " —"))]
    assert rows == ["images.npz", "—", "images", "—"]


def test_all_images_of_a_file_are_measured_and_labels_do_not_matter(robustdiff, images, tmp_path):
    np.savez(tmp_path / "labels.npz", arr_0=np.load(images)["arr_0"][:11], arr_1=np.full(3, np.nan))
    arguments = ["--data", "digits", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", images, tmp_path / "labels.npz", *arguments)
    assert outcome.code == 0, outcome.err
    assert [c["n"] for c in json.loads((tmp_path / "e" / "result.json").read_text())["cells"]] == [30, 11]
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["result.json"]


def test_images_of_another_size_are_refused_with_a_remedy_that_works(robustdiff, images, tmp_path, assert_bad_input):
    shape = (np.random.default_rng(0).random((8, 16, 16, 3)) * 255).astype(np.uint8)
    np.savez(tmp_path / "large.npz", arr_0=shape)
    arguments = ["evaluate", tmp_path / "large.npz", "--data", "digits"]
    outcome = robustdiff(*arguments)
    assert_bad_input(outcome, "3×16×16", "1×8×8", "add --set data.channels=3 --set data.size=16")
    remedy = outcome.err.split("add ")[1].split()
    assert_bad_input(robustdiff(*arguments, *remedy), "extractor digits", "choose features")
    torch.manual_seed(0)
    Classifier(3, 16, [4], 3, 2).save(tmp_path / "c.safetensors")
    assert robustdiff(*arguments, *remedy, "--features", tmp_path / "c.safetensors").code == 0


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((8, 8, 8, 1), np.uint8)}, ["arr_0"]),
        ({"arr_0": np.zeros((8, 8, 8, 1))}, ["float64", "uint8"]),
        ({"arr_0": np.full((8, 8, 8, 1), np.nan, np.float32)}, ["float32", "uint8"]),
        ({"arr_0": np.zeros((8, 1, 8, 8), np.uint8)}, ["(8, 1, 8, 8)", "(N, H, W, C)"]),
        ({"arr_0": np.zeros((8, 8), np.uint8)}, ["(8, 8)"]),
        ({"arr_0": np.zeros((0, 8, 8, 1), np.uint8)}, ["(0, 8, 8, 1)"]),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.uint8)}, ["3 images", "4 or more"]),
        ({"arr_0": np.array([None] * 5)}, ["a.npz"]),
        ({"arr_0": np.zeros((8, 8, 8, 1), np.uint8), "--num": "9"}, ["8 images", "--num 8"]),
        ({"arr_0": np.zeros((8, 8, 8, 1), np.uint8), "--num": "3"}, ["--num"]),
        ({"arr_0": np.zeros((8, 8, 8, 1), np.uint8), "--steps": "3"}, ["--steps", "leave it out"]),
        ({"arr_0": np.zeros((8, 8, 8, 1), np.uint8), "--sampler": "ddim"}, ["--sampler", "leave it out"]),
    ],
)
def test_images_that_cannot_be_measured_are_one_line(robustdiff, tmp_path, arrays, words, assert_bad_input):
    options = [part for key, value in arrays.items() if key.startswith("--") for part in (key, value)]
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if not key.startswith("--")})
    assert_bad_input(robustdiff("evaluate", tmp_path / "a.npz", "--data", "digits", *options), *words)


def test_sources_of_no_known_kind_are_one_line(robustdiff, tmp_path, assert_bad_input):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "b.npz").write_bytes(b"PK")
    for name, word in (("empty", "no images"), ("a.zip", ".npz"), ("b.npz", "not a readable"), ("no.npz", "no such")):
        assert_bad_input(robustdiff("evaluate", tmp_path / name, "--data", "digits"), name, word)


def statistics(path: Path, **changes) -> Path:
    reference = reference_statistics(load_dataset("digits"), load_extractor("digits"))
    np.savez(path, **{"mu": reference.mean, "sigma": reference.cov, "mu_s": np.zeros(3), **changes})
    return path


def test_precomputed_statistics_give_the_same_fid_and_nothing_else(robustdiff, images, tmp_path):
    reference = statistics(tmp_path / "ref.npz")
    cells = {}
    for name, arguments in (
        ("real", ["--data", "digits"]),
        ("ref", ["--reference", reference, "--features", "digits"]),
    ):
        outcome = robustdiff("evaluate", images, *arguments, "--output", tmp_path / name)
        assert outcome.code == 0, outcome.err
        (cells[name],) = json.loads((tmp_path / name / "result.json").read_text())["cells"]
    assert cells["ref"]["fid"] == pytest.approx(cells["real"]["fid"], rel=1e-6)
    assert cells["ref"]["fid_ci"] == pytest.approx(cells["real"]["fid_ci"], rel=1e-6)
    assert [cells["ref"][name] for name in ("kid", "kid_se", "precision", "recall")] == [None] * 4
    assert outcome.out.count(" —") == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mu": np.zeros(3)}, ["mu", "(3,)", "digits has", "features"]),
        ({"sigma": np.zeros((64, 3))}, ["sigma", "(64, 3)"]),
        ({"mu": np.full(64, np.nan)}, ["mu", "finite"]),
        ({"sigma": np.full((64, 64), np.inf)}, ["sigma", "finite"]),
        ({"mu": np.zeros(64, complex)}, ["complex128"]),
        ({"sigma": np.triu(np.ones((64, 64)))}, ["sigma", "symmetric"]),
        ({"sigma": -np.eye(64)}, ["sigma", "negative"]),
    ],
)
def test_statistics_that_are_none_are_one_line(robustdiff, images, tmp_path, changes, words, assert_bad_input):
    reference = statistics(tmp_path / "ref.npz", **changes)
    assert_bad_input(
        robustdiff("evaluate", images, "--reference", reference, "--features", "digits"), "ref.npz", *words
    )


def test_a_reference_that_holds_images_says_how_to_give_it(robustdiff, images, assert_bad_input):
    outcome = robustdiff("evaluate", images, "--reference", images, "--features", "digits")
    assert_bad_input(outcome, f"--data npz --root {images}")
    remedy = ["--data", "npz", "--root", images, "--features", "digits"]
    assert robustdiff("evaluate", images, *remedy).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--reference needs the features", "--features"]),
        (["--features", "digits", "--data", "digits"], ["--reference takes the place of"]),
        (["--features", "digits", "--set", "data.size=8"], ["--reference takes the place of"]),
        (["--features", "inception"], ["--weights FILE"]),
    ],
)
def test_a_reference_goes_with_features_alone(robustdiff, images, tmp_path, arguments, words, assert_bad_input):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert_bad_input(robustdiff("evaluate", images, "--reference", tmp_path / "ref.npz", *arguments), *words)


def test_a_metric_that_is_not_finite_fails_with_1(robustdiff, images, tmp_path):
    classifier = Classifier(1, 8, [4], 3, 2)
    with torch.no_grad():
        classifier.embed.bias.fill_(float("nan"))
    classifier.save(tmp_path / "c.safetensors")
    outcome = robustdiff("evaluate", images, "--data", "digits", "--features", tmp_path / "c.safetensors")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "not finite" in outcome.err


def test_a_run_of_other_images_cannot_be_evaluated(robustdiff, digits_run, assert_bad_input):
    assert_bad_input(robustdiff("evaluate", digits_run, "--data", "fashion-16"), "8×8", "16×16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "5,5000"], ["5000", "1000"]),
        (["--steps", "2,3,02"], ["--steps", "2 twice"]),
        (["--sampler", "ddim,iddpm,ddim"], ["--sampler", "ddim twice"]),
        (["--root", "a.npz"], ["digits", "root"]),
    ],
)
def test_bad_evaluation_is_one_line_and_leaves_nothing(
    robustdiff, digits_run, tmp_path, arguments, words, assert_bad_input
):
    assert_bad_input(robustdiff("evaluate", digits_run, *arguments, "--num", 8, "--output", tmp_path / "e"), *words)
    assert not (tmp_path / "e").exists()


def test_data_without_features_says_what_to_give(robustdiff, digits_run, tmp_path, assert_bad_input):
    np.savez(tmp_path / "a.npz", images=np.zeros((8, 8, 8, 1), np.uint8))
    outcome = robustdiff("evaluate", digits_run, "--data", "npz", "--root", tmp_path / "a.npz")
    assert_bad_input(outcome, "--features")


def test_paths_of_runs_are_told_apart(tmp_path: Path, robustdiff, digits_run, assert_bad_input):
    assert_bad_input(robustdiff("evaluate", digits_run, digits_run), "twice")
