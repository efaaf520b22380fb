"""Fixtures of several test modules: the command line in this process, a small finished run, the golden data."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff import cli
from robustdiff.perturbation.norms import L2

with suppress(ImportError):  # the tests of devices need nothing beside the package and pytest
    from hypothesis import HealthCheck, settings

    # On a busy machine everything is slow. In CI the examples are the same for one commit, so that a result repeats.
    settings.register_profile(
        "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
    )
    settings.load_profile("busy")

WHOLE = {"benchmarks", "extension", "golden", "test_docs.py", "test_examples.py"}
"""Tests of the whole, whose coverage is not measured: the other tests are of its parts."""

TINY = [
    "model.channels=[8,16]",
    "model.groups=4",
    "steps=6",
    "batch_size=8",
    "checkpoint_every=2",
    "log_every=2",
    "threads=1",
    "warmup=0",
]
"""Overrides that make the recipe `digits` take a second."""


@dataclass(frozen=True)
class Outcome:
    """Hold the exit code and the output of a command."""

    code: int
    out: str
    err: str


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Stop measuring coverage in tests of the whole, which take a third longer while it is measured."""
    parts = item.path.relative_to(Path(__file__).parent).parts
    coverage = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if coverage is None or WHOLE.isdisjoint(parts):
        return (yield)
    coverage.stop()
    try:
        return (yield)
    finally:
        coverage.start()


class _AuthorsL2(L2):
    """ℓ2 as in the authors' float32 code, where a step is shorter in proportion if ‖∇‖₂ is below 2²⁰·10⁻⁸."""

    def ascent(self, grad: torch.Tensor) -> torch.Tensor:
        length = (grad.flatten(1).norm(dim=1) / (2**20 * 1e-8)).clamp_max(1)
        return super().ascent(grad) * length[:, None, None, None]


@pytest.fixture
def authors_l2() -> L2:
    return _AuthorsL2()


