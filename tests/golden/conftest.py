"""Where the golden data are: numbers that the original implementations produced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data: $ROBUSTDIFF_GOLDEN, else shared/golden next to the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "golden"
    folder = Path(os.environ.get("ROBUSTDIFF_GOLDEN") or default)
    if not folder.is_dir():
        message = f"no golden data at {folder}: set ROBUSTDIFF_GOLDEN"
        # A skip nobody reads would make these tests worthless where they count.
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
