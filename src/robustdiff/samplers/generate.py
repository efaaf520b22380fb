r"""Any number of images from a network, each a function of (seed, its number) alone.

Image i has its own generator, seeded by (seed, i), for x_T and for the noise of every step. So it is the same whatever
the batch size and the number of processes, its x_T is the same for all samplers, steps and checkpoints (common random
numbers), and a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image
from torch import Tensor

from robustdiff.data import to_uint8
from robustdiff.errors import InputError
from robustdiff.files import atomic_write
from robustdiff.models.build import load_pipeline, model_of, objective_of, process_of
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.recipe import load_recipe
from robustdiff.samplers.sample import check_options, check_sampler, sample, suited

__all__ = ["Generator", "ImageNoise", "share_of", "write_npz", "write_pngs"]

_NOISE = 2  # the stream of (seed, stream, number) that images have; training has others


class ImageNoise:
    """The noise of some images: each draws from a generator of its own, on the CPU.

    Arguments:
        seed: The seed of the whole set.
        indices: The numbers of the images.
        shape: (C, H, W).
        device: Where the noise goes.
    """

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        states = (np.random.SeedSequence([seed, _NOISE, i]).generate_state(1, np.uint64)[0] for i in indices)
        self._generators = [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]

    def draw(self) -> Tensor:
        """The next noise of each, with shape (B, C, H, W)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators]).to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.draw()


