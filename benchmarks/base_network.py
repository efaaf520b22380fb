"""Which small network gives the best FID per minute of training on a CPU.

Each network is pretrained on fashion-16 for the same processor time on one thread, from scratch, with AdamW at its peak
rate after a warm-up of 200 updates and then half a cosine down to 0 at the end of the time, a moving average, and the
batches of the same sequence. Then FID of ddim at 50 steps, from common noise. Networks:

    unet            the shipped one: three levels, 16×16 pixels at the first
    unet-patch2     a UNet of two levels over patches of 2×2 pixels, so that the first level has 8×8
    dit-patch2      a diffusion transformer (Peebles & Xie, 2023) over patches of 2×2

    python benchmarks/base_network.py --minutes 8 --out benchmarks/results/base_network.json \
        --document docs/base-network.md
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn
from torch.nn import functional as F

from robustdiff import DenoisingObjective, DiffusionProcess
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.data import load_dataset, to_uint8, to_unit
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import reference_statistics
from robustdiff.report.words import threads
from robustdiff.samplers import sample
from robustdiff.training.ema import EMA
from robustdiff.training.stream import BatchIndices, batch_generator

BATCH, WARMUP, DECAY = 128, 200, 0.999
RATES = {"unet": 1e-3, "unet-patch2": 1e-3, "dit-patch2": 1e-3}


class Patches(nn.Module):
    """A network that sees p×p pixels as p² channels."""

    def __init__(self, network: nn.Module, patch: int) -> None:
        super().__init__()
        self.network, self.patch = network, patch

    def forward(self, x, t):
        return F.pixel_shuffle(self.network(F.pixel_unshuffle(x, self.patch), t).sample, self.patch)


class Unconditional(nn.Module):
    """A DiT, which always has classes, with one class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x, t, class_labels=torch.zeros(len(x), dtype=torch.long)).sample


def networks(shape, tiny):
    channels, size, _ = shape
    unet = UNetSection(channels=(8, 8, 8) if tiny else (16, 48, 96), layers=1, groups=8)
    patched = UNet2DModel(
        sample_size=size // 2,
        in_channels=4 * channels,
        out_channels=4 * channels,
        layers_per_block=1 if tiny else 2,
        block_out_channels=(8, 8) if tiny else (64, 96),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8 if tiny else 32,
        norm_num_groups=8,
    )
    dit = DiTTransformer2DModel(
        num_attention_heads=2 if tiny else 4,
        attention_head_dim=8 if tiny else 32,
        in_channels=channels,
        out_channels=channels,
        num_layers=1 if tiny else 6,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1,
    )
    return {
        "unet": unet.build(shape, None, False).network,
        "unet-patch2": Patches(patched, 2),
        "dit-patch2": Unconditional(dit),
    }


def pretrain(network, rate, dataset, objective, budget):
    """Train for a processor time; the schedule follows the time. Returns the updates made."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0, fused=True)
    ema = EMA(list(network.parameters()), DECAY)
    indices = iter(BatchIndices(len(dataset), BATCH, seed=0))
    start, updates = time.process_time(), 0
    network.train()
    while (used := (time.process_time() - start) / budget) < 1:
        images = dataset.__getitems__(next(indices))[0]
        draw = objective.draw(to_unit(images), generator=batch_generator(0, updates, "cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(network, draw)["loss"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (updates + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * used))
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        updates += 1
    return updates, ema


def measure(network, process, shape, num, metrics):
    network.eval()
    metrics.reset()
    for start in range(0, num, 64):
        batch = range(start, min(start + 64, num))
        noise = ImageNoise(0, batch, shape, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            images = sample(network, process, "ddim", 50, latents=noise.draw())
        metrics.update(to_uint8(images), start)
    values, intervals, *_ = metrics.result("the images")
    return {"fid": values["fid"], "fid_ci": list(intervals["fid"])}


def document(record):
    """The page of a result."""
    settings, networks = record["settings"], record["networks"]
    rows = [
        f"| {name} | {row['fid']:.2f} ({row['fid_ci'][0]:.2f} … {row['fid_ci'][1]:.2f}) | {row['updates']:,} "
        f"| {row['images_per_second']:,.0f} | {row['evaluations_per_second']:,.0f} | {row['parameters']:,} |"
        for name, row in networks.items()
    ]
    best = min(networks, key=lambda name: networks[name]["fid"])
    return "\n".join(
        [
            "# Which small network to pretrain on a CPU",
            "",
            f"Each network was trained from scratch on {settings['data']} for {settings['minutes']:g} minutes of "
            f"processor time on {threads(settings['threads'])}: batch {settings['batch_size']}, AdamW at a peak rate "
            f"of {max(settings['peak_rate'].values()):g}, half a cosine down to 0, moving average {settings['ema']:g}, "
            f"{settings['precision']}, torch {settings['torch']}, one seed. Then FID of {settings['images']:,} images "
            f"of {settings['sampler']}, with 95 % bootstrap intervals. `unet` has three levels from 16×16 pixels "
            "(16, 48 and 96 channels), `unet-patch2` two levels over patches of 2×2 (64 and 96), `dit-patch2` is a "
            "diffusion transformer over such patches (6 layers of width 128).",
            "",
            "| network | FID | updates | images trained a second | evaluations a second | parameters |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"In this time `{best}` gets furthest. Of each kind one size was tried, at one rate.",
            "",
            "Made by `python benchmarks/base_network.py --minutes 8 --out benchmarks/results/base_network.json "
            "--document docs/base-network.md`.",
            "",
        ]
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="processor time of each network")
    parser.add_argument("--num", type=int, default=2000, help="images")
    parser.add_argument("--tiny", action="store_true", help="networks of no use, to see whether this runs")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--document", type=Path, help="also write them as this page (.md)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    dataset, extractor = load_dataset("fashion-16"), load_extractor("fashion-16")
    metrics = MetricCollection(["fid"], extractor, reference_statistics(dataset, extractor))
    objective = DenoisingObjective(DiffusionProcess.cosine(1000))
    rows = {}
    set_seed(0)
    for name, network in networks(dataset.shape, options.tiny).items():
        updates, ema = pretrain(network, RATES[name], dataset, objective, 60 * options.minutes)
        start = time.process_time()
        with ema.applied():
            fid = measure(network, objective.process, dataset.shape, options.num, metrics)
        rows[name] = {
            **fid,
            "updates": updates,
            "images_per_second": updates * BATCH / (60 * options.minutes),
            "evaluations_per_second": 50 * options.num / (time.process_time() - start),
            "parameters": int(np.sum([p.numel() for p in network.parameters()])),
        }
        low, high = fid["fid_ci"]
        print(f"{name:14} FID {fid['fid']:.2f} ({low:.2f} to {high:.2f}) after {updates} updates", flush=True)
    record = {
        "networks": rows,
        "settings": {
            "data": dataset.name,
            "minutes": options.minutes,
            "batch_size": BATCH,
            "peak_rate": RATES,
            "ema": DECAY,
            "sampler": "ddim, 50 steps",
            "images": options.num,
            "precision": "bf16",
            "threads": 1,
            "torch": torch.__version__,
        },
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.document is not None:
        options.document.write_text(document(record), encoding="utf-8")


if __name__ == "__main__":
    main()
