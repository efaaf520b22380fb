r"""Generation of images, each of which depends on the seed and its own number alone.

The noise of image i, x_T and that of every step, is a function of the seed and of i
(:mod:`robustdiff.evaluation.noise`). It does not depend on the batch size, the number of processes or the device, its
x_T is the same for all samplers, steps and checkpoints (common random numbers), and an interrupted run can be
continued.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from robustdiff.backbones.frozen import FrozenWeights
from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.backbones.model import Model, load_model
from robustdiff.conditions.condition import Condition
from robustdiff.data import to_uint8
from robustdiff.errors import InputError, RunError, printable
from robustdiff.evaluation.noise import NOISE, ImageNoise
from robustdiff.evaluation.prompts import record_of
from robustdiff.evaluation.recorded import Recordings, unrecordable
from robustdiff.files import atomic_write, held, make_folder, open_regular, remove_leftovers, user_key
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import load_recipe
from robustdiff.samplers.sample import SAMPLERS, Resolved, resolve, sample
from robustdiff.samplers.sampler import Path as SamplerPath
from robustdiff.weights import DTYPES

__all__ = ["Generator", "share_of", "write_npz", "write_pngs"]

RECORD = ".robustdiff-samples.json"
"""The file in a folder of PNGs that holds their settings."""

_LOCK = ".robustdiff-samples.lock"
_SIGNATURE = 32  # bytes


@dataclass(frozen=True)
class Generator:
    """A model with its sampling settings.

    Args:
        model: The model, whose network is set to eval mode.
        sampler: The name of the sampler.
        steps: The number of network evaluations for one image, or a respacing string.
        seed: The seed of the set of images.
        batch_size: The number of images at a time.
        precision: "fp32", or for autocast "bf16" or "fp16".
        label: The class of all images, for class-conditional networks. By default image i has the class i modulo the
            number of classes.
        num_classes: The number of the network's classes to sample, without the null class of classifier-free guidance.
            By default all classes but a null class that the checkpoint records.
        guidance: The scale of classifier-free guidance; None is no guidance.
        options: Further arguments of :func:`robustdiff.sample`, such as ``eps_scale``. They override the settings of
            the checkpoint's scheduler.
        prompts: The captions for text-conditional networks; image i has the caption with the number i modulo their
            number.
        negative: The caption that takes the place of the empty condition in guidance; None for the empty condition.
        capture: Whether the network's calls are recorded as CUDA graphs and replayed; "auto": on a GPU, if the network
            allows it. On other devices the same copies are made without a graph.
        recordings: The recorded calls, which generators that are made of this one by ``dataclasses.replace`` share.

    Raises:
        InputError: If the sampler is unknown or does not suit the model, the precision is unknown or is not the one in
            which the weights are held, the label does not exist, or the network's calls cannot be recorded and shall
            be.
    """

    model: Model
    sampler: str
    steps: int | str
    seed: int = 0
    batch_size: int = 128
    precision: str = "fp32"
    label: int | None = None
    num_classes: int | None = None
    guidance: float | None = None
    options: dict[str, Any] | None = None
    prompts: tuple[str, ...] = ()
    negative: str | None = None
    capture: bool | Literal["auto"] = "auto"
    recordings: Recordings = field(default_factory=Recordings, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: Model, *, data_classes: int | None = None, data_captions: tuple[str, ...] = (), **settings: Any
    ) -> Generator:
        """Create a generator of a model.

        Args:
            model: The model.
            data_classes: The number of classes of the data. If the network embeds one more, the last is a null class.
            data_captions: The captions of the data in the order of :func:`~robustdiff.evaluation.prompts.prompts_of`,
                which are the prompts of a network that takes captions if no others are given.
            settings: The other fields. By default, or if they are None, the sampler is the first that suits the model,
                and the number of steps is the sampler's default.

        Raises:
            InputError: If a setting does not suit the model.
        """
        sampler = settings.pop("sampler", None) or model.samplers[0]
        if settings.get("steps") is None:
            settings["steps"] = SAMPLERS[sampler].default_steps
        if data_classes is not None and (classes := model.condition.classes_of(data_classes)) is not None:
            settings = {"num_classes": classes, **settings}
        if model.condition.takes_captions and not settings.get("prompts"):
            settings["prompts"] = data_captions
        return cls(model, sampler, **settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        size: int | None = None,
        half: bool = True,
        by_recipe: bool = True,
        **settings: Any,
    ) -> Generator:
        """Load a generator from a run, a pipeline folder, or a model shipped with the package.

        Args:
            path: The run, the pipeline folder, or the name of a shipped model.
            device: The device of the model.
            size: The height and width of the images, if the network's configuration does not give them or others are
                wanted.
            half: Whether weights that autocast would convert are held in the type of ``precision``, for the same
                images in half the memory. The network can then be called under this autocast alone.
            by_recipe: Whether the recipe of a run gives the sampler, if none is given, and the number of steps of that
                sampler.
            settings: The other fields.

        Raises:
            InputError: If the model is missing or cannot be read, or a setting does not suit it.
        """
        dtype = DTYPES.get(settings.get("precision", "fp32"), torch.float32)
        frozen = FrozenWeights(dtype) if half and dtype != torch.float32 else None
        model = load_model(path, size, frozen).to(device)
        if model.device.type == "cuda":
            fuse_norms(model.network.to(memory_format=torch.channels_last))
        recipe = Path(path) / "recipe.yaml"
        if by_recipe and recipe.is_file():
            own = load_recipe(str(recipe)).sampler
            sampler = settings.get("sampler") or own.name
            if settings.get("steps") is None and sampler == own.name:
                settings["steps"] = own.steps
            settings["sampler"] = sampler
        try:
            return cls.of(model, **settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def __post_init__(self) -> None:
        if self.capture is True and (why := unrecordable(self.model)) is not None:
            raise InputError(f"capture: the calls of this network cannot be recorded, since {why}: leave it out")
        if self.precision not in DTYPES:
            raise InputError(f"the precision is {printable(self.precision)}: give {', '.join(DTYPES)}")
        if (held := self.model.frozen) is not None and held.dtype != DTYPES[self.precision]:
            raise InputError(
                f"the weights of {self.model.path} are held in {str(held.dtype)[6:]}, which is not {self.precision}: "
                "load the model with that precision, or with half=False"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"the seed of images is {self.seed}: give one from 0 to 2**63 - 1")
        self.model.prediction  # noqa: B018  (raises where the checkpoint contradicts itself)
        self.path  # noqa: B018  (raises where the sampler does not suit the model)
        condition = self.condition
        if condition.takes_captions != bool(self.prompts):
            if self.prompts:
                raise InputError("this model is not conditioned on captions: leave --prompt out (evaluate: --prompts)")
            raise InputError(
                "this model is conditioned on captions: give one or more by --prompt (evaluate: --prompts FILE; "
                "mismatch: real images that have captions, by --data)"
            )
        if self.negative is not None:
            if not condition.takes_captions:
                raise InputError("this model is not conditioned on captions: leave --negative out")
            if self._embeds_guidance:
                raise InputError(
                    "this network takes the scale of guidance itself, with no second caption: leave --negative out"
                )
            if self.guidance in (None, 1):
                raise InputError("a negative caption takes part in guidance alone: give --guidance above 1 as well")
        if self.guidance is not None:
            condition.empty()
        classes = condition.classes
        if self.label is not None and not (classes is not None and 0 <= self.label < classes):
            known = "this model has no classes" if classes is None else f"its classes are 0 to {classes - 1}"
            raise InputError(f"there is no class {self.label}: {known}")

    @cached_property
    def condition(self) -> Condition:
        """The condition of the network, restricted to the classes that are sampled."""
        own = self.model.condition
        return own if self.num_classes is None else own.with_classes(self.num_classes)

    @property
    def _embeds_guidance(self) -> bool:
        backbone = self.model.backbone
        return backbone.guidance is not None or backbone.guidance_embedding is not None

    @cached_property
    def _resolved(self) -> Resolved:
        return resolve(self.model, self.model.process, self.sampler, self.steps, self.options or {})

    @property
    def path(self) -> SamplerPath:
        """The path of the sampler, whose length is the number of network evaluations for one image."""
        return self._resolved.path

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of :func:`robustdiff.sample` from the checkpoint, if the sampler takes them, and from
        ``options``."""
        return self._resolved.settings

    @property
    def classes(self) -> int | None:
        """The number of classes that are sampled."""
        return self.condition.classes

    def labels(self, indices: range) -> Tensor | None:
        """Return the classes of some images, with shape (B,), or None if the network has no classes."""
        if self.classes is None:
            return None
        return torch.tensor([i % self.classes if self.label is None else self.label for i in indices])

    def captions(self, indices: range) -> list[str] | None:
        """Return the captions of some images, or None if the network takes none."""
        return [self.prompts[i % len(self.prompts)] for i in indices] if self.prompts else None

    def images(self, indices: range) -> Iterator[tuple[range, Tensor]]:
        """Yield the images of a range in batches: the numbers, and the images as uint8 (B, C, H, W) on the CPU."""
        for batch in self.batches(indices):
            with torch.inference_mode():
                images = self.model.codec.decode(self.sample(batch, self.labels(batch)))
            yield batch, to_uint8(images).cpu()

    def batches(self, indices: range) -> Iterator[range]:
        """Yield the parts of a range, each of at most ``batch_size`` numbers."""
        for start in range(indices.start, indices.stop, self.batch_size):
            yield range(start, min(start + self.batch_size, indices.stop))

    def sample(self, batch: range, labels: Tensor | None, **more: Any) -> Tensor:
        """Sample one batch, before decoding by the model's codec, with shape (B, C, H, W), on the device.

        Args:
            batch: The numbers of the images.
            labels: The classes of the images, with shape (B,), or None if the network has no classes.
            more: Further arguments of :func:`robustdiff.sample`, such as ``on_evaluation``.
        """
        model, device = self.model, self.model.device  # which diffusers looks up in all modules
        model.network.eval()
        captured = device.type == "cuda" if self.capture == "auto" else self.capture
        dtype = DTYPES[self.precision]
        noise = ImageNoise(self.seed, batch, model.shape, device, ahead=len(self.path))
        unconditional = None
        if self.negative is not None:
            unconditional = self.condition.batch(None, [self.negative], None)
        elif self.guidance is not None and not self._embeds_guidance:
            unconditional = self.condition.empty()
        labels = None if labels is None else labels.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return sample(
                self.recordings.model(model, self.precision) if captured else model,
                model.process,
                self.sampler,
                self.steps,
                latents=noise.draw(),
                step_noise=noise,
                condition=self.condition.batch(labels, self.captions(batch), None),
                guidance=self.guidance,
                unconditional=unconditional,
                **(self.options or {}),  # the model brings the others
                **more,
            )