@dataclass(frozen=True)
class Generator:
    """A network, and how images are made of it.

    Arguments:
        unet: The network; put into eval mode.
        process: Its process.
        prediction: What it predicts.
        sampler: The sampler's name.
        steps: Network evaluations for one image, or a respacing string.
        seed: The seed of the set of images.
        batch_size: Images at a time.
        precision: "fp32", or "bf16" or "fp16" for autocast.
        label: The class of all images, for class-conditional networks; image i has the class i modulo their number by
            default.
        options: What else the sampler takes, such as ``eps_scale``.
        model: How samplers call the network (:func:`robustdiff.models.build.model_of`); the network itself by default.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, or the label does not exist.
    """

    unet: UNet2DModel
    process: DiffusionProcess
    prediction: Prediction
    sampler: str = "ddim"
    steps: int | str = 50
    seed: int = 0
    batch_size: int = 128
    precision: str = "fp32"
    label: int | None = None
    options: dict[str, Any] | None = None
    model: Callable[..., Any] | None = None

    @classmethod
    def of(cls, unet: UNet2DModel, scheduler: Any, **settings: Any) -> Generator:
        """Of a network and the scheduler that says what it is, as a pipeline folder has them.

        Arguments:
            unet: The network.
            scheduler: The scheduler.
            settings: The other fields. By default, or where they are None, the sampler is ddim, euler for flow matching
                and multistep for a consistency model, and the steps are 20, with multistep 2.

        Raises:
            InputError: If a setting does not suit the network.
        """
        process = process_of(scheduler)
        sampler = settings.pop("sampler", None) or suited(process)[0]
        if settings.get("steps") is None:
            settings["steps"] = 2 if sampler == "multistep" else 20
        prediction = objective_of(scheduler, unet).prediction
        return cls(unet, process, prediction, sampler, model=model_of(scheduler, unet), **settings)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", **settings: Any) -> Generator:
        """Of a run, a pipeline folder, or a model shipped with the package.

        Arguments:
            path: Where the network is.
            device: Where it goes.
            settings: The other fields; where neither sampler nor steps are given those of a run's recipe.

        Raises:
            InputError: If there is no model, or it cannot be read, or a setting does not suit it.
        """
        unet, scheduler = load_pipeline(path)
        recipe = Path(path) / "recipe.yaml"
        if settings.get("sampler") is None and settings.get("steps") is None and recipe.is_file():
            sampler = load_recipe(str(recipe)).sampler
            settings = {**settings, "sampler": sampler.name, "steps": sampler.steps}
        return cls.of(unet.to(device), scheduler, **settings)

    def __post_init__(self) -> None:
        evaluations = check_sampler(self.sampler, self.steps, self.process)
        own = {name: value for name, value in (self.options or {}).items() if name != "clip"}  # clip is for all of them
        check_options(self.sampler, evaluations, **own)
        classes = self.classes
        if self.label is not None and not (classes is not None and 0 <= self.label < classes):
            known = "this model has no classes" if classes is None else f"its classes are 0 to {classes - 1}"
            raise InputError(f"there is no class {self.label}: {known}")

    @property
    def network(self) -> Callable[..., Any]:
        """What samplers call: the UNet, or the denoiser or consistency function that it is part of."""
        return self.unet if self.model is None else self.model

    def fingerprint(self) -> str:
        """Return the sha256 of the UNet's parameters, in their order, whatever device and memory format they are in."""
        digest = hashlib.sha256()
        for value in self.unet.state_dict().values():
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def classes(self) -> int | None:
        """The number of classes of a class-conditional network."""
        return getattr(self.unet.config, "num_class_embeds", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        config: Any = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def labels(self, indices: range) -> Tensor | None:
        """The classes of some images, with shape (B,)."""
        if self.classes is None:
            return None
        return torch.tensor([i % self.classes if self.label is None else self.label for i in indices])

    def images(self, indices: range) -> Iterator[tuple[range, Tensor]]:
        """The images of a range of numbers, in batches: (their numbers, uint8 (B, C, H, W) on the CPU)."""
        for batch in self.batches(indices):
            yield batch, to_uint8(self.sample(batch, self.labels(batch))).cpu()

    def batches(self, indices: range) -> Iterator[range]:
        """The range in parts of at most ``batch_size``."""
        for start in range(indices.start, indices.stop, self.batch_size):
            yield range(start, min(start + self.batch_size, indices.stop))

    def sample(self, batch: range, labels: Tensor | None, **more: Any) -> Tensor:
        """The images of some numbers, all at once, nominally in [−1, 1], with shape (B, C, H, W), on the device.

        Arguments:
            batch: The numbers.
            labels: Their classes, with shape (B,); none for networks without.
            more: What else :func:`robustdiff.sample` takes, such as ``on_evaluation``.
        """
        self.unet.eval()
        device = self.unet.device
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        noise = ImageNoise(self.seed, batch, self.shape, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return sample(
                self.network,
                self.process,
                self.sampler,
                self.steps,
                latents=noise.draw(),
                step_noise=noise,
                class_labels=None if labels is None else labels.to(device),
                prediction=self.prediction,
                **(self.options or {}),
                **more,
            )


def share_of(num: int, accelerator: Accelerator) -> range:
    """The numbers of the images that this process makes."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    return range(num * rank // processes, num * (rank + 1) // processes)


def write_npz(
    generator: Generator,
    num: int,
    path: Path,
    accelerator: Accelerator,
    on_images: Callable[[int], None] = lambda n: None,
) -> None:
    """Write ``arr_0``, uint8 (num, H, W, C), and ``arr_1``, the labels if there are any: what ADM's evaluator reads.

    The images go to the disk as they come, so that memory does not grow with their number, and the file appears when it
    is complete. Interrupted, the same call goes on where it was.

    Arguments:
        generator: Where the images come from.
        num: How many.
        path: The file.
        accelerator: Each of its processes makes its share.
        on_images: Called with the number of images made since the last call, over all processes.
    """
    channels, height, width = generator.shape
    # Of another network or other settings, what is there is not used.
    settings = [generator.fingerprint(), num, accelerator.num_processes, generator.sampler, generator.steps]
    settings += [generator.seed, generator.batch_size, generator.precision, generator.label, generator.options]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    parts = path.with_name(f".{path.name}.{key}.parts")
    parts.mkdir(exist_ok=True)
    share = share_of(num, accelerator)
    size = channels * height * width
    part = parts / f"{accelerator.process_index}.uint8"
    done = min(part.stat().st_size // size, len(share)) if part.exists() else 0
    done -= done % generator.batch_size if done < len(share) else 0  # whole batches: rounding may depend on their size
    on_images(done * accelerator.num_processes)
    with part.open("r+b" if part.exists() else "xb") as file:
        file.truncate(done * size)
        file.seek(done * size)
        for batch, images in generator.images(range(share.start + done, share.stop)):
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            on_images(len(batch) * accelerator.num_processes)
        file.flush()
        os.fsync(file.fileno())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        labels = generator.labels(range(num))
        with atomic_write(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, channels)}
                np.lib.format.write_array_header_1_0(member, header)
                for rank in range(accelerator.num_processes):
                    with (parts / f"{rank}.uint8").open("rb") as source:
                        shutil.copyfileobj(source, member, 2**20)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels.numpy(), allow_pickle=False)
        shutil.rmtree(parts)
    accelerator.wait_for_everyone()


def write_pngs(
    generator: Generator,
    num: int,
    folder: Path,
    accelerator: Accelerator,
    on_images: Callable[[int], None] = lambda n: None,
) -> None:
    """Write ``000000.png``, … into a folder; files that are there are kept, so that an interrupted call goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    share = share_of(num, accelerator)
    for start in range(share.start, share.stop, generator.batch_size):
        numbers = range(start, min(start + generator.batch_size, share.stop))
        paths = {i: folder / f"{i:06d}.png" for i in numbers}
        if not all(path.exists() for path in paths.values()):
            for batch, images in generator.images(numbers):
                for i, image in zip(batch, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    with atomic_write(paths[i]) as file:
                        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "png")
        on_images(len(numbers) * accelerator.num_processes)
    accelerator.wait_for_everyone()
