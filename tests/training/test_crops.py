"""Random crops and aspect-ratio buckets in training, through the trainer and the command line."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from robustdiff.errors import InputError
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.training.build import build_model
from robustdiff.training.run import _accelerator
from robustdiff.training.trainer import Trainer

SIZES = [(16, 16)] * 3 + [(20, 40)] * 5 + [(48, 24)] * 3
CACHED = {"codec": {"name": "vae", "path": "fashion-16-vae", "cache": True}}
BUCKETS = {"size": 16, "buckets": True, "bucket_step": 8}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for k, (height, width) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8)).save(tmp_path / f"images/{k:02d}.png")
    return tmp_path / "images"


def recipe_of(images: Path, data: dict[str, Any], **fields: Any) -> Recipe:
    values = {
        "data": {"name": "imagefolder", "root": str(images), **data},
        "model": {"channels": [8, 16], "groups": 4, "layers": 1},
        "batch_size": 4,
        "threads": 1,
        **fields,
    }
    return Recipe.model_validate(values)


def drawn(recipe: Recipe, number: int, start: int = 0, rank: int = 0, processes: int = 1) -> list[list[torch.Tensor]]:
    """Return x_0 of each batch and microbatch, with the noise behind it."""
    dataset = recipe.data.load()
    trainer = Trainer(recipe, _accelerator(recipe, True), dataset, build_model(recipe, dataset))
    shares = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    trainer.accelerator, trainer.batch = shares, start  # type: ignore[assignment]
    found = []
    for draws in islice(trainer.batches(), number):
        found.append([torch.cat([draw.x0, draw.noise], dim=1) for draw in draws])
        trainer.batch += 1
    return found


@pytest.mark.parametrize("data", [BUCKETS, {"size": 16, "crop": "random"}, {**BUCKETS, "crop": "random", "flip": True}])
def test_batches_do_not_depend_on_processes_microbatches_workers_or_where_a_run_begins(
    images: Path, data: dict[str, Any]
) -> None:
    whole = [batch for (batch,) in drawn(recipe_of(images, data), 6)]
    later = drawn(recipe_of(images, {**data, "workers": 1}), 3, start=3)
    assert all(torch.equal(batch, wanted) for (batch,), wanted in zip(later, whole[3:], strict=True))
    parts = [drawn(recipe_of(images, data, accumulate=2), 6, rank=rank, processes=2) for rank in range(2)]
    for b, wanted in enumerate(whole):
        assert torch.equal(torch.cat([parts[rank][b][m] for m in range(2) for rank in range(2)]), wanted)


def test_buckets_have_shapes_of_their_own(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = [batch for (batch,) in drawn(recipe_of(images, BUCKETS), 30)]
    shapes = [tuple(batch.shape) for batch in batches]
    assert {shape: shapes.count(shape) for shape in set(shapes)} == pytest.approx(
        {(4, 2, 16, 16): 30 * 3 / 11, (4, 2, 8, 24): 30 * 5 / 11, (4, 2, 24, 8): 30 * 3 / 11}, abs=2
    )
    assert "2 of 3 buckets have fewer images than batch_size 4, such as 16×16 with 3" in caplog.text


def test_random_crops_differ_between_epochs_and_centred_ones_do_not(images: Path) -> None:
    for crop, kinds in (("centre", len(SIZES)), ("random", 40)):
        rows = torch.cat([batch for (batch,) in drawn(recipe_of(images, {"size": 16, "crop": crop}), 22)])[:, :1]
        assert len(rows.flatten(1).unique(dim=0)) >= kinds
        assert crop == "random" or len(rows.flatten(1).unique(dim=0)) == kinds


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ({**BUCKETS, "size": None}, {}, "needs data.size, a multiple of data.bucket_step=8; it is None"),
        ({**BUCKETS, "size": 20}, {}, "it is 20"),
        ({**BUCKETS, "bucket_step": 1}, {}, "takes sides that are multiples of 2 pixels: set data.bucket_step"),
        (BUCKETS, CACHED, "data.buckets=true needs other crops of the images than codec.cache keeps"),
        ({"crop": "random"}, CACHED, "data.crop=random needs other crops of the images than codec.cache keeps"),
        ({"name": "digits", "root": None, "crop": "random"}, {}, "crop=random needs images in files, and digits has"),
    ],
)
def test_what_cannot_be_cropped_is_refused(images: Path, data: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(recipe_of(images, data, **fields), 1)


def test_a_network_of_square_images_is_refused(images: Path) -> None:
    for k in range(len(SIZES)):
        (images / str(k % 2)).mkdir(exist_ok=True)
        (images / f"{k:02d}.png").rename(images / str(k % 2) / f"{k:02d}.png")
    model = {"name": "dit", "layers": 1, "heads": 1, "head_width": 16}
    codec = {"name": "vae", "path": "fashion-16-vae"}
    with pytest.raises(InputError, match=r"takes square images alone: leave data.buckets out"):
        drawn(recipe_of(images, BUCKETS, model=model, codec=codec), 1)


def test_only_training_crops(images: Path, tmp_path: Path) -> None:
    from robustdiff.recipe import load_data_config

    (tmp_path / "r.yaml").write_text(recipe_of(images, BUCKETS).to_yaml())
    for assignment in ("data.crop=random", "data.buckets=true", "data.bucket_step=8"):
        with pytest.raises(InputError, match="this command does not use it"):
            load_data_config(str(tmp_path / "r.yaml"), [assignment])
    assert load_recipe(str(tmp_path / "r.yaml")).data.load().shape == (1, 16, 16)


def test_a_run_in_buckets_resumes_bit_for_bit(robustdiff: Any, images: Path, tmp_path: Path) -> None:
    fields = {"steps": 4, "checkpoint_every": 2, "ema": 0, "adversary": {"name": "free", "steps": 2}}
    weights = []
    data = {**BUCKETS, "crop": "random", "flip": True}
    for output, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            recipe = recipe_of(images, data, **fields, output=str(tmp_path / output))
            (tmp_path / "r.yaml").write_text(recipe.to_yaml())
            outcome = robustdiff("train", tmp_path / "r.yaml", "--cpu", "--resume", "--set", f"steps={steps}")
            assert outcome.code == 0, outcome.err
        weights.append(load_file(tmp_path / output / "model/unet/diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_xl_is_called_with_the_geometry_of_crops_in_buckets(
    images: Path, make_sd_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    path = make_sd_pipeline(tmp_path / "xl", "xl")
    for k in range(len(SIZES)):
        (images / f"{k:02d}.txt").write_text("red" if k % 2 else "blue")
    data = {"size": 8, "channels": 3, "buckets": True, "bucket_step": 4, "crop": "random", "flip": True}
    recipe = recipe_of(images, data, model={"name": "pretrained", "path": str(path)}, steps=12)
    dataset = recipe.data.load()
    trainer = Trainer(recipe, _accelerator(recipe, True), dataset, build_model(recipe, dataset))
    called: list[Any] = []
    network = trainer.built.model.network
    original = network.forward

    def forward(x: torch.Tensor, *arguments: Any, **condition: Any) -> Any:
        called.append((tuple(x.shape), condition["added_cond_kwargs"]["time_ids"]))
        return original(x, *arguments, **condition)

    monkeypatch.setattr(network, "forward", forward)
    shapes = set()
    for draws in islice(trainer.batches(), 12):
        with torch.no_grad():
            trainer.objective(trainer.call, draws[0])
        (shape, ids), draw = called.pop(), draws[0]
        shapes.add(shape)
        assert shape == tuple(draw.x0.shape)
        height, width = 2 * shape[2], 2 * shape[3]
        assert ids[:, 4:].tolist() == [[height, width]] * 4
        for original_height, original_width, top, left in ids[:, :4].tolist():
            assert (original_height, original_width) in SIZES
            scale = max(height / original_height, width / original_width)
            assert 0 <= top <= original_height * scale - height + 1
            assert 0 <= left <= original_width * scale - width + 1
        trainer.batch += 1
    assert shapes == {(4, 4, 4, 4), (4, 4, 2, 6), (4, 4, 6, 2)}