@pytest.fixture
def no_state_of_accelerate() -> Iterator[None]:
    """Run a test without what other tests in this process leave to accelerate, and leave nothing to them.

    Accelerate keeps the first precision and device that it was given for the whole process, and an accumulation of
    gradients, within which optimisers make no step.
    """
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache; the workers of pytest-xdist share one, with its key."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    (base / "key").write_bytes(secrets.token_bytes(32))
    with suppress(FileExistsError):  # of the worker that was first
        os.link(base / "key", folder / "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTDIFF_CACHE", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two workers with two threads each would stand in each other's way on two cores."""
    torch.set_num_threads(1)


@pytest.fixture
def robustdiff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, called in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["robustdiff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies are worked at in this process, where torch is imported, and not by workers that import it first."""
    monkeypatch.setattr("robustdiff.study.run.run_workers", lambda call, parts: not parts or call(parts[0]))


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments for `robustdiff train digits` that make it take a second."""
    return [argument for override in TINY for argument in ("--set", override)]


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DModel]:
    """make_unet(num_class_embeds=3, …): a small UNet for images (1, 8, 8), each time with the same weights."""

    def make(block_out_channels: tuple[int, ...] = (8, 8), **changes: Any) -> UNet2DModel:
        torch.manual_seed(0)
        levels = len(block_out_channels)
        arguments = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": block_out_channels,
            "down_block_types": ("DownBlock2D",) * levels,
            "up_block_types": ("UpBlock2D",) * levels,
            "norm_num_groups": 4,
        }
        return UNet2DModel(**{**arguments, **changes}).eval()

    return make


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., tuple[Any, Any]]:
    """make_clip(width=12, projection=None): a tokenizer of CLIP, and a text encoder, with a projection if it is given.

    The tokenizer has all letters and the words red, blue and shoe. Captions have 16 tokens.
    """
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>"), ("s", "h"), ("sh", "o")]
    merges += [("sho", "e</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}

    def make(width: int = 12, projection: int | None = None) -> tuple[Any, Any]:
        torch.manual_seed(width)
        config = transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            projection_dim=projection or 12,
        )
        kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
        return tokenizer, kind(config)

    return make


@pytest.fixture(scope="session")
def make_sd_pipeline(make_clip: Callable[..., tuple[Any, Any]]) -> Callable[..., Path]:
    """make_sd_pipeline(folder, kind="sd", scheduler=None, seed=0, **changes of the UNet): a tiny pipeline.

    The kinds are "sd" (StableDiffusionPipeline), "xl" (StableDiffusionXLPipeline) and "lcm"
    (LatentConsistencyModelPipeline). Images are (3, 8, 8) and latents (4, 4, 4). The folder is returned.
    """
    import diffusers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def make(folder: Path, kind: str = "sd", scheduler: Any = None, seed: int = 0, **changes: Any) -> Path:
        own: dict[str, Any] = {
            "sd": {"cross_attention_dim": 12},
            "lcm": {"cross_attention_dim": 12, "time_cond_proj_dim": 8},
            "xl": {
                "cross_attention_dim": 20,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 10 + 6 * 8,
            },
        }[kind]
        tokenizer, encoder = make_clip()
        parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": encoder}
        if kind == "xl":
            parts["tokenizer_2"], parts["text_encoder_2"] = make_clip(8, 10)
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        torch.manual_seed(seed)
        unet = {
            "sample_size": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
        }
        parts["unet"] = UNet2DConditionModel(**{**unet, **own, **changes})
        parts["vae"] = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=8,
        )
        if scheduler is None:
            settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
            own_class = diffusers.LCMScheduler if kind == "lcm" else diffusers.DDIMScheduler
            scheduler = own_class(**settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        names = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
        pipeline = getattr(diffusers, names.get(kind, "LatentConsistencyModelPipeline"))
        pipeline(**parts, scheduler=scheduler).save_pretrained(folder)
        return folder

    return make


WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]
"""The tokens of a T5."""


@pytest.fixture(scope="session")
def make_t5() -> Callable[..., tuple[Any, Any]]:
    """make_t5(seed=0, words=WORDS, **config): a tokenizer, and a T5 of width 12."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, words: list[str] = WORDS, **changes: Any) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        config = {
            "vocab_size": len(words),
            "d_model": 12,
            "d_kv": 6,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        }
        tokenizer = transformers.T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(words)], extra_ids=0)
        return tokenizer, transformers.T5EncoderModel(transformers.T5Config(**{**config, **changes}))

    return make


@pytest.fixture(scope="session")
def make_shifted_vae() -> Callable[..., Any]:
    """make_shifted_vae(channels=4): a VAE of factor 2 as those of SD 3 and Flux, shifted and without quant_conv."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    def make(channels: int = 4) -> AutoencoderKL:
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=channels,
            sample_size=8,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    return make


@pytest.fixture(scope="session")
def make_sd3_pipeline(
    make_clip: Callable[..., tuple[Any, Any]],
    make_t5: Callable[..., tuple[Any, Any]],
    make_shifted_vae: Callable[..., Any],
) -> Callable[..., Path]:
    """make_sd3_pipeline(folder, t5=True, scheduler=None, **changes of the transformer): a StableDiffusion3Pipeline.

    Images are (3, 8, 8) and latents (4, 4, 4). Without t5 there is no third text encoder. The folder is returned.
    """
    import diffusers

    def make(folder: Path, t5: bool = True, scheduler: Any = None, **changes: Any) -> Path:
        encoders = [make_clip(8, 6), make_clip(12, 8), make_t5(d_model=24) if t5 else (None, None)]
        parts: dict[str, Any] = {}
        for number, pair in zip(("", "_2", "_3"), encoders, strict=True):
            parts[f"tokenizer{number}"], parts[f"text_encoder{number}"] = pair
        torch.manual_seed(0)
        own = {
            "sample_size": 4,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 14,
            "pos_embed_max_size": 4,
        }
        parts["transformer"] = diffusers.SD3Transformer2DModel(**{**own, **changes})
        parts["scheduler"] = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        diffusers.StableDiffusion3Pipeline(vae=make_shifted_vae(), **parts).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_flux_pipeline(
    make_clip: Callable[..., tuple[Any, Any]],
    make_t5: Callable[..., tuple[Any, Any]],
    make_shifted_vae: Callable[..., Any],
) -> Callable[..., Path]:
    """make_flux_pipeline(folder, dev=True, scheduler=None, **changes of the transformer): a FluxPipeline.

    Sides of images are multiples of 4 pixels. A network of dev takes a scale of guidance, and its times are shifted
    dynamically; otherwise it is as schnell's. The folder is returned.
    """
    import diffusers

    def make(folder: Path, dev: bool = True, scheduler: Any = None, **changes: Any) -> Path:
        parts: dict[str, Any] = dict(zip(("tokenizer", "text_encoder"), make_clip(8), strict=True))
        parts["tokenizer_2"], parts["text_encoder_2"] = make_t5(d_model=24)
        torch.manual_seed(0)
        own = {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": dev,
        }
        parts["transformer"] = diffusers.FluxTransformer2DModel(**{**own, **changes})
        dynamic = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
        parts["scheduler"] = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(**(dynamic if dev else {}))
        diffusers.FluxPipeline(vae=make_shifted_vae(), **parts).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def clip_folder(make_clip: Callable[..., tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP with random weights, for images (3, 12, 12) and the captions of make_clip."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    tokenizer, encoder = make_clip()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 12, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=encoder.config.to_dict(), vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # as they are initialised, all captions would have nearly the same embedding
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 12}, "crop_size": 12}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny network on the digits."""
    from robustdiff.recipe import load_recipe
    from robustdiff.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(load_recipe("digits", [*TINY, f"output={folder}"]))
    return folder


