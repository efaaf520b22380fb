"""The search for the times of multistep consistency sampling at which the FID is least."""

from __future__ import annotations

from dataclasses import replace

from robustdiff.evaluation.generate import Generator
from robustdiff.metrics.features import FeatureExtractor
from robustdiff.metrics.fid import FID
from robustdiff.metrics.metric import Batch, check_finite
from robustdiff.metrics.reference import Reference
from robustdiff.progress import SILENT, Progress
from robustdiff.samplers.time_search import TimeSearch, search_times

__all__ = ["search_times_by_fid"]


def search_times_by_fid(
    generator: Generator,
    steps: int,
    num: int,
    extractor: FeatureExtractor,
    reference: Reference,
    progress: Progress = SILENT,
) -> TimeSearch:
    """Search the scales of multistep sampling, one after the other, with candidates from common noise.

    Arguments:
        generator: The source of the images, by the sampler multistep; its ``steps`` are replaced.
        steps: How many scales.
        num: Images of each candidate.
        extractor: The features.
        reference: The real images under the same features.
        progress: Told of the images of each candidate.

    Raises:
        InputError: If there are not so many scales, or images do not suit the features.
        RunError: If an FID is not finite.
    """
    metric = FID(reference)

    def fid(numbers: tuple[int, ...]) -> float:
        candidate = ",".join(map(str, numbers))
        progress.begin(f"scales {candidate}", num)
        metric.reset()
        for batch, images in replace(generator, steps=candidate).images(range(num)):
            metric.update(Batch(images, batch.start, extractor=extractor))
            progress.advance(len(batch))
        value = metric.distance()
        check_finite(f"scales {candidate}", {"fid": value})
        return value

    return search_times(fid, steps, len(generator.process))
