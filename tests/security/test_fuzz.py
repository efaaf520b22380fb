"""Every loader on damaged and made-up files: a value, or an InputError of one line, within seconds and a gigabyte.

`HYPOTHESIS_PROFILE=nightly` makes 10,000 inputs of each kind instead of 200.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from robustdiff.backbones.model import Model, load_model
from robustdiff.data.archive import npz
from robustdiff.data.decode import decode_image, read_header
from robustdiff.data.idx import read_idx
from robustdiff.errors import InputError
from robustdiff.metrics.extractors.classifier import Classifier
from robustdiff.recipe import load_recipe, shipped_recipes
from robustdiff.study import run
from robustdiff.study.schema import load_study
from robustdiff.training.build import build_model
from robustdiff.training.checkpoint import newest_checkpoint
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer
from robustdiff.weights import read_weights

EXAMPLES = {"ci": 200, "nightly": 10_000}[os.environ.get("HYPOTHESIS_PROFILE", "ci")]
SECONDS = 5.0  # of this process's own time, however busy the machine is
MEMORY = 2**30

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 200,  # a change is judged by its own inputs
    suppress_health_check=list(HealthCheck),
)
ROOT = Path(__file__).parents[2]
NUMBERS = ["0", "-1", "1e400", "1e999999", ".nan", "NaN", "1000000000000", "9" * 400, "0.5", "[]", "null", '"\\ud800"']


class TooLong(BaseException):
    """Not an Exception, so that no loader takes it for a damaged file."""


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Fail if the block takes too long, needs too much memory, or raises other than an InputError of one line."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except InputError as error:
        assert str(error)
        assert "\n" not in str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


def change(data: bytearray, kind: str, at: int, other: int, byte: int) -> bytearray:
    """Damage a file in one place."""
    at, other = at % (len(data) + 1), other % (len(data) + 1)
    low, high = sorted((at, other))
    match kind:
        case "flip" if at < len(data):
            data[at] = byte
        case "cut":
            del data[at:]
        case "remove":
            del data[low : min(high, low + 64)]
        case "copy":
            data[at:at] = data[low : min(high, low + 256)]
        case "number":
            places = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", bytes(data))]
            if places:
                start, end = places[at % len(places)]
                data[start:end] = NUMBERS[byte % len(NUMBERS)].encode()
        case "nest":
            data[at:at] = (b"[", b'{"a":', b"- ")[byte % 3] * (byte * 20)
    return data


KINDS = st.sampled_from(["flip", "cut", "remove", "copy", "number", "nest"])
PLACES = st.integers(0, 2**20)
CHANGES = st.lists(st.tuples(KINDS, PLACES, PLACES, st.integers(0, 255)), min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2**63, -1, 0, ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the files with a few changes."""
    data = bytearray(draw(st.sampled_from(originals)))
    for kind, *places in draw(CHANGES):
        data = change(data, kind, *places)
    return bytes(data)


@st.composite
def edited(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """A mapping with some values replaced, at any depth."""
    result: dict[str, Any] = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = result
        while place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(VALUES)
            break
    return result


def check(path: Path, data: bytes, load: Callable[[Path], Any]) -> None:
    path.write_bytes(data)
    with guard():
        load(path)


# ------------------------------------------------------------------------------------------------ settings

RECIPES = [(ROOT / "src/robustdiff/recipes" / f"{name}.yaml").read_bytes() for name in shipped_recipes()[:4]]
RECIPE: dict[str, Any] = yaml.safe_load(load_recipe("digits").to_yaml())
STUDIES = [path.read_bytes() for path in sorted((ROOT / "benchmarks/studies").glob("*.yaml"))[:2]]
CELLS = [path.read_bytes() for path in sorted((ROOT / "benchmarks/results").glob("*/cells/*.json"))[:40:20]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(damaged(RECIPES) | edited(RECIPE).map(lambda values: yaml.safe_dump(values).encode()))
def test_recipes(folder, data):
    check(folder / "r.yaml", data, lambda path: load_recipe(str(path)).to_yaml())


@fuzz
@given(damaged(STUDIES) | edited(yaml.safe_load(STUDIES[0])).map(lambda values: yaml.safe_dump(values).encode()))
def test_studies(folder, data):
    check(folder / "s.yaml", data, load_study)


@fuzz
@given(damaged(CELLS) | edited(json.loads(CELLS[0])).map(lambda values: json.dumps(values).encode()))
def test_cells(folder, data):
    def nothing(*_: Any, **__: Any) -> Any:
        raise InputError("nothing is trained or measured here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_train", nothing)
        patch.setattr(run, "_measure", nothing)
        patch.setattr(torch, "set_num_threads", lambda n: None)
        check(folder / "c.json", data, lambda path: run.reproduce(path, folder / "out"))


MANIFEST = json.dumps({"state.json": "0" * 64, "model.safetensors": "1" * 64}).encode()


@fuzz
@given(damaged([MANIFEST]) | edited(json.loads(MANIFEST)).map(lambda values: json.dumps(values).encode()))
def test_checkpoints(folder, data):
    path = folder / "checkpoints/step-00000001"
    path.mkdir(parents=True, exist_ok=True)
    (path / "state.json").write_bytes(b"{}")
    check(path / "manifest.json", data, lambda path: newest_checkpoint(path.parents[1]))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Iterator[Any]:
    """A trainer, with a whole checkpoint of its own in ``checkpoints/step-00000002``."""
    folder = tmp_path_factory.mktemp("run")
    small = ["model.channels=[8]", "model.groups=4", "batch_size=4", "threads=1", "adversary=none", "warmup=0"]
    recipe = load_recipe("digits", [*small, "steps=2", f"output={folder / 'run'}"])
    train(recipe, cpu=True)
    AcceleratorState._reset_state()
    dataset = recipe.data.load()
    yield Trainer(recipe, Accelerator(cpu=True), dataset, build_model(recipe, dataset))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps its first precision for the process


@fuzz
@given(st.data())
def test_what_a_checkpoint_holds(trainer, data):
    """Each file damaged in turn, under a manifest that agrees with it, as a stranger would write one."""
    checkpoint = Path(trainer.recipe.output) / "checkpoints/step-00000002"
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    name = data.draw(st.sampled_from(sorted(whole.keys() - {"manifest.json"})))
    contents = damaged([whole[name]])
    if name == "state.json":
        contents |= edited(json.loads(whole[name])).map(lambda values: json.dumps(values).encode())
    try:
        (checkpoint / name).write_bytes(data.draw(contents))
        hashes = {n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in whole if n != "manifest.json"}
        (checkpoint / "manifest.json").write_text(json.dumps(hashes))
        with guard():
            trainer.load(checkpoint)
            assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    finally:
        for n, before in whole.items():
            (checkpoint / n).write_bytes(before)


# ------------------------------------------------------------------------------------------------ pictures, arrays


def pictures() -> list[bytes]:
    rng, result = np.random.default_rng(0), []
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        for shape in ((9, 7), (9, 7, 3)):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, name)
            result.append(file.getvalue())
    return result


@fuzz
@given(damaged(pictures()))
def test_pictures(data):
    with guard():
        read_header(lambda: io.BytesIO(data), "picture")
        assert decode_image(lambda: io.BytesIO(data), "picture", 4, 3, (0, 0, 0)).shape == (4, 4, 3)


def archives() -> list[bytes]:
    images, labels, result = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), np.array([1]), []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, images=images, labels=labels)
        result.append(file.getvalue())
    return result


