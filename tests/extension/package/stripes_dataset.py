"""A dataset: stripes of a width in pixels."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from robustdiff.data import DATASETS, ArrayDataset


@DATASETS.register("stripes")
def stripes(
    *, size: int | None, channels: int | None, split: str, width: Annotated[int, Field(ge=1)] = 2, dark: bool = False
) -> ArrayDataset:
    """Make 16 images of 8×8 pixels."""
    rows = np.arange(8)[:, None] // width % 2 * (100 if dark else 255)
    return ArrayDataset("stripes", np.broadcast_to(rows, (16, 8, 8))[..., None].astype(np.uint8))
