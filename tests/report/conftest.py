"""Run folders as training writes them, and a browser that loads a page without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustdiff.recipe import load_recipe

CELLS = {("ddim", 2): 12.0, ("ddim", 5): 8.0, ("dpm++", 5): 6.0}
"""The FID of the starting checkpoint."""

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=20000"


def watch_line(step: int, gain: float, start: bool, best: bool, signs: list[dict[str, str]]) -> dict[str, Any]:
    """Return a line of watch.jsonl whose cells differ from the start's by `gain`."""
    cells = []
    for (sampler, steps), fid in CELLS.items():
        after = start and step > 0
        cells.append(
            {
                **{"sampler": sampler, "steps": steps, "metric": "fid", "value": fid + gain},
                "ci": [fid + gain - 1, fid + gain + 1],
                "difference": gain if after else None,
                "difference_ci": [gain - 0.5, gain + 0.5] if after else None,
                "relative": gain / fid if after else None,
                "relative_ci": [(gain - 0.5) / fid, (gain + 0.5) / fid] if after else None,
            }
        )
    mean = sum(CELLS.values()) / len(CELLS) + gain
    return {"step": step, "cells": cells, "mean": mean, "best": best, "seconds": 3.5, "images": 600, "signs": signs}


@pytest.fixture(scope="session")
def make_run(digits_run: Path) -> Callable[..., Path]:
    """make_run(folder, gains, …): a run of fashion-16, whose watch found these gains after 20 updates each.

    A result has the model with the lowest FID as the best; None leaves the result out, and the run is not finished.
    """

    def make(
        folder: Path,
        gains: tuple[float, ...] = (-1.0, -2.0, 1.0),
        finished: bool = True,
        start: bool = True,
        message: str = "FID at 5 steps is above that of the start",
    ) -> Path:
        folder.mkdir(parents=True)
        steps = 20 * max(1, len(gains))
        changes = [f"output={folder}", f"steps={steps if finished else 999}", "adversary.radius={eta: 0.1}"]
        recipe = load_recipe("fashion-16-at", changes)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        data = {"name": "fashion-16", "images": 60_000, "shape": [1, 16, 16], "classes": None}
        sums = {"labels": None, "captions": None, "fingerprint": "0" * 64}
        (folder / "data.json").write_text(json.dumps({**data, **sums}))
        metrics = [
            {"step": s, "loss": 1 / s, "delta_norm": 0.6, "images_per_second": 500.0} for s in range(2, steps + 1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 99')
        lines = [watch_line(0, 0.0, True, True, [])] if start and gains else []
        for i, gain in enumerate(gains, 1):
            sign = [{"name": "long-sampling", "message": message, "action": "warn"}] if i == len(gains) else []
            best = gain < min([0.0 if start else 99.0, *gains[: i - 1]])
            lines.append(watch_line(20 * i, gain, start, best, sign))
        if lines:
            (folder / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        kept = next((line for line in reversed(lines) if line["best"]), None)
        if kept is not None and kept["step"]:
            shutil.copytree(digits_run / "model", folder / "best")
        if not finished:
            return folder
        shutil.copytree(digits_run / "model", folder / "model")
        result = json.loads((digits_run / "result.json").read_text()) | {"steps": steps}
        if kept is not None:
            own = {"step": kept["step"], "start": kept["step"] == 0, "seed": 7, "images": 600}
            compared = ("difference", "difference_ci", "relative", "relative_ci")
            of_mean = {key: kept["cells"][0][key] for key in compared}
            result["best"] = {**own, "mean": kept["mean"], "cells": kept["cells"], **of_mean}
            result["signs"] = [{"step": line["step"], **sign} for line in lines for sign in line["signs"]]
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return make


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """browse(page): the document of a page after it was loaded, as headless Chromium writes it."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")

    def load(page: Path) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom"]
        environment = {**os.environ, "HOME": str(profile)}
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return load
