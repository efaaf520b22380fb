"""`robustdiff sample`: its files, and models and options that are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


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
        ["--sampler", "es", "--set", "eps_scale=[0.01, 1.01]"],
        ["--sampler", "es"],
        ["--sampler", "time-shift", "--set", "window=20", "--set", "cutoff=100"],
        ["--sampler", "iddpm", "--steps", "1,2,1"],
    ],
)
def test_samplers_take_their_options(robustdiff, digits_run, tmp_path, options):
    outcome = robustdiff("sample", digits_run, "--output", tmp_path / "s.npz", "--num", 2, "--steps", 4, *options)
    assert outcome.code == 0, outcome.err


def test_sample_writes_pngs(robustdiff, digits_run, tmp_path, assert_bad_input):
    for name in ("png", "lr-0.1"):
        assert robustdiff("sample", digits_run, "--output", tmp_path / name, "--num", 3, "--steps", 2).code == 0
        record, *files = sorted((tmp_path / name).iterdir())
    assert_bad_input(robustdiff("sample", digits_run, "--output", files[0]), "000000.png", ".npz")
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(files[0]).size == (8, 8)
    assert json.loads(record.read_text())["steps"] == 2
    again = ["sample", digits_run, "--output", tmp_path / "png", "--num", 3]
    outcome = robustdiff(*again, "--steps", 2)
    assert outcome.code == 0
    assert "were there already" in outcome.out
    assert_bad_input(robustdiff(*again, "--steps", 3), "png", "steps 2, now 3", "--output")


def test_sample_does_not_overwrite_a_file_of_other_settings(robustdiff, digits_run, tmp_path, assert_bad_input):
    arguments = ["sample", digits_run, "--output", tmp_path / "s.npz", "--num", 2, "--steps", 1]
    assert robustdiff(*arguments).code == 0
    before = (tmp_path / "s.npz").read_bytes()
    outcome = robustdiff(*arguments)
    assert outcome.code == 0
    assert "were there already" in outcome.out
    assert_bad_input(robustdiff(*arguments, "--seed", 1), "s.npz", "seed 0, now 1", "--output")
    assert (tmp_path / "s.npz").read_bytes() == before


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
        (["--steps=²"], ["²"]),
        (["--steps=--5"], ["--5"]),
        (["--steps", "5" * 5000], ["steps"]),
        (["--num", "0"], ["--num"]),
        (["--num", str(10**30)], ["--num"]),
        (["--precision", "half"], ["--precision", "'half' is not one of", "auto"]),
        (["--class", "3"], ["class 3"]),
        (["--output", "x.jpg"], ["x.jpg", ".npz"]),
        (["--output", "x.NPZ"], ["x.NPZ", ".npz"]),
        (["--set", "eps_scale=[1,2,3]"], ["eps_scale"]),
        (["--set", "eps_scale=0"], ["eps_scale"]),
        (["--set", "window=5"], ["window", "time-shift"]),
        (["--set", "window"], ["--set window: write it as KEY=VALUE, as in --set window=20"]),
        (["--set", "steps=3"], ["steps is no option of ddim", "--steps"]),
        (["--set", "sampler=ddim"], ["sampler is no option of ddim", "--sampler"]),
        (["--set", "process=cosine"], ["process is no option of ddim", "of the model"]),
    ],
)
def test_bad_sampling_is_one_line_and_leaves_nothing(
    robustdiff, digits_run, tmp_path, monkeypatch, arguments, words, assert_bad_input
):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(robustdiff("sample", digits_run, *arguments), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_corrupt_weights_are_named(robustdiff, digits_run, tmp_path, assert_bad_input):
    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_bad_input(robustdiff("sample", model), str(model))


def test_weights_of_another_architecture_are_named(robustdiff, digits_run, tmp_path, assert_bad_input):
    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"] = state["conv_in.weight"][:4].contiguous()
    save_file(state, weights, {"format": "pt"})
    assert_bad_input(robustdiff("sample", model), str(model))


def test_a_pickle_in_place_of_weights_is_not_run(robustdiff, digits_run, tmp_path, assert_bad_input):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    model = tmp_path / "model"
    shutil.copytree(digits_run / "model", model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert_bad_input(robustdiff("sample", model), str(model))
    assert not (tmp_path / "ran").exists()


def test_the_shipped_model_samples(robustdiff, tmp_path):
    outcome = robustdiff("sample", "fashion-16", "--output", tmp_path / "s.npz", "--num", 4, "--steps", 2)
    assert outcome.code == 0, outcome.err
    assert np.load(tmp_path / "s.npz", allow_pickle=False)["arr_0"].shape == (4, 16, 16, 1)
