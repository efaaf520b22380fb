"""Fixtures of several test modules: the command line in this process, a small finished run, the golden data."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff import cli

with suppress(ImportError):  # the tests of devices need nothing beside the package and pytest
    from hypothesis import HealthCheck, settings

    # On a busy machine everything is slow.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")

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
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny network on the digits."""
    from robustdiff.recipe import load_recipe
    from robustdiff.training.trainer import train

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