def share_of(num: int, accelerator: Accelerator) -> range:
    """Return the numbers of the images that this process generates."""
    return _share(num, accelerator.process_index, accelerator.num_processes)


def _share(num: int, rank: int, processes: int) -> range:
    return range(num * rank // processes, num * (rank + 1) // processes)


def _lock(path: Path, output: Path, stack: ExitStack) -> None:
    """Hold the lock of an output, in a file that is there meanwhile, until the stack is closed."""
    if not stack.enter_context(held(path, remove=True)):
        raise InputError(f"another process writes {output}: wait until it ends, or give another --output")


def _signature(batch: range, pixels: bytes, key: str, secret: bytes) -> bytes:
    """Return the signature after a batch in a temporary file, which only a call of the same user can have written."""
    return hmac.digest(secret, f"{key} {batch.start} {batch.stop} ".encode() + pixels, "sha256")


def _finished(file: BinaryIO, batches: list[range], size: int, key: str, secret: bytes) -> int:
    """Return the number of batches at the start of a temporary file that are whole and written by the same user."""
    for done, batch in enumerate(batches):
        pixels = file.read(len(batch) * size)
        if not hmac.compare_digest(file.read(_SIGNATURE), _signature(batch, pixels, key, secret)):
            return done
    return len(batches)


def write_npz(
    generator: Generator, num: int, path: Path, accelerator: Accelerator, progress: Progress = SILENT
) -> bool:
    """Write images as ``arr_0``, uint8 (num, H, W, C), and labels, if any, as ``arr_1``, as ADM's evaluator reads them.

    Each batch is written to disk at once, so that memory does not grow with the number of images. The file appears
    under its name when it is complete. After an interruption, the same call by the same user continues. The archive's
    comment holds the settings as JSON.

    Args:
        generator: The source of the images.
        num: The number of images.
        path: The file.
        accelerator: The accelerator, whose processes share the images.
        progress: The receiver of the progress, in images of all processes.

    Returns:
        True if the file was written, False if the same call had written it before.

    Raises:
        InputError: If the file exists and was written with another network or other settings, or another process writes
            it.
        RunError: If a temporary file was changed meanwhile.
    """
    progress.begin(f"{generator.sampler}, {generator.steps} steps", num)
    settings = {**_settings(generator), "num": num}
    # Temporary files of another network or other settings have another name and are not used.
    key = hashlib.sha256(json.dumps([settings, accelerator.num_processes]).encode()).hexdigest()[:12]
    parts = path.with_name(f".{path.name}.{key}.parts")
    with ExitStack() as stack:
        if accelerator.is_main_process and not path.exists():
            _lock(path.with_name(f".{path.name}.lock"), path, stack)
            remove_leftovers(path.parent, re.escape(path.name))
        accelerator.wait_for_everyone()
        if path.exists():
            _check_record(path, _comment(path), settings)
            if accelerator.is_main_process and parts.is_dir():  # a call was killed after the file appeared
                _remove_parts(parts, accelerator.num_processes)
            progress.advance(num)
            return False
        _generate(generator, num, parts, key, accelerator, progress)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _join(generator, num, path, parts, settings, accelerator.num_processes)
            _remove_parts(parts, accelerator.num_processes)
        accelerator.wait_for_everyone()
    return True


def _generate(
    generator: Generator, num: int, parts: Path, key: str, accelerator: Accelerator, progress: Progress
) -> None:
    """Write the images of this process to its temporary file, from where an earlier call ended."""
    channels, height, width = generator.model.image_shape
    make_folder(parts)
    part = parts / f"{accelerator.process_index}.uint8"
    size = channels * height * width
    batches = list(generator.batches(share_of(num, accelerator)))
    secret = user_key()
    with open_regular(part, "r+b" if os.path.lexists(part) else "x+b") as file:
        done = _finished(file, batches, size, key, secret)
        file.seek(sum(len(batch) * size + _SIGNATURE for batch in batches[:done]))
        file.truncate()
        progress.advance(sum(map(len, batches[:done])) * accelerator.num_processes)
        if done < len(batches):
            for batch, images in generator.images(range(batches[done].start, batches[-1].stop)):
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
                file.write(pixels + _signature(batch, pixels, key, secret))
                progress.advance(len(batch) * accelerator.num_processes)
        file.flush()
        os.fsync(file.fileno())


def _join(generator: Generator, num: int, path: Path, parts: Path, settings: dict[str, Any], processes: int) -> None:
    """Write the archive, from the temporary files of all processes."""
    channels, height, width = generator.model.image_shape
    size, labels = channels * height * width, generator.labels(range(num))
    with atomic_write(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = json.dumps(settings).encode()  # not an array: readers expect arr_0 and arr_1 alone
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, channels)}
            np.lib.format.write_array_header_1_0(member, header)
            for rank in range(processes):
                with open_regular(parts / f"{rank}.uint8") as source:
                    for batch in generator.batches(_share(num, rank, processes)):
                        pixels = source.read(len(batch) * size)
                        if len(pixels) < len(batch) * size:
                            raise RunError(f"{printable(source.name)} was cut short meanwhile: start again")
                        member.write(pixels)
                        source.seek(_SIGNATURE, os.SEEK_CUR)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.numpy(), allow_pickle=False)


