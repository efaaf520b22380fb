r"""The batches of a run: images, random numbers, latents, and the objective's draw.

Images that fit into the memory of a GPU are there from the start, and a batch is selected by its indices. Others are
decoded by worker processes while earlier batches are trained on, and copied as uint8 from page-locked memory.

On a GPU a batch is prepared on a stream of its own. The host is ahead of the GPU: it asks for batch b + 1 as soon as it
has queued the passes over batch b. So the GPU can prepare batch b + 1, teacher and encoder included, while it makes
those passes:

    stream of the passes    passes over b − 1 | passes over b            | passes over b + 1
    stream of the batches   batch b           | batch b + 1 |            | batch b + 2

The passes over a batch wait for its preparation, and the preparation of batch b + 1 waits for the end of the passes
over batch b − 1, whose memory it may take.

The host does everything in the order of the run: no batch is prepared before it is asked for. So a run does not depend
on the streams, nor fail because of a batch that it does not train on, and generators, schedules and the modes of
networks are as they would be on one stream. What the GPU does for batch b + 1 must not depend on the passes over batch
b, though. There is one stream alone where it may:

- adaptive distributions (loss-second-moment) draw times by the losses of the batch before;
- a schedule of the number of levels replaces tables that the passes over the batch before still read;
- the teacher of an adapter can be the network that is trained, with the adapter switched off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.data import Batch, ImageDataset
from robustdiff.data.loader import Request, load_batches, select_batches, to_device
from robustdiff.data.pixels import mirror_geometry
from robustdiff.objectives.objective import Draw, Objective
from robustdiff.recipe import Recipe
from robustdiff.training.build import Built
from robustdiff.training.stream import BatchIndices, BucketIndices, batch_generator, caption_numbers, crop_positions

__all__ = ["Batches"]

_MOST_BYTES = 2**31  # of a dataset on a GPU
_SHARE = 8  # and at most one of so many parts of the memory that is free


@dataclass
class Batches:
    """The batches of a run, from one of them to the last, as lists of this process's microbatches.

    Args:
        recipe: The recipe.
        accelerator: The device, and the share of this process.
        dataset: The images, or their latents.
        built: The network with its codec and condition.
        objective: The objective.
        buckets: The bucket of each image, with shape (N,), or None without buckets.
        sizes: The height and the width of the batches of each bucket, or of all.
        passes: The number of optimiser updates made on each batch.
        start: The number of the first batch.

    Raises:
        InputError: If an image of the next batch cannot be decoded.
    """

    recipe: Recipe
    accelerator: Accelerator
    dataset: ImageDataset
    built: Built
    objective: Objective
    buckets: NDArray[np.int64] | None
    sizes: list[tuple[int, int]]
    passes: int
    start: int

    def __iter__(self) -> Iterator[list[Draw]]:
        indices = self._indices()
        stop = -(-self.recipe.steps // self.passes)  # the last batch may lack passes
        loader = self._loader(indices, stop)
        if not self.own_stream:
            for number in range(self.start, stop):
                yield self._batch(number, indices, loader)
            return
        device = self.accelerator.device
        stream, handed_over = torch.cuda.Stream(device), torch.cuda.Event()
        handed_over.record(torch.cuda.current_stream(device))
        kept: deque[list[Draw]] = deque(maxlen=1)
        for number in range(self.start, stop):
            stream.wait_event(handed_over)
            with torch.cuda.stream(stream):
                draws = self._batch(number, indices, loader)
            passes = torch.cuda.current_stream(device)
            passes.wait_stream(stream)
            handed_over.record(passes)  # behind all passes over the batch before
            yield draws
            # The passes over this batch are queued, not made. PyTorch gives memory that is free to the next tensor of
            # the stream on which it was allocated, here the next batch's. So a batch is kept for another turn, until
            # that stream waits for its passes.
            kept.append(draws)

    @property
    def own_stream(self) -> bool:
        """True if batches are prepared on another stream than the passes over them."""
        config = self.built.objective
        shares_network = config.needs_teacher and self.built.model.adapter is not None
        adaptive = self.objective.timesteps.adaptive
        on_gpu = self.accelerator.device.type == "cuda"
        return on_gpu and config.fixed_levels and not adaptive and not shares_network

    def _indices(self) -> BatchIndices:
        recipe, accelerator = self.recipe, self.accelerator
        parts = self.start, accelerator.process_index, accelerator.num_processes, recipe.accumulate
        if self.buckets is None:
            return BatchIndices(len(self.dataset), recipe.batch_size, recipe.seed, *parts)
        return BucketIndices(self.buckets, recipe.batch_size, recipe.seed, *parts)

    def _loader(self, indices: BatchIndices, stop: int) -> Iterator[Batch]:
        """Yield the images of all microbatches."""
        device, number = self.accelerator.device, (stop - self.start) * self.recipe.accumulate
        if self.recipe.data.crop != "centre" or self.buckets is not None:
            wanted: Iterator[Any] = islice(self._requests(indices), number)
        else:
            wanted = islice(indices, number)
            room = min(_MOST_BYTES, torch.cuda.mem_get_info(device)[0] // _SHARE) if device.type == "cuda" else 0
            if (images := self.dataset.resident(device, room)) is not None:
                return select_batches(self.dataset, images, wanted, self.built.model.condition.classes is not None)
        return load_batches(self.dataset, wanted, self.recipe.data.workers, device.type == "cuda")

    def _requests(self, indices: BatchIndices) -> Iterator[Request]:
        """Yield the images and the crops of each microbatch."""
        recipe = self.recipe
        for batch in count(indices.start):
            images, size, positions = indices.batch(batch).tolist(), self.sizes[indices.bucket(batch)], None
            if recipe.data.crop == "random":
                positions = crop_positions(recipe.seed, batch, recipe.batch_size)
            for rows in map(indices.rows, range(recipe.accumulate)):
                yield Request(images[rows], size, None if positions is None else positions[rows])

    @cached_property
    def _unconditional(self) -> dict[str, Any]:
        """The empty condition, if the objective takes it, which is the same for every batch."""
        if not self.built.objective.needs_unconditional:
            return {}
        return {"unconditional": self.built.model.condition.empty()}

    def _batch(self, number: int, indices: BatchIndices, loader: Iterator[Batch]) -> list[Draw]:
        """Return the microbatches of a batch."""
        recipe, device, count = self.recipe, self.accelerator.device, self.recipe.batch_size
        codec, condition = self.built.model.codec, self.built.model.condition
        size = self.sizes[indices.bucket(number)]
        shape = count, *codec.encoded_shape((self.dataset.shape[0], *size))
        generator = batch_generator(recipe.seed, number, device)
        t, weight = self.objective.timesteps.draw(count, generator, device)
        noise = torch.randn(shape, generator=generator, device=device)
        flip = torch.rand(count, generator=generator, device=device) < 0.5
        # Draws that not every run makes come last, so that they do not change the others.
        more = self.objective.more_noise(shape, generator)
        of_codec = torch.randn(shape, generator=generator, device=device) if codec.random else None
        dropped: Tensor | None = None
        if recipe.model.condition_dropout:
            dropped = torch.rand(count, generator=generator, device=device) < recipe.model.condition_dropout
        draws = []
        for m in range(recipe.accumulate):
            images, labels, captions, geometry = next(loader)
            rows = indices.rows(m)
            texts = None
            if captions is not None and condition.takes_captions:
                numbers = caption_numbers(recipe.seed, number, count)[rows].tolist()
                texts = [own[int(u * len(own))] for own, u in zip(captions, numbers, strict=True)]
            if geometry is not None:
                geometry = to_device(geometry, device)
                if recipe.data.flip:
                    geometry = mirror_geometry(geometry, size, flip[rows])
            x0 = self.dataset.latents(
                to_device(images, device),
                codec,
                flip[rows] if recipe.data.flip else None,
                None if of_codec is None else of_codec[rows],
            )
            if labels is not None and condition.classes is not None:
                labels = to_device(labels, device)
            draws.append(
                self.objective.draw(
                    x0,
                    t=t[rows],
                    noise=noise[rows],
                    weight=None if weight is None else weight[rows],
                    **{name: value[rows] for name, value in more.items()},
                    **condition.batch(labels, texts, None if dropped is None else dropped[rows], geometry),
                    **self._unconditional,
                )
            )
        return draws
