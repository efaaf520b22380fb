"""The command line as a user meets it: the main path of every command, and one clear line for bad input."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from robustdiff.backbones.model import Model, load_model
from robustdiff.data import load_dataset
from robustdiff.evaluation.features import Classifier, load_extractor
from robustdiff.evaluation.fidelity import reference_statistics

ONE = [sys.executable, "-m", "robustdiff"]
# accelerate's own launcher starts a single process when it is told --cpu.
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--", "robustdiff"]


def assert_bad_input(outcome, *words: str) -> None:
    """Exit code 2, and one line on stderr that holds the words."""
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.err
    for word in words:
        assert word in lines[0]


def test_help_names_every_command(robustdiff):
    outcome = robustdiff("--help")
    assert outcome.code == 0
    for command in ("demo", "train", "sample", "evaluate", "search-times", "solver-error", "convert"):
        assert command in outcome.out


@pytest.mark.parametrize("command", ["demo", "train", "sample", "evaluate", "search-times", "solver-error", "convert"])
def test_each_command_has_help_for_each_option(robustdiff, command):
    outcome = robustdiff(command, "--help")
    assert outcome.code == 0
    assert "Options" in outcome.out


def test_version(robustdiff):
    assert robustdiff("--version").out.strip().count(".") == 2


def test_train_writes_a_run_and_resume_finds_it_finished(robustdiff, tiny, tmp_path):
    run = tmp_path / "run"
    outcome = robustdiff("train", "digits", *tiny, "--set", f"output={run}")
    assert outcome.code == 0, outcome.err
    written = {".robustdiff", "recipe.yaml", "data.json", "metrics.jsonl", "checkpoints", "model", "result.json"}
    assert {p.name for p in run.iterdir()} == written
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["adversary"]["name"] == "free"
    assert recipe["model"]["channels"] == [8, 16]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert all(line["delta_norm"] > 0 for line in lines)
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    before = (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert robustdiff("train", "digits", *tiny, "--set", f"output={run}", "--resume").code == 0
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_second_run_does_not_overwrite_the_first(robustdiff, tiny, digits_run):
    assert_bad_input(robustdiff("train", "digits", *tiny, "--set", f"output={digits_run}"), "already", "--resume")


def test_fine_tuning_from_a_run(robustdiff, tiny, digits_run, tmp_path):
    arguments = ["--set", "model.name=pretrained", "--set", f"model.path={digits_run}", "--set", "adversary=none"]
    recipe = tmp_path / "tune.yaml"
    recipe.write_text("data: digits\nsteps: 2\nbatch_size: 8\nema: 0.9\n")
    outcome = robustdiff("train", recipe, *arguments, "--set", f"output={tmp_path / 'tuned'}")
    assert outcome.code == 0, outcome.err
    old = load_file(digits_run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    new = load_file(tmp_path / "tuned" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert old.keys() == new.keys()
    assert any(not np.array_equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++"])
def test_sample_writes_what_the_adm_evaluator_reads(robustdiff, digits_run, tmp_path, sampler):
    path = tmp_path / "samples.npz"
    outcome = robustdiff("sample", digits_run, "--output", path, "--num", 5, "--steps", 3, "--sampler", sampler)
    assert outcome.code == 0, outcome.err
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        assert arrays["arr_0"].shape == (5, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "es", "--eps-scale", "0.01,1.01"],
        ["--sampler", "es"],
        ["--sampler", "time-shift", "--window", 20, "--cutoff", 100],
        ["--sampler", "iddpm", "--steps", "1,2,1"],
    ],
)
def test_samplers_take_their_options(robustdiff, digits_run, tmp_path, options):
    outcome = robustdiff("sample", digits_run, "--output", tmp_path / "s.npz", "--num", 2, "--steps", 4, *options)
    assert outcome.code == 0, outcome.err


def test_sample_writes_pngs(robustdiff, digits_run, tmp_path):
    assert robustdiff("sample", digits_run, "--output", tmp_path / "png", "--num", 3, "--steps", 2).code == 0
    record, *files = sorted((tmp_path / "png").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(files[0]).size == (8, 8)
    assert json.loads(record.read_text())["steps"] == 2
    again = ["sample", digits_run, "--output", tmp_path / "png", "--num", 3]
    outcome = robustdiff(*again, "--steps", 2)
    assert outcome.code == 0
    assert "were there already" in outcome.out
    assert_bad_input(robustdiff(*again, "--steps", 3), "png", "steps 2, now 3", "--output")


def test_sample_does_not_overwrite_a_file_of_other_settings(robustdiff, digits_run, tmp_path):
    arguments = ["sample", digits_run, "--output", tmp_path / "s.npz", "--num", 2, "--steps", 1]
    assert robustdiff(*arguments).code == 0
    before = (tmp_path / "s.npz").read_bytes()
    outcome = robustdiff(*arguments)
    assert outcome.code == 0
    assert "were there already" in outcome.out
    assert_bad_input(robustdiff(*arguments, "--seed", 1), "s.npz", "seed 0, now 1", "--output")
    assert (tmp_path / "s.npz").read_bytes() == before


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
        assert f"{cell['fid']:.2f} ±" in outcome.out
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


def test_root_is_where_the_images_of_a_recipe_are(robustdiff, digits_run, tmp_path):
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
    arguments = ["--num", 20, "--steps", 1, "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", images, digits_run, images.with_suffix(""), *arguments)
    assert outcome.code == 0, outcome.err
    run, file, folder = json.loads((tmp_path / "e" / "result.json").read_text())["cells"]
    names = [(c["checkpoint"], c["sampler"], c["steps"], c["n"]) for c in (run, file, folder)]
    assert names == [("digits", "ddim", 1, 20), ("images.npz", "file", None, 20), ("images", "file", None, 20)]
    for metric in ("fid", "kid", "precision", "recall", "brightness"):
        assert file[metric] == pytest.approx(run[metric], rel=1e-3, abs=0.1), metric  # in batches of another size
        assert folder[metric] == pytest.approx(file[metric], rel=1e-5), metric
    rows = [line.split()[:4] for line in outcome.out.splitlines() if line.strip().startswith("images")]
    assert rows == [["images.npz", "—", "—", "20"], ["images", "—", "—", "20"]]


def test_all_images_of_a_file_are_measured_and_labels_do_not_matter(robustdiff, images, tmp_path):
    np.savez(tmp_path / "labels.npz", arr_0=np.load(images)["arr_0"][:11], arr_1=np.full(3, np.nan))
    arguments = ["--data", "digits", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", images, tmp_path / "labels.npz", *arguments)
    assert outcome.code == 0, outcome.err
    assert [c["n"] for c in json.loads((tmp_path / "e" / "result.json").read_text())["cells"]] == [30, 11]
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["result.json"]


def test_images_of_another_size_are_refused_with_a_remedy_that_works(robustdiff, images, tmp_path):
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
def test_images_that_cannot_be_measured_are_one_line(robustdiff, tmp_path, arrays, words):
    options = [part for key, value in arrays.items() if key.startswith("--") for part in (key, value)]
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if not key.startswith("--")})
    assert_bad_input(robustdiff("evaluate", tmp_path / "a.npz", "--data", "digits", *options), *words)


def test_sources_of_no_known_kind_are_one_line(robustdiff, tmp_path):
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
    assert outcome.out.count(" —") == 5


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
def test_statistics_that_are_none_are_one_line(robustdiff, images, tmp_path, changes, words):
    reference = statistics(tmp_path / "ref.npz", **changes)
    assert_bad_input(
        robustdiff("evaluate", images, "--reference", reference, "--features", "digits"), "ref.npz", *words
    )


def test_a_reference_that_holds_images_says_how_to_give_it(robustdiff, images):
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
def test_a_reference_goes_with_features_alone(robustdiff, images, tmp_path, arguments, words):
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


SMALL = {
    "evaluate": ["--num", 8, "--steps", 1],
    "mismatch": ["--num", 40, "--steps", 2, "--probes", 0],
    "search-times": ["--num", 8, "--steps", 2],
    "solver-error": ["--num", 2, "--scales", 3, "--points", 2, "--substeps", 2],
}
"""The commands that compare with real images, and what makes each take a moment."""


@pytest.fixture(scope="module")
def models(digits_run, tmp_path_factory) -> dict[str, Path]:
    """A model that each of the commands takes; search-times needs a consistency model."""
    unet = load_model(digits_run).network
    folder = tmp_path_factory.mktemp("models") / "consistency"
    Model.of(unet, CMStochasticIterativeScheduler(num_train_timesteps=18)).save(folder)
    return {**dict.fromkeys(SMALL, digits_run), "search-times": folder}


@pytest.mark.parametrize("command", SMALL)
def test_real_images_are_read_as_set_says(robustdiff, models, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    features = ["--features", "digits"] if command in ("evaluate", "search-times") else []
    arguments = [command, models[command], *SMALL[command], *features]
    given = ["--set", "data.name=fashion-16", "--set", "data.split=test"]
    outcome = robustdiff(*arguments, *given)
    assert_bad_input(outcome, "8×8", "16×16", "set data.size=8")
    outcome = robustdiff(*arguments, *given, "--set", outcome.err.split("set ")[-1].strip())
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["steps=3"], ["--set steps=3", "data"]),
        (["data.colour=1"], ["data.colour", "known here", "split"]),
        (["data.size=0"], ["data.size", "greater"]),
        (["data.channels=2"], ["data.channels"]),
        (["data.flip=true"], ["data.flip", "training"]),
        (["data"], ["key=value"]),
        (["data.split=nowhere"], ["nowhere"]),
    ],
)
def test_bad_settings_of_real_images_are_one_line(
    robustdiff, models, tmp_path, monkeypatch, command, assignments, words
):
    monkeypatch.chdir(tmp_path)
    options = [part for assignment in assignments for part in ("--set", assignment)]
    assert_bad_input(robustdiff(command, models[command], *SMALL[command], *options), *words)


def test_two_processes_evaluate_to_the_same_fid(digits_run, tmp_path):
    arguments = ["evaluate", str(digits_run), "--num", "50", "--steps", "3", "--sampler", "iddpm", "--cpu"]
    arguments += ["--batch-size", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, name in ((TWO, "two"), (ONE, "one")):
        done = subprocess.run(
            [*command, *arguments, "--output", str(tmp_path / name)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["cells"][0] for name in ("one", "two"))
    for metric in ("fid", "kid", "precision", "recall"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-9)


def test_two_processes_sample_the_same_images(digits_run, tmp_path):
    arguments = ["sample", str(digits_run), "--num", "11", "--steps", "2", "--batch-size", "3", "--cpu"]
    images = []
    for command, name in ((TWO, "two.npz"), (ONE, "one.npz")):
        output = tmp_path / name
        done = subprocess.run([*command, *arguments, "--output", str(output)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        images.append(np.load(output, allow_pickle=False)["arr_0"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1  # a batch of another size may round otherwise


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such-recipe"], ["no-such-recipe", "digits"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["train", "digits", "--set", "learning_rate=1"], ["learning_rate", "lr"]),
        (["train", "digits", "--set", "adversary.alpha=1"], ["adversary.alpha", "step_size"]),
        (["train", "digits", "--set", "steps=0"], ["steps"]),
        (["train", "digits", "--set", "lr"], ["key=value"]),
        (["train", "digits", "--set", "data=cifar"], ["cifar", "fashion-16"]),
        (["train", "digits", "--set", "data=imagefolder", "--set", "data.root=/no/such"], ["/no/such"]),
        (["train", "digits", "--set", "model.channels=[8,16,32,64,64]"], ["8×8", "model.channels"]),
        (["train", "digits", "--set", "batch_size=7", "--set", "accumulate=2"], ["batch_size", "accumulate"]),
        (["train", "digits", "--set", "process=flow"], ["flow"]),
        (["train", "fashion-16-at", "--set", "data=digits"], ["16×16", "data.size=16"]),
        (["train", "fashion-16-at", "--set", "data.channels=3"], ["channels", "data.channels=1"]),
        (["sample", "no-such-run"], ["no-such-run", "fashion-16"]),
        (["evaluate", "no-such-run"], ["no-such-run"]),
        (["sample"], ["argument"]),  # typers before 0.20 write the name in capitals
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_arguments_are_one_line(robustdiff, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(robustdiff(*arguments), *words)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("instructions", "precision"), [({}, "fp32"), ({"avx512_bf16": True}, "bf16")])
def test_auto_samples_in_the_precision_of_the_device(
    robustdiff, digits_run, tmp_path, monkeypatch, instructions, precision
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    images = {}
    for name in ("auto", precision):
        path = tmp_path / f"{name}.npz"
        arguments = ("--num", 4, "--steps", 2, "--precision", name, "--output", path, "--cpu")
        assert robustdiff("sample", digits_run, *arguments).code == 0
        with np.load(path, allow_pickle=False) as archive:
            images[name] = archive["arr_0"]
    assert np.array_equal(images["auto"], images[precision])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampler", "plms"], ["plms", "ddim"]),
        (["--sampler", "euler"], ["euler", "ddim"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "2000"], ["2000", "1000"]),
        (["--num", "0"], ["--num"]),
        (["--precision", "half"], ["--precision", "'half' is not one of", "auto"]),
        (["--class", "3"], ["class 3"]),
        (["--output", "x.jpg"], ["x.jpg", ".npz"]),
        (["--eps-scale", "1,2,3"], ["--eps-scale", "k,b"]),
        (["--eps-scale", "0"], ["eps_scale"]),
        (["--window", "5"], ["window", "time-shift"]),
    ],
)
def test_bad_sampling_is_one_line_and_leaves_nothing(robustdiff, digits_run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(robustdiff("sample", digits_run, *arguments), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_run_of_other_images_cannot_be_evaluated(robustdiff, digits_run):
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
def test_bad_evaluation_is_one_line_and_leaves_nothing(robustdiff, digits_run, tmp_path, arguments, words):
    assert_bad_input(robustdiff("evaluate", digits_run, *arguments, "--num", 8, "--output", tmp_path / "e"), *words)
    assert not (tmp_path / "e").exists()


def test_data_without_features_says_what_to_give(robustdiff, digits_run, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((8, 8, 8, 1), np.uint8))
    outcome = robustdiff("evaluate", digits_run, "--data", "npz", "--root", tmp_path / "a.npz")
    assert_bad_input(outcome, "--features")


def test_corrupt_weights_are_named(robustdiff, digits_run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_bad_input(robustdiff("sample", model), str(model))


def test_weights_of_another_architecture_are_named(robustdiff, digits_run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"] = state["conv_in.weight"][:4].contiguous()
    save_file(state, weights, {"format": "pt"})
    assert_bad_input(robustdiff("sample", model), str(model))


def test_a_pickle_in_place_of_weights_is_not_run(robustdiff, digits_run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert_bad_input(robustdiff("sample", model), str(model))
    assert not (tmp_path / "ran").exists()


def test_an_unsafe_recipe_is_not_run(robustdiff, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    assert_bad_input(robustdiff("train", recipe), "r.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_fails_with_1(robustdiff, tiny, tmp_path):
    outcome = robustdiff("train", "digits", *tiny, "--set", f"output={tmp_path / 'r'}", "--set", "lr=1e20")
    assert outcome.code == 1
    assert "loss" in outcome.err
    assert "lr" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "r" / "model").exists()


def test_a_full_disk_fails_with_1(robustdiff, digits_run, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(os, "fsync", full)
    outcome = robustdiff("sample", digits_run, "--output", tmp_path / "s.npz", "--num", 4, "--steps", 2)
    assert outcome.code == 1
    assert "disk is full" in outcome.err
    assert not (tmp_path / "s.npz").exists()


def test_a_traceback_is_never_shown_for_bad_input(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "robustdiff", "train", "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_shipped_model_samples(robustdiff, tmp_path):
    outcome = robustdiff("sample", "fashion-16", "--output", tmp_path / "s.npz", "--num", 4, "--steps", 2)
    assert outcome.code == 0, outcome.err
    assert np.load(tmp_path / "s.npz", allow_pickle=False)["arr_0"].shape == (4, 16, 16, 1)


def test_paths_of_runs_are_told_apart(tmp_path: Path, robustdiff, digits_run):
    assert_bad_input(robustdiff("evaluate", digits_run, digits_run), "twice")
