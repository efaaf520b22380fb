"""DiT: fine-tuned by free AT from a pipeline of diffusers, sampled, and read by diffusers again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from PIL import Image

from robustdiff.backbones.dit import DiT, DiTSection
from robustdiff.backbones.frozen import FrozenWeights
from robustdiff.backbones.model import load_model
from robustdiff.conditions.labels import Labels
from robustdiff.errors import InputError
from robustdiff.samplers import sample

NAMES = {"0": "blue", "1": "red, scarlet"}


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """A VAE that halves twice, random."""
    arguments: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**arguments, **changes})


def tiny_dit(**changes: Any) -> DiTTransformer2DModel:
    arguments: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 4,
        "num_embeds_ada_norm": 2,
    }
    return DiTTransformer2DModel(**{**arguments, **changes})


def save(folder: Path, network: DiTTransformer2DModel, vae: AutoencoderKL) -> Path:
    pipeline = DiTPipeline(network, vae, DDIMScheduler(clip_sample=False))
    pipeline.register_to_config(id2label=NAMES)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("dit") / "pipeline", tiny_dit(), tiny_vae())


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "p")
    return tmp_path / "p"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for colour, name in enumerate(("blue", "red")):
        (root / name).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * colour] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def overrides(model: Path, images: Path, run: Path, *more: str) -> list[str]:
    values = [
        f"model.path={model}", f"data.root={images}", "data.size=16", "data.workers=0", "precision=fp32", "steps=6",
        "batch_size=4", "lr=1e-3", "checkpoint_every=3", "log_every=1", "ema=0", f"output={run}", *more,
    ]  # fmt: skip
    return [word for value in values for word in ("--set", value)]


def of_diffusers(folder: Path, latents: torch.Tensor, labels: list[int], steps: int, guidance: float) -> torch.Tensor:
    """Return the images of diffusers' pipeline from given latents, in [0, 1]."""
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda shape, **_: latents.clone())
        result = pipeline(labels, guidance_scale=guidance, num_inference_steps=steps, output_type="np")
    return torch.from_numpy(result.images).permute(0, 3, 1, 2)


def test_a_pipeline_of_diffusers_is_fine_tuned_sampled_and_read_by_diffusers_again(
    robustdiff: Callable[..., Any], saved: Path, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = robustdiff("train", "dit", *overrides(saved, images, run, "adversary.step_size=100"))
    assert outcome.code == 0, outcome.err
    # The step leads further: δ is on the sphere of the radius η√d, with d the numbers of the latent, not of the image.
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["delta_norm"] == pytest.approx(0.1 * (4 * 4 * 4) ** 0.5)
    before, after = load_model(saved), load_model(run)
    assert not torch.equal(before.network.proj_out_2.weight, after.network.proj_out_2.weight)
    assert DiTPipeline.from_pretrained(run / "model").labels == {"blue": 0, "red": 1, "scarlet": 1}

    output = tmp_path / "samples.npz"
    outcome = robustdiff("sample", run, "--num", 4, "--steps", 5, "--guidance", 2, "--output", output)
    assert outcome.code == 0, outcome.err
    with np.load(output) as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1]

    latents = torch.randn(4, *after.shape, generator=torch.Generator().manual_seed(1))
    for guidance in (1.0, 2.0):
        ours = sample(
            after,
            after.process,
            "ddim",
            5,
            latents=latents,
            guidance=guidance,
            condition=after.condition.batch(torch.tensor([0, 1, 0, 1]), None, None),
            unconditional=after.condition.empty(),
            **after.sampling,
        )
        decoded = (after.codec.decode(ours) / 2 + 0.5).clamp(0, 1)
        theirs = of_diffusers(run / "model", latents, [0, 1, 0, 1], 5, guidance)
        torch.testing.assert_close(decoded, theirs, rtol=0, atol=1e-4)


