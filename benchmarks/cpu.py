"""Which precision and memory format train fastest on a CPU.

Two networks, each in fp32 and bf16 (autocast) and in the contiguous and the channels-last memory format, are trained by
free adversarial training with K = 3, AdamW and a moving average, on one thread:

    fashion-16      the network of the recipes fashion-16 and fashion-16-at, in batches of 128
    adm             a small network with everything that guided-diffusion's CIFAR-10 network has, in batches of 32

All eight take turns in one process. Times are of the processor, so that a busy machine slows them little. Speeds are
over that of fp32 in the contiguous format in the same round.

    python benchmarks/cpu.py --out benchmarks/results/cpu.json
"""

import itertools
import platform
import time
from pathlib import Path

import numpy as np
import torch
from adm_iteration import FLAGS
from interleaved import command_line, publish, quartiles, take_turns

from robustdiff import DenoisingObjective, DiffusionProcess, FreeAdversary
from robustdiff.backbones.adm import build_adm
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.section import native_precision
from robustdiff.training.ema import EMA

K = 3
SHAPES = {"fashion-16": (1, 16, 16), "adm": (3, 16, 16)}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def build(network):
    torch.manual_seed(0)
    if network == "adm":
        return build_adm(FLAGS)
    return UNetSection(channels=(16, 48, 96), layers=1, groups=8).build(SHAPES[network], None, False).network


def updates(network, precision, memory_format, batch_size):
    """Train a network, an update at a time."""
    unet = build(network).train().to(memory_format=FORMATS[memory_format])
    objective = DenoisingObjective(
        DiffusionProcess.cosine(1000), variance="learned_range" if network == "adm" else "fixed"
    )
    adversary = FreeAdversary(K, 0.1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    ema = EMA(list(unet.parameters()), 0.999)
    x0 = torch.rand(batch_size, *SHAPES[network]) * 2 - 1
    while True:
        draw = objective.draw(x0)
        for delta in adversary(draw.x_t, draw.t):
            with torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "fp32"):
                loss = objective(unet, draw, delta)["loss"].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            yield


def processor():
    """The name of the processor, and the instructions it has for bf16."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    capabilities = torch.cpu.get_capabilities()
    return names[0], [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]


def measure(rounds, batch_size):
    torch.set_num_threads(1)
    kinds = list(itertools.product(SHAPES, PRECISIONS, FORMATS))
    sizes = {"fashion-16": batch_size, "adm": max(1, batch_size // 4)}
    loops = {kind: updates(*kind, sizes[kind[0]]) for kind in kinds}
    seconds = take_turns(loops, dict.fromkeys(loops, K), rounds, clock=time.process_time)
    name, instructions = processor()
    return {
        "networks": {
            network: {
                f"{precision}, {memory_format}": {
                    "images_per_second": sizes[network] / float(np.median(seconds[network, precision, memory_format])),
                    "speed": quartiles(
                        seconds[network, "fp32", "contiguous"] / seconds[network, precision, memory_format]
                    ),
                }
                for precision, memory_format in itertools.product(PRECISIONS, FORMATS)
            }
            for network in SHAPES
        },
        "settings": {
            "processor": name,
            "instructions_for_bf16": instructions,
            "auto": native_precision(),
            "batch_size": sizes,
            "K": K,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def table(result):
    """The table of a result, for the documentation."""
    sizes = result["settings"]["batch_size"]
    rows = []
    for network, kinds in result["networks"].items():
        fastest = max(kinds, key=lambda kind: kinds[kind]["speed"]["median"])
        cells = []
        for kind, row in kinds.items():
            mark = "**" if kind == fastest else ""
            cells.append(f"{mark}{row['speed']['median']:.2f}{mark} ({row['images_per_second']:.0f})")
        rows.append(f"| {network}, batch {sizes[network]} | {' | '.join(cells)} |")
    kinds = next(iter(result["networks"].values()))
    return "\n".join([f"| speed (images/s) | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds), *rows]) + "\n"


def main(arguments=None):
    options = command_line(__doc__.splitlines()[0], rounds=20, batch_size=128).parse_args(arguments)
    result = measure(options.rounds, options.batch_size)
    lines = [f"{result['settings']['processor']}, {', '.join(result['settings']['instructions_for_bf16'])}"]
    for network, kinds in result["networks"].items():
        for kind, row in kinds.items():
            low, high = row["speed"]["quartiles"]
            lines.append(
                f"{network:12}{kind:22}{row['images_per_second']:8.0f} images/s  "
                f"{row['speed']['median']:.2f} ({low:.2f} to {high:.2f})"
            )
    publish(result, lines, options.out)


if __name__ == "__main__":
    main()
