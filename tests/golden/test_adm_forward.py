"""ADM checkpoints of the original implementations: same outputs in diffusers, same file on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from robustdiff.backbones.adm import load_adm, save_adm

FILES = ("adm_cifar_like", "adm_imagenet_like", "cm_student", "cm_target", "cm_teacher")


def flags_of(golden: Path, file: str) -> dict[str, Any]:
    config = json.loads((golden / "config.json").read_text())
    flags: dict[str, Any] = config["cm"]["model"] if file.startswith("cm") else config["models"][file[4:]]
    return flags


def load(golden: Path, file: str) -> UNet2DModel:
    return load_adm(golden / f"{file}.pt", **flags_of(golden, file))


def arrays(path: Path, prefix: str = "") -> dict[str, Tensor]:
    with np.load(path) as file:
        return {n.removeprefix(prefix): torch.from_numpy(file[n]) for n in file.files if n.startswith(prefix)}


def assert_same_outputs(unet: UNet2DModel, expected: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = unet(expected["x"], expected["t"], class_labels=expected.get("y")).sample
    assert (out - expected["out"]).abs().max() <= 1e-4 * expected["out"].abs().max()


@pytest.mark.parametrize("file", ["adm_cifar_like", "adm_imagenet_like"])
def test_forward_equals_guided_diffusion(golden: Path, file: str) -> None:
    unet = load(golden, file)
    assert type(unet) is UNet2DModel
    assert_same_outputs(unet, arrays(golden / f"{file}_forward.npz"))


def test_forward_equals_consistency_models(golden: Path) -> None:
    # Times are 250·ln σ there: negative and fractional.
    expected = arrays(golden / "cm.npz", prefix="forward_")
    assert_same_outputs(load(golden, "cm_student"), expected)


@pytest.mark.parametrize("file", FILES)
def test_round_trip_is_bit_for_bit(golden: Path, file: str, tmp_path: Path) -> None:
    save_adm(load(golden, file), tmp_path / "direct.pt")
    load(golden, file).save_pretrained(tmp_path / "unet")
    save_adm(UNet2DModel.from_pretrained(tmp_path / "unet"), tmp_path / "through_diffusers.pt")

    original = torch.load(golden / f"{file}.pt", weights_only=True)
    for name in ("direct.pt", "through_diffusers.pt"):
        back = torch.load(tmp_path / name, weights_only=True)
        assert list(back) == list(original)
        for key, tensor in original.items():
            assert back[key].dtype == tensor.dtype
            assert back[key].shape == tensor.shape
            assert back[key].numpy().tobytes() == tensor.numpy().tobytes()


def test_default_flags_do_not_fit_and_the_message_says_which(golden: Path) -> None:
    with pytest.raises(ValueError, match=r"time_embed\.0\.weight is \(128, 32\) .* \(512, 128\); .* num_channels "):
        load_adm(golden / "adm_cifar_like.pt")