def _remove_parts(folder: Path, processes: int) -> None:
    for rank in range(processes):
        (folder / f"{rank}.uint8").unlink(missing_ok=True)
    with suppress(OSError):  # the folder holds other files, which are kept
        folder.rmdir()


def write_pngs(
    generator: Generator, num: int, folder: Path, accelerator: Accelerator, progress: Progress = SILENT
) -> bool:
    """Write ``000000.png``, … into a folder. Existing files are kept, so that an interrupted call can be continued.

    A PNG of a caption has text chunks: ``prompt``, ``negative_prompt`` and ``guidance`` if they are given, ``sampler``,
    ``steps``, ``seed``, ``noise`` (:data:`~robustdiff.evaluation.noise.NOISE`), ``number`` (the image's, on which its
    noise depends as well) and ``model``, the sha256 of the network's parameters.

    The file :data:`RECORD` in the folder holds the settings. A call with the same settings and a larger number of
    images adds those that are missing.

    The folder is created if it is missing. Other arguments are those of :func:`write_npz`.

    Returns:
        True if images were written, False if none was missing.

    Raises:
        InputError: If the folder holds anything that was not made with the same network and settings, or another
            process writes to it.
    """
    progress.begin(f"{generator.sampler}, {generator.steps} steps", num)
    settings = _settings(generator)
    record = folder / RECORD
    with ExitStack() as stack:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder / _LOCK, folder, stack)
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                _check_record(folder, _contents(record), settings)
                remove_leftovers(folder, r"\d{6,}\.png")
            else:
                with atomic_write(record) as file:
                    file.write(json.dumps(settings, indent=1).encode())
        accelerator.wait_for_everyone()
        made = False
        for numbers in generator.batches(share_of(num, accelerator)):
            missing = {i: path for i in numbers if not _is_there(path := folder / f"{i:06d}.png")}
            if missing:
                made = True
                for batch, images in generator.images(numbers):
                    for i, image in zip(batch, images.permute(0, 2, 3, 1).numpy(), strict=True):
                        if i in missing:
                            with atomic_write(missing[i]) as file:
                                picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                                picture.save(file, "png", pnginfo=_texts(generator, settings["network"], i))
            progress.advance(len(numbers) * accelerator.num_processes)
        return any(gather_object([made]))