def drawn(seed: int, start: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Yield the weights of a golden network of these tensors as they were drawn, to a few units in the last place.

    torch.randn makes 16 normal numbers of 16 uniform ones (Box & Muller 1958), and these are a Mersenne twister's, from
    `start` on. Matrices and convolutions have the standard deviation 0.7/√(fan-in), biases and normalisations 0.1.
    """
    count = start + sum(int(np.prod(shape)) for shape in shapes.values())
    bits = np.frombuffer(np.random.RandomState(seed).bytes(4 * count), "<u4")[start:]
    uniform = (bits % 2**24).astype(np.float32) / np.float32(2**24)
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        pairs, uniform = uniform[: size // 16 * 16].reshape(-1, 2, 8), uniform[size:]
        radius = np.sqrt(-2 * np.log1p(-pairs[:, 0].astype(np.float64)).astype(np.float32))
        angle = (np.float32(2 * np.pi) * pairs[:, 1]).astype(np.float64)
        normal = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
        normal = normal.ravel() if size % 16 == 0 else np.zeros(size, np.float32)
        scale = 0.7 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        mean = np.float32(len(shape) == 1 and name.endswith("weight"))
        yield (normal * np.float32(scale) + mean).reshape(shape)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of golden data: $ROBUSTDIFF_GOLDEN, else a copy of tests/golden/data with its networks unpacked."""
    if given := os.environ.get("ROBUSTDIFF_GOLDEN"):
        assert Path(given).is_dir(), f"no golden data at {given}, which ROBUSTDIFF_GOLDEN names"
        return Path(given)
    folder = tmp_path_factory.mktemp("golden") / "data"
    shutil.copytree(Path(__file__).parent / "golden" / "data", folder)
    for path in folder.glob("*.npz"):
        with np.load(path, allow_pickle=False) as file:
            if "stream" not in file.files:
                continue
            rest = {name: file[name] for name in file.files if name != "stream"}
            weights = drawn(*file["stream"].tolist(), {name: value.shape for name, value in rest.items()})
            state = {
                name: torch.from_numpy((weight.view(np.int32) + rest[name]).view(np.float32))
                for name, weight in zip(rest, weights, strict=True)
            }
        torch.save(state, path.with_suffix(".pt"))
    return folder


class Watch:
    """A progress that calls a function with how much of the present part is done."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self.on_progress, self.done = on_progress, 0

    def begin(self, description: str, total: float) -> None:
        self.done = 0

    def advance(self, amount: float, note: str = "") -> None:
        self.done += int(amount)
        if amount:
            self.on_progress(self.done)


@pytest.fixture(scope="session")
def watch() -> type[Watch]:
    """Return the class of a progress that a function watches."""
    return Watch
