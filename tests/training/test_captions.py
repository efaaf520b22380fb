"""Training on captions: a tiny PixArt on a captioned folder.

The captions of a batch depend on the seed and the batch number alone: not on processes, microbatches or a resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from robustdiff.recipe import Recipe
from robustdiff.training.build import build_model
from robustdiff.training.run import _accelerator
from robustdiff.training.trainer import Trainer

transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]
CAPTIONS = [["a red shoe", "a shoe", "red"], ["a blue shirt"], ["a blue shoe", "blue"], ["a red shirt", "shirt"]]
NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    text = transformers.T5Config(
        vocab_size=len(WORDS), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=4,
        caption_channels=12,
        use_additional_conditions=False,
    )
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)  # as it is made, the caption has no effect
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    PixArtAlphaPipeline(
        tokenizer=transformers.T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(WORDS)], extra_ids=0),
        text_encoder=transformers.T5EncoderModel(text),
        vae=AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=8),
        transformer=network,
        scheduler=DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    return folder


def captioned(folder: Path, captions: list[list[str]] = CAPTIONS) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for k, texts in enumerate(captions):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def train(robustdiff: Any, pipeline: Path, tmp_path: Path) -> Any:
    """train(output, field=…): run `robustdiff train` on the captioned folder and return the trained network."""

    def run(output: str, *words: str, **fields: Any) -> dict[str, torch.Tensor]:
        values = {
            "data.name": "imagefolder",
            "data.root": captioned(tmp_path / "images") if "data.root" not in fields else fields["data.root"],
            "model.name": "pretrained",
            "model.path": pipeline,
            "output": tmp_path / output,
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "ema": 0,
            "threads": 1,
            **fields,
        }
        (tmp_path / "r.yaml").write_text("{}")
        sets = [word for field, value in values.items() for word in ("--set", f"{field}={value}")]
        outcome = robustdiff("train", tmp_path / "r.yaml", "--cpu", *sets, *words)
        assert outcome.code == 0, outcome.err
        return load_file(tmp_path / output / "model" / "transformer" / NETWORK)

    return run


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def spied(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """spied(batches, …): what the condition is called with, as (captions, dropped), by batch and microbatch."""

    def run(
        batches: int, rank: int = 0, processes: int = 1, start: int = 0, dropout: float = 0.0, **fields: Any
    ) -> list[list[tuple[list[str], Any]]]:
        recipe = Recipe.model_validate(
            {
                "data": {"name": "imagefolder", "root": str(captioned(tmp_path / "images"))},
                "model": {"name": "pretrained", "path": str(pipeline), "condition_dropout": dropout},
                "batch_size": 8,
                "threads": 1,
                **fields,
            }
        )
        dataset = recipe.data.load()
        trainer = Trainer(recipe, _accelerator(recipe, True), dataset, build_model(recipe, dataset))
        trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))  # type: ignore[assignment]
        given: list[tuple[list[str], Any]] = []
        condition = type(trainer.built.model.condition)
        original = condition.batch

        def batch(self: Any, labels: Any, captions: Any, dropped: Any, geometry: Any = None) -> Any:
            given.append((list(captions), None if dropped is None else dropped.tolist()))
            return original(self, labels, captions, dropped, geometry)

        monkeypatch.setattr(condition, "batch", batch)
        trainer.batch, found, loop = start, [], trainer.batches()
        for _ in range(batches):
            given.clear()
            next(loop)
            found.append(list(given))
            trainer.batch += 1
        monkeypatch.setattr(condition, "batch", original)
        return found

    return run


def test_each_caption_is_drawn_as_often_as_the_others(spied: Any) -> None:
    drawn = [caption for ((captions, _),) in spied(15, batch_size=40) for caption in captions]
    assert len(drawn) == 600
    for several in CAPTIONS:
        for caption in several:
            assert drawn.count(caption) == pytest.approx(150 / len(several), abs=30)


def test_captions_do_not_depend_on_processes_microbatches_or_where_a_run_begins(spied: Any) -> None:
    whole = [microbatch for (microbatch,) in spied(4, dropout=0.5)]
    assert any(any(dropped) for _, dropped in whole)
    assert not all(all(dropped) for _, dropped in whole)
    assert [microbatch for (microbatch,) in spied(2, start=2, dropout=0.5)] == whole[2:]
    for processes, accumulate in ((1, 2), (2, 1), (2, 2)):
        parts = [spied(4, rank, processes, dropout=0.5, accumulate=accumulate) for rank in range(processes)]
        for b, (captions, dropped) in enumerate(whole):
            pieces = [parts[rank][b][m] for m in range(accumulate) for rank in range(processes)]
            assert [caption for piece, _ in pieces for caption in piece] == captions
            assert [mask for _, piece in pieces for mask in piece] == dropped


def test_training_depends_on_the_captions_unless_all_are_dropped(train: Any, tmp_path: Path) -> None:
    other = captioned(tmp_path / "other", [["shirt"]] * 4)
    assert not same(train("a"), train("b", **{"data.root": other}))
    dropped = {"model.condition_dropout": 0.999999}
    assert same(train("c", **dropped), train("d", **dropped, **{"data.root": other}))


def test_a_resumed_run_and_loading_processes_change_nothing(train: Any, tmp_path: Path) -> None:
    fields = {"steps": 4, "codec.name": "vae", "codec.cache": True, "model.condition_dropout": 0.3}
    whole = train("whole", **fields)
    train("parts", **{**fields, "steps": 2})
    assert same(train("parts", "--resume", **fields, **{"data.workers": 1}), whole)
    data = json.loads((tmp_path / "parts" / "data.json").read_text())
    assert len(data["captions"]) == 64


def test_a_resume_with_other_captions_is_refused(train: Any, robustdiff: Any, tmp_path: Path) -> None:
    train("run", steps=2)
    captioned(tmp_path / "images", CAPTIONS[::-1])
    recipe = tmp_path / "run" / "recipe.yaml"
    outcome = robustdiff("train", recipe, "--cpu", "--resume", "--set", "steps=4")
    assert outcome.code == 2
    assert "was trained with other data (captions)" in outcome.err
