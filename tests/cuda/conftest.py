"""Everything that computes on a device, on the CPU and on a GPU.

    python -m pytest tests/cuda

Without a GPU the tests "cuda" are skipped, and the same bodies run on the CPU, so that they are known to be right
before a GPU runs them. Nothing is needed beside the package and pytest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from robustdiff.recipe import Recipe, load_recipe
from robustdiff.training.run import train

# cuBLAS reads it when CUDA starts; without it torch refuses to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=[*([] if torch.cuda.is_available() else ["cpu"]), pytest.param("cuda", marks=on_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The device, by its type."""
    return str(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=on_cuda)])
def gpu(request: pytest.FixtureRequest) -> str:
    """The device of what only a GPU can show."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_state(no_state_of_accelerate: None) -> None:
    """Let every test choose its device."""


@pytest.fixture
def exact() -> Iterator[None]:
    """Deterministic algorithms, and products in float32 and not TF32."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture
def eager(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, all of torch.compile but the generation of C++, which takes half a minute; and without a compiler."""
    if device == "cpu" or not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(name, output, "key=value", …): a shipped recipe that makes six updates of sixteen images."""

    def make(name: str, output: str, *overrides: str) -> Recipe:
        small = ["steps=6", "batch_size=16", "warmup=0", "log_every=1", "checkpoint_every=3", "precision=fp32"]
        if name == "digits":
            small += ["model.channels=[8,16]", "model.groups=4"]
        return load_recipe(name, [*small, "threads=1", "watch=none", *overrides, f"output={tmp_path / output}"])

    return make


class Crash(Exception):
    """As a kill: the run ends where it is."""


@pytest.fixture
def train_cut(device: str, watch: Any) -> Callable[..., None]:
    """train_cut(recipe, after=recipe): train until a checkpoint is behind, and then, with ``after``, to the end."""

    def run(first: Recipe, after: Recipe | None = None) -> None:
        def crash(step: int) -> None:
            if step > first.checkpoint_every:
                raise Crash

        with pytest.raises(Crash):
            train(first, cpu=device == "cpu", progress=watch(crash))
        AcceleratorState._reset_state(reset_partial_state=True)  # as in another process
        PartialState._reset_state()
        train(after or first, cpu=device == "cpu", resume=True)

    return run


@pytest.fixture
def learned() -> Callable[[Recipe], dict[str, torch.Tensor]]:
    """learned(recipe): all that a finished run has learned, by name."""

    def read(recipe: Recipe) -> dict[str, torch.Tensor]:
        folder = Path(recipe.output)
        checkpoint = max((folder / "checkpoints").glob("step-*"))
        whole = (folder / "model").glob("[ut]*/diffusion_pytorch_model.safetensors")  # unet or transformer
        (network,) = [*whole, *(folder / "model").glob("pytorch_lora_weights.safetensors")]
        files = {"model": network}
        files |= {f"{path.stem} now": path for path in checkpoint.glob("[!r]*.safetensors")}  # all but random states
        tensors = {f"{kind}/{name}": value for kind, path in files.items() for name, value in load_file(path).items()}
        return tensors

    return read
