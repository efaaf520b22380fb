"""Draw the picture of the README and of the documentation from the committed results: python scripts/make_pictures.py

The change of FID by free adversarial training, compared with three clean passes over the same batches, by the length of
the fine-tuning: a thin line for each seed, and the mean with its interval. Below, samples of the checkpoint and of
adversarial training from the same noise, and real images. The numbers and the samples of training are those of the
cells in benchmarks/results/length; the checkpoint is sampled here. docs/images/fid-light.png and fid-dark.png have no
background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdiff.data import load_dataset
from robustdiff.data.pixels import tile
from robustdiff.evaluation.generate import Generator
from robustdiff.report.figures import ROLES, Axes, Figure, bare, default_settings, matplotlib, save_figure
from robustdiff.report.page import read_picture
from robustdiff.study.analysis import effect
from robustdiff.study.schema import load_study
from robustdiff.study.store import Results, read_results

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = {"iddpm": "ancestral sampling (iddpm)", "dpm++": "DPM-Solver++ (dpm++)"}
COLOURS = {"light": ("#1f2933", ROLES["adversarial"][0]), "dark": ("#e4e9f0", ROLES["adversarial"][1])}
LONGEST, SEED, STEPS, IMAGES = "free-4800", 10, 10, 8


def draw_change(panel: Axes, results: Results, sampler: str, colour: str) -> None:
    """Draw the change of FID by the number of updates."""
    found = {}
    for method, baseline in results.study.trend:
        one = effect(results, method, sampler, STEPS, baseline)
        assert one is not None
        found[results.record_of(method)["training"]["steps"]] = one
    updates = sorted(found)
    for seed in found[updates[0]].logs:
        panel.plot(updates, [100 * found[n].changes[seed] for n in updates], color=colour, linewidth=0.8, alpha=0.45)
    intervals = [found[n].interval for n in updates]
    ends = 100 * np.array([[one.mean, one.low, one.high] for one in intervals if one is not None]).T
    panel.plot(updates, ends[0], "o-", color=colour, linewidth=2.2, markersize=5)
    panel.fill_between(updates, ends[1], ends[2], color=colour, alpha=0.2, linewidth=0)
    panel.set_xscale("log")
    panel.set_xticks(updates, [f"{n:,}" for n in updates])
    panel.minorticks_off()


def strips(results: Results) -> dict[str, NDArray[np.uint8]]:
    """Return rows of images: of the checkpoint and of adversarial training from the same noise, and real ones."""
    noise = results.study.measure.noise_seed(SEED)
    generator = Generator.load("fashion-16", sampler="iddpm", steps=STEPS, seed=noise, batch_size=IMAGES)
    ((_, sampled),) = generator.images(range(IMAGES))
    real = load_dataset("fashion-16", split="test").__getitems__(range(IMAGES)).images
    return {
        "the checkpoint": tile(sampled, columns=IMAGES).squeeze(-1),
        "after AT": read_picture(results.pictures[LONGEST, "iddpm", STEPS]),
        "real images": tile(real, columns=IMAGES).squeeze(-1),
    }


def without_gaps(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return a row of images whose gaps are transparent in a figure."""
    gap = np.ones((len(pixels), len(pixels)), bool)
    gap[1:-1, 1:-1] = False
    return np.where(np.tile(gap, IMAGES), np.nan, pixels)


@default_settings()
def draw(theme: str, results: Results, images: dict[str, NDArray[np.uint8]]) -> Figure:
    """Return the figure in one theme."""
    text, colour = COLOURS[theme]
    with matplotlib.rc_context(
        {f"{part}.color": text for part in ("text", "xtick", "ytick")} | {"axes.labelcolor": text}
    ):
        figure = Figure(figsize=(7.2, 4.9), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.add_gridspec(1 + len(images), 2, height_ratios=[3.1, *[0.55] * len(images)])
        left = None
        for column, (sampler, title) in enumerate(SAMPLERS.items()):
            panel = figure.add_subplot(grid[0, column], sharey=left)
            left = left or panel
            panel.patch.set_alpha(0)
            panel.axhline(0, color=text, linewidth=1)
            draw_change(panel, results, sampler, colour)
            panel.set_title(title, fontsize="medium")
            panel.set_xlabel("updates of the fine-tuning")
            panel.spines[["top", "right"]].set_visible(False)
            panel.spines[:].set_color(text)
            panel.tick_params(colors=text)
            panel.grid(color=text, alpha=0.15)
        assert left is not None
        left.set_ylabel("change of FID, %")
        for row, (name, pixels) in enumerate(images.items(), 1):
            panel = figure.add_subplot(grid[row, :])
            panel.patch.set_alpha(0)
            panel.imshow(without_gaps(pixels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            bare(panel)
            panel.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def main() -> None:
    """Write the picture in both themes."""
    study = ROOT / "benchmarks" / "studies" / "length.yaml"
    results = read_results(load_study(study), ROOT / "benchmarks" / "results" / "length")
    images = strips(results)
    for theme in COLOURS:
        save_figure(draw(theme, results, images), ROOT / "docs" / "images" / f"fid-{theme}.png")


if __name__ == "__main__":
    main()