def _texts(generator: Generator, network: str, index: int) -> PngInfo | None:
    """Return the text chunks of a PNG: how an image of a caption was made. PNGs of other models have none."""
    captions = generator.captions(range(index, index + 1))
    if captions is None:
        return None
    texts = PngInfo()
    for name, value in (
        ("prompt", captions[0]),
        ("negative_prompt", generator.negative),
        ("guidance", generator.guidance),
        ("sampler", generator.sampler),
        ("steps", generator.steps),
        ("seed", generator.seed),
        ("noise", NOISE),
        ("number", index),
        ("model", network),
    ):
        if value is not None:
            texts.add_text(name, str(value))
    return texts


def _settings(generator: Generator) -> dict[str, Any]:
    """Return everything that an image depends on besides its number, as JSON values."""
    model, process = generator.model, generator.model.process
    levels = np.stack([process.alphas.numpy(), process.sigmas.numpy()])
    settings = {
        "network": model.fingerprint(),
        "process": hashlib.sha256(levels.tobytes()).hexdigest(),
        "prediction": model.prediction,
        "shape": model.image_shape,
        "sampler": generator.sampler,
        "steps": generator.steps,
        "seed": generator.seed,
        "noise": NOISE,
        "batch_size": generator.batch_size,  # rounding may depend on it
        "precision": generator.precision,
        "label": generator.label,
        "classes": generator.classes,
        "guidance": generator.guidance,
        "options": generator.sampling,
        **({} if model.codec.identity else {"codec": model.codec.fingerprint()}),
        # Not the texts: the comment of an archive, which holds the settings, has at most 64 KiB.
        **(
            {"prompts": record_of(generator.prompts), "text": model.condition.fingerprint()}
            if generator.prompts
            else {}
        ),
        **({"negative": generator.negative} if generator.negative is not None else {}),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(settings, default=repr))
    return loaded


def _comment(path: Path) -> bytes:
    """Return the comment of a zip archive, or nothing if the file is not an archive."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return archive.comment
    except (OSError, zipfile.BadZipFile):
        return b""


def _contents(record: Path) -> bytes:
    """Return the contents of a record, at most 1 MiB, or nothing if there is none."""
    try:
        with open_regular(record) as file:
            return file.read(2**20)
    except FileNotFoundError:
        return b""


def _is_there(path: Path) -> bool:
    """Return whether a file exists. Anything else than a regular file, such as a link, is refused."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return False
    return True


def _check_record(path: Path, record: bytes, settings: dict[str, Any]) -> None:
    """Check that a file or folder was made with the given settings."""
    remedy = "give another --output, or remove it"
    try:
        found = json.loads(record)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} exists, and does not say that robustdiff sample made it: {remedy}")
    for name in {**settings, **found}:  # a setting that only one of them has counts as None in the other
        if found.get(name) != settings.get(name):
            values = f" ({printable(name)[:80]} {printable(str(found.get(name)))[:80]}, now {settings.get(name)})"
            other = "another network" if name == "network" else f"other settings{values}"
            raise InputError(f"{path} holds images of {other}: {remedy}")
