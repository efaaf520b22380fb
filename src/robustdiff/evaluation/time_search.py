"""Search for the times of multistep consistency sampling with the lowest FID."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator

from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.real_images import Target
from robustdiff.metrics.fid import FID
from robustdiff.metrics.metric import Batch, check_finite
from robustdiff.progress import SILENT, Progress
from robustdiff.samplers.time_search import TimeSearch, search_times

__all__ = ["search_times_by_fid"]


def search_times_by_fid(
    generator: Generator, steps: int, num: int, target: Target, accelerator: Accelerator, progress: Progress = SILENT
) -> TimeSearch:
    """Search greedily for as many scales of multistep sampling as ``steps``, by the FID of ``num`` images for each try.

    The generator has the sampler multistep, and its own steps are replaced. All candidates have the same noise. The
    progress is in images of each candidate.

    Raises:
        InputError: If the process has too few scales, or the extractor does not take the images.
        RunError: If an FID is not finite.
    """
    metric = FID(target.statistics(accelerator, progress))

    def fid(numbers: tuple[int, ...]) -> float:
        candidate = ",".join(map(str, numbers))
        progress.begin(f"scales {candidate}", num)
        metric.reset()
        for batch, images in replace(generator, steps=candidate).images(range(num)):
            metric.update(Batch(images, batch.start, extractor=target.extractor))
            progress.advance(len(batch))
        value = metric.distance()
        check_finite(f"scales {candidate}", {"fid": value})
        return value

    return search_times(fid, steps, len(generator.model.process))