def test_a_network_is_stored_for_the_null_class_of_diffusers_and_loaded_with_its_own(pipeline: Path) -> None:
    model = load_model(pipeline)
    model.save(pipeline.parent / "saved")
    stored = DiTPipeline.from_pretrained(pipeline.parent / "saved").transformer
    assert (stored.config.num_embeds_ada_norm, stored.config["_num_classes"]) == (1000, 2)
    for own, wide in zip(model.network.transformer_blocks, stored.transformer_blocks, strict=True):
        rows, more = (block.norm1.emb.class_embedder.embedding_table.weight for block in (own, wide))
        assert (rows.shape, more.shape) == ((3, 16), (1001, 16))
        assert torch.equal(more[:3], rows)
        assert torch.equal(more[2:], rows[2].expand(999, -1))
    again = load_model(pipeline.parent / "saved")
    assert again.fingerprint() == model.fingerprint()
    assert again.condition == Labels(3, null=True)
    assert again.network.config.num_embeds_ada_norm == 2
    frozen = FrozenWeights(torch.float32)
    load_model(pipeline.parent / "saved", frozen=frozen)
    assert frozen.fingerprint == model.fingerprint()

    config = pipeline.parent / "saved" / "transformer" / "config.json"
    for classes, words in ((1, "has other rows after 1 classes"), (1000, "no number of classes"), ("2", "no number")):
        edit(config, _num_classes=classes)
        with pytest.raises(InputError, match=words):
            load_model(pipeline.parent / "saved")


def test_cached_latents_train_the_same_and_a_run_goes_on(
    robustdiff: Callable[..., Any], saved: Path, images: Path, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("cached", "uncached", "resumed")}
    for name in ("cached", "uncached"):
        cache = f"codec.cache={'true' if name == 'cached' else 'false'}"
        assert robustdiff("train", "dit", *overrides(saved, images, runs[name], cache)).code == 0
    shutil.copytree(runs["cached"], runs["resumed"])
    for path in ("result.json", "checkpoints/00000006"):
        target = runs["resumed"] / path
        shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
    states = {name: load_model(run).network.state_dict() for name, run in runs.items() if name != "resumed"}
    torch.testing.assert_close(states["cached"], states["uncached"], rtol=0, atol=1e-3)
    outcome = robustdiff("train", "dit", *overrides(saved, images, runs["resumed"]), "--resume")
    assert outcome.code == 0, outcome.err
    torch.testing.assert_close(load_model(runs["resumed"]).network.state_dict(), states["cached"], rtol=0, atol=0)


def test_the_recipe_for_fashion_16_trains_and_samples(robustdiff: Callable[..., Any], tmp_path: Path) -> None:
    run, words = tmp_path / "run", []
    for value in ("data.split=test", "steps=2", "batch_size=4", "codec.cache=false", "ema=0", f"output={run}"):
        words += ["--set", value]
    outcome = robustdiff("train", "fashion-16-dit", *words)
    assert outcome.code == 0, outcome.err
    output = tmp_path / "samples.npz"
    assert robustdiff("sample", run, "--num", 3, "--steps", 2, "--guidance", 2, "--output", output).code == 0
    with np.load(output) as arrays:
        assert arrays["arr_0"].shape == (3, 16, 16, 1)


