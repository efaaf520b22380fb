"""Measure how well the images of the shipped text-to-image model fit their captions.

Of the test split of `emoji`, which are combinations of a known emoji and a known background that training does not
show, 40 are taken at equal distances, and an image is sampled for the first caption of each, from common noise. The
shipped CLIP then ranks captions for each image by their cosine with it:

    first of 40         for how many images the right caption is the nearest of the 40
    first of all        the same among the first captions of the whole split
    CLIP score          the mean of 100·cos between the images and their captions

The same numbers of the real images, and of the VAE's reconstructions of them, are the ones to compare with. `unseen` is
the first of 40 for captions of emoji that no training of VAE, CLIP or UNet shows.

    python benchmarks/emoji.py --out benchmarks/results/emoji.json --document docs/emoji.md --figures docs/figures
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from robustdiff import load_model
from robustdiff.data import load_dataset, to_uint8, to_unit
from robustdiff.data.dataset import ImageDataset
from robustdiff.evaluation.generate import Generator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLIP = files("robustdiff.metrics") / "weights" / "emoji-clip"
COUNT, SEED, SAMPLER = 40, 0, "ddim"
CELLS = [(50, 1.0), (50, 2.0), (50, 3.0), (50, 5.0), (20, 3.0), (10, 3.0), (5, 3.0)]
"""The numbers of steps, and scales of guidance."""
SHOWN = (50, 3.0)


class Judge:
    """The shipped CLIP and the captions that it chooses from."""

    def __init__(self, captions: Sequence[str], more: Sequence[str]) -> None:
        self.model = CLIPModel.from_pretrained(str(CLIP)).eval()
        tokenizer = CLIPTokenizer.from_pretrained(str(CLIP))
        tokens = tokenizer([*captions, *more], padding=True, return_tensors="pt").input_ids
        with torch.no_grad():
            texts = torch.cat(
                [self._unit(self.model.text_model(part), "text_projection") for part in tokens.split(256)]
            )
        self.texts, self.all = texts[: len(captions)], texts

    def _unit(self, output: Any, projection: str) -> Tensor:
        return torch.nn.functional.normalize(getattr(self.model, projection)(output.pooler_output), dim=-1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, float]:
        """Measure images uint8 (COUNT, 3, 64, 64), of which image i belongs to caption i."""
        vectors = self._unit(self.model.vision_model(to_unit(images)), "visual_projection")
        right = torch.arange(len(images))
        return {
            "first_of_40": int(((vectors @ self.texts.T).argmax(1) == right).sum()),
            "first_of_all": int(((vectors @ self.all.T).argmax(1) == right).sum()),
            "clip_score": round(100 * (vectors * self.texts).sum(1).mean().item(), 2),
        }


def chosen(data: ImageDataset) -> tuple[list[int], list[str]]:
    """Return COUNT rows of a dataset at equal distances, and their first captions."""
    rows = np.linspace(0, len(data) - 1, COUNT).round().astype(int).tolist()
    return rows, [captions[0] for captions in data.captions_of(rows) or []]


def measure() -> tuple[dict[str, Any], list[str], Tensor, Tensor]:
    """Return the record, and the captions, the real images and the samples that are shown."""
    model, data = load_model("emoji"), load_dataset("emoji", split="test")
    rows, captions = chosen(data)
    others = sorted(set(range(len(data))) - set(rows))
    judge = Judge(captions, [several[0] for several in data.captions_of(others) or []])
    real = data.__getitems__(rows).images

    def samples(prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
        generator = Generator(model, SAMPLER, steps, SEED, guidance=guidance, prompts=tuple(prompts))
        return torch.cat([images for _, images in generator.images(range(COUNT))])

    with torch.inference_mode():
        means = model.codec.encode(to_unit(real), torch.zeros(COUNT, *model.shape))
        decoded = to_uint8(model.codec.decode(means))
    cells, shown = [], None
    for steps, guidance in CELLS:
        images = samples(captions, steps, guidance)
        cells.append({"steps": steps, "guidance": guidance, **judge(images)})
        print(json.dumps(cells[-1]), flush=True)
        shown = images if (steps, guidance) == SHOWN else shown
    assert shown is not None
    never = load_dataset("emoji", split="unseen")
    names = chosen(never)[1]
    unseen = Judge(names, [])(samples(names, *SHOWN))
    record = {
        "count": COUNT,
        "all": len(data),
        "seed": SEED,
        "sampler": SAMPLER,
        "fingerprint": model.fingerprint(),
        "real": judge(real),
        "reconstructed": judge(decoded),
        "cells": cells,
        "unseen": {"first_of_40": unseen["first_of_40"], "clip_score": unseen["clip_score"]},
    }
    return record, captions, real, shown


def table(record: dict[str, Any]) -> str:
    """Return the table of a record, in Markdown."""
    lines = [
        f"| images | first of {record['count']} | first of {record['all']:,} | CLIP score |",
        "|---|---|---|---|",
    ]
    rows = [("real, held out", record["real"]), ("real, through the VAE", record["reconstructed"])]
    rows += [(f"{cell['steps']} steps, guidance {cell['guidance']:g}", cell) for cell in record["cells"]]
    lines += [
        f"| {name} | {row['first_of_40']} | {row['first_of_all']} | {row['clip_score']:.1f} |" for name, row in rows
    ]
    unseen = record["unseen"]
    lines.append(
        f"| emoji never trained on, {SHOWN[0]} steps, guidance {SHOWN[1]:g} | {unseen['first_of_40']} | | "
        f"{unseen['clip_score']:.1f} |"
    )
    return "\n".join(lines)


def replaced(page: str, record: dict[str, Any]) -> str:
    """Return a page with the table between its two marks."""
    marks = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{table(record)}\n{found[2]}", page)


def draw(path: Path, captions: Sequence[str], real: Tensor, samples: Tensor) -> None:
    """Save a figure of all captions with the real image on the left and the sample on the right."""
    figure, axes = plt.subplots(8, 5, figsize=(12.5, 13), layout="constrained")
    for axis, caption, one, other in zip(axes.flat, captions, real, samples, strict=True):
        pair = torch.cat([one, torch.full((3, 64, 4), 255, dtype=torch.uint8), other], dim=2)
        axis.imshow(pair.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(caption.removesuffix(" background"), fontsize=7)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    record, captions, real, samples = measure()
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.figures is not None:
        draw(arguments.figures / "emoji-samples.png", captions, real, samples)
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replaced(page, record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
