"""DINOv2's features are those of its authors' network: their positions, their resizing; other folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.errors import InputError
from robustdiff.metrics.extractors.dinov2 import interpolate_positions
from robustdiff.metrics.extractors.extractor import load_extractor

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DINOv2 with random weights and a grid of 37 × 37 patches, as the published ones have."""
    path = tmp_path_factory.mktemp("dinov2") / "tiny"
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def images(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def cubic(distance: np.ndarray) -> np.ndarray:
    """The kernel of bicubic interpolation with a = −0.75 (Keys 1981), which torch uses."""
    x, a = np.abs(distance), -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def test_positions_are_interpolated_by_the_scale_of_the_authors():
    """A grid of n patches samples the trained one of N at (i + 1/2) N/(n + 0.1) − 1/2."""
    trained, side, dim = 37, 16, 5
    positions = torch.randn(1, 1 + trained**2, dim, generator=torch.Generator().manual_seed(0))
    at = (np.arange(side) + 0.5) * trained / (side + 0.1) - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    weights = np.zeros((side, trained))
    for row, (point, tap) in enumerate(zip(at, taps, strict=True)):
        np.add.at(weights[row], np.clip(tap, 0, trained - 1).astype(int), cubic(point - tap))
    grid = positions[0, 1:].double().numpy().reshape(trained, trained, dim)
    expected = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(-1, dim)
    found = interpolate_positions(positions, side)
    assert found.shape == (1, 1 + side**2, dim)
    assert torch.equal(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-5)
    assert interpolate_positions(positions, trained) is positions


@pytest.mark.parametrize("shape", [(3, 40, 30), (1, 28, 28), (3, 300, 300)])
def test_features_are_the_class_token_of_the_resized_image(folder, shape):
    extractor = load_extractor(f"dinov2={folder}")
    given = images(2, *shape)
    found = extractor(given)
    assert found.shape == (2, 16)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    model.embeddings.position_embeddings.data = interpolate_positions(model.embeddings.position_embeddings.data, 16)
    for image, feature in zip(given, found, strict=True):
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
        pixels = np.asarray(picture, np.float64) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            output = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float()).last_hidden_state[0, 0]
        torch.testing.assert_close(feature, output, rtol=1e-3, atol=1e-4)


def test_the_fingerprint_is_that_of_the_weights(folder):
    assert load_extractor("dinov2", weights=folder).fingerprint == load_extractor(f"dinov2={folder}").fingerprint
    assert load_extractor(f"dinov2={folder}").name == "dinov2=tiny"


def test_other_folders_and_images_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="dinov2=FOLDER"):
        load_extractor("dinov2")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_extractor(f"dinov2={tmp_path}")
    with pytest.raises(InputError, match="give one"):
        load_extractor(f"dinov2={folder}", weights=folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match=r"clip.*, not of a DINOv2"):
        load_extractor(f"dinov2={tmp_path}")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="model of DINOv2 cannot be read") as error:
        load_extractor(f"dinov2={tmp_path}")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="2 channels"):
        load_extractor(f"dinov2={folder}")(images(1, 2, 8, 8))