def test_labels_are_dropped_by_the_condition_alone(saved: Path) -> None:
    network = load_model(saved).network.train()
    x, t, labels = torch.randn(8, 4, 4, 4), torch.zeros(8), torch.zeros(8, dtype=torch.long)
    outputs = [network(x, t, class_labels=labels).sample for _ in range(8)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(network(x, t, class_labels=labels + 2).sample, outputs[0])


def test_a_pipeline_says_its_shapes_classes_and_learned_variance(saved: Path) -> None:
    model = load_model(saved)
    assert (model.shape, model.image_shape) == ((4, 4, 4), (3, 16, 16))
    assert model.condition == Labels(3, null=True)
    assert model.backbone.learned_variance
    assert model.prediction == "epsilon"
    assert model.codec.clip is None
    with torch.no_grad():
        buffers = dict(tiny_dit().named_buffers())
    for name, buffer in model.network.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_the_first_releases_are_read(pipeline: Path) -> None:
    """facebook/DiT-XL-2-256 has another class, and fields that the class of today does not have."""
    old = {"double_self_attention": False, "cross_attention_dim": None, "use_linear_projection": False}
    edit(pipeline / "transformer" / "config.json", _class_name="Transformer2DModel", **old)
    edit(pipeline / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    assert isinstance(load_model(pipeline).backbone, DiT)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("transformer/config.json", {"sample_size": 5}, "whole patches"),
        ("transformer/config.json", {"sample_size": 100_000}, "sample_size"),
        ("transformer/config.json", {"sample_size": [4, 4]}, "sample_size"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size"),
        ("transformer/config.json", {"num_layers": 10_000}, "num_layers"),
        ("transformer/config.json", {"num_layers": 3}, "lacks"),
        ("transformer/config.json", {"norm_type": "ada_norm_single"}, "does not describe"),
        ("transformer/config.json", {"num_embeds_ada_norm": 1000}, "not of the network"),
        ("transformer/config.json", {"in_channels": 3}, "channels|called|not of"),
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "describes a"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "AutoencoderKL"),
        ("model_index.json", {"vae": None}, "AutoencoderKL"),
        ("model_index.json", {"id2label": {"a": 3}}, "id2label"),
        ("model_index.json", {"transformer": ["os", "system"]}, "transformer is system of os"),
        ("vae/config.json", {"shift_factor": 0.5}, "shift"),
        ("vae/config.json", {"scaling_factor": -1.0}, "scaling_factor"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline: Path, part: str, fields: Any, words: str) -> None:
    edit(pipeline / part, **fields)
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline)
    assert "\n" not in str(error.value)


def test_another_size_and_a_vae_of_other_latents_are_refused(pipeline: Path) -> None:
    with pytest.raises(InputError, match="16×16"):
        load_model(pipeline, size=32)
    shutil.rmtree(pipeline / "vae")
    tiny_vae(latent_channels=3).save_pretrained(pipeline / "vae")
    with pytest.raises(InputError, match="takes 4 channels and the VAE encodes as 3"):
        load_model(pipeline)


# -- new networks --------------------------------------------------------------------------------------------


def test_a_new_network_is_the_identity_at_first_and_predicts_zero() -> None:
    network = DiTSection(layers=2, heads=2, head_width=8).build((4, 8, 8), 3, True).network
    assert network.config.out_channels == 8
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 3])
    assert not network(x, t, class_labels=labels).sample.any()
    tokens = network.pos_embed(x)
    torch.testing.assert_close(network.transformer_blocks[0](tokens, timestep=t, class_labels=labels), tokens)


@pytest.mark.parametrize(
    ("shape", "classes", "words"),
    [((4, 8, 6), 3, "square"), ((4, 7, 7), 3, "whole patches"), ((4, 8, 8), None, "needs labels")],
)
def test_data_that_a_new_network_cannot_take_is_refused(shape: Any, classes: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DiTSection(layers=1, heads=2, head_width=8).build(shape, classes, False)


def test_networks_beyond_all_bounds_are_refused(robustdiff: Callable[..., Any], tmp_path: Path) -> None:
    outcome = robustdiff("train", "fashion-16-dit", "--set", "model.layers=256", "--set", "model.head_width=65536")
    assert outcome.code == 2
    assert "parameters" in outcome.err
    outcome = robustdiff("train", "fashion-16-dit", "--set", "model.heads=1", "--set", "model.head_width=6")
    assert (outcome.code, "multiple of 4" in outcome.err) == (2, True)


def test_a_learned_variance_is_exported_with_a_scheduler_that_the_pipeline_can_use(
    robustdiff: Callable[..., Any], tmp_path: Path
) -> None:
    run, words = tmp_path / "run", []
    for value in (
        "data.split=test", "steps=2", "batch_size=4", "codec.cache=false", "ema=0", "model.layers=1",
        "objective.variance=learned_range", f"output={run}",
    ):  # fmt: skip
        words += ["--set", value]
    outcome = robustdiff("train", "fashion-16-dit", *words)
    assert outcome.code == 0, outcome.err
    assert isinstance(DiTPipeline.from_pretrained(run / "model").scheduler, DDIMScheduler)
    model = load_model(run)
    latents = torch.randn(2, *model.shape)
    ours = sample(
        model, model.process, "ddim", 4, latents=latents,
        condition=model.condition.batch(torch.tensor([0, 1]), None, None), **model.sampling,
    )  # fmt: skip
    decoded = (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, of_diffusers(run / "model", latents, [0, 1], 4, 1.0), rtol=0, atol=1e-4)