@fuzz
@given(damaged(archives()))
def test_npz(folder, data):
    check(folder / "a.npz", data, lambda path: npz(root=path, size=None, channels=None, split="train"))


HEADERS = edited({"descr": "|u1", "fortran_order": False, "shape": [1, 2, 2, 3]})


@fuzz
@given(HEADERS, st.binary(max_size=64))
def test_headers_of_npz(folder, header, values):
    if isinstance(header["shape"], list):
        header["shape"] = tuple(header["shape"])
    text = repr(header).encode("utf-8", "surrogatepass") + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values)
    check(
        folder / "h.npz",
        file.getvalue(),
        lambda path: npz(root=path, size=None, channels=None, split="train"),
    )


IDX = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(18)


@fuzz
@given(damaged([IDX, gzip.compress(IDX, mtime=0)]))
def test_idx(folder, data):
    check(folder / "x", data, read_idx)


# ------------------------------------------------------------------------------------------------ weights

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}


def weights(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"model": STATE, "step": 3}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@fuzz
@given(damaged([weights(False), weights(True)]))
def test_pickled_weights(folder, data):
    check(folder / "w.pt", data, read_weights)


@pytest.fixture(scope="module")
def safe(folder: Path) -> bytes:
    save_file(STATE, folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


@fuzz
@given(st.data())
def test_safetensors(folder, safe, data):
    check(folder / "w.safetensors", data.draw(damaged([safe])), read_weights)


@fuzz
@given(st.data())
def test_classifiers(folder, data):
    path = folder / "classifier.safetensors"
    Classifier(1, 8, [2, 2], 3, 2).save(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    record = json.loads(header["__metadata__"]["classifier"])
    header["__metadata__"]["classifier"] = json.dumps(data.draw(edited(record)))
    text = json.dumps(header).encode()
    rest = path.read_bytes()[8 + length :]
    check(path, len(text).to_bytes(8, "little") + text + rest, Classifier.load)


# ------------------------------------------------------------------------------------------------ pipelines


@pytest.fixture(scope="module")
def pipeline(make_unet, folder: Path) -> Path:
    from diffusers import DDPMScheduler

    unet = make_unet(
        (4,),
        sample_size=4,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    Model.of(unet, DDPMScheduler()).save(folder / "pipeline")
    return folder / "pipeline"


def load_all(path: Path) -> None:
    loaded = load_model(path)
    loaded.kind.process()
    loaded.kind.objective()
    loaded.kind.sampling()


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_pipelines(pipeline, name, monkeypatch):
    if not name.startswith("unet"):  # which takes longer to load than all else
        unet = load_model(pipeline).network
        monkeypatch.setattr("robustdiff.backbones.unet2d.load_network", lambda *_, **__: unet)
    path = pipeline / name
    original = path.read_bytes()
    changed = edited(json.loads(original)).map(lambda values: json.dumps(values).encode())

    @fuzz
    @given(damaged([original]) | changed)
    def load(data: bytes) -> None:
        check(path, data, lambda _: load_all(pipeline))

    try:
        load()
    finally:
        path.write_bytes(original)
