"""Training and sampling speed on a GPU: images through forward and backward per second, and sampled images per second.

The network is that of ADM's CIFAR-10 checkpoints (hybrid loss, dropout 0.3), untrained, on random images of 3×32×32, in
the recipe `cifar10-adm`: free adversarial training with K = 3, PGD, and plain training in bf16, recorded as CUDA graphs
as by default and eagerly, free training in fp16, and a bare forward and backward of the same network of diffusers in
bf16. Sampling is 10 ancestral steps. A small network, that of `fashion-16`, is bound by the launches of kernels: the
time of one of its passes is measured as well.

Loops of one group take turns in one process, and every number is a median over rounds with its quartiles. For
comparison, guided-diffusion's own network, fp16 trainer and moving average in the authors' adversarial loop made 776 to
787 images per second, and 326 sampled images per second in fp16, on one H100 with PyTorch 2.11.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
"""

import gc
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from interleaved import command_line, publish, quartiles, take_turns

from robustdiff import load_model
from robustdiff.backbones.adm import AdmFlags, build_adm, save_adm
from robustdiff.backbones.adm.convert import convert
from robustdiff.backbones.adm.flags import PRESETS
from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.data.dataset import ArrayDataset
from robustdiff.evaluation.generate import Generator
from robustdiff.recipe import load_recipe
from robustdiff.training.build import build_model
from robustdiff.training.trainer import Trainer

K = 3
STEPS = 10
TINY = AdmFlags(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, attention_resolutions="8")


def bare(network, images, dtype, device):
    """One forward and backward of a network after another."""
    x, t = images.to(device), torch.randint(1000, (len(images),), device=device)
    network = network.to(device, memory_format=torch.channels_last).train()
    while True:
        with torch.autocast(device, dtype):
            output = network(x, t).sample
        output.float().square().mean().backward()
        network.zero_grad()
        yield


def training(recipe, dataset, adversary, precision, cpu, batch_size, capture="auto"):
    """The updates of a trainer."""
    AcceleratorState._reset_state()
    changes = {"adversary.name": adversary, "precision": precision, "batch_size": batch_size, "steps": 10**8}
    changes["capture"] = capture
    if adversary != "none":
        changes["adversary.steps"] = K
    settings = load_recipe(*recipe, changes=changes)
    set_seed(0)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision)
    return Trainer(settings, accelerator, dataset, build_model(settings, dataset)).updates()


def sampled(model, precision, batch_size):
    """Batches of sampled images."""
    generator = Generator.of(model, sampler="iddpm", steps=STEPS, batch_size=batch_size, precision=precision)
    for _, images in generator.images(range(10**9)):
        yield images


def measure(rounds, batch_size, tiny):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu, synchronize = device == "cpu", torch.cuda.synchronize if device == "cuda" else lambda: None
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4 * batch_size, 32, 32, 3), dtype=np.uint8)
    dataset = ArrayDataset("random images", images)
    flags = TINY if tiny else PRESETS["cifar10-adm"]
    seconds, sizes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        set_seed(0)
        save_adm(build_adm(flags), folder / "network.pt")
        convert(folder / "network.pt", folder / "pipeline", flags, "cosine")
        source = ["data.name=npz", "data.root=none", "data.workers=0", f"model.path={folder / 'pipeline'}"]
        adm = ("cifar10-adm", source), dataset
        groups = [
            {
                "free bf16": lambda: training(*adm, "free", "bf16", cpu, batch_size),
                "none bf16": lambda: training(*adm, "none", "bf16", cpu, batch_size),
                "bare bf16": lambda: bare(build_adm(flags), torch.randn(batch_size, 3, 32, 32), torch.bfloat16, device),
            },
            {
                "pgd bf16": lambda: training(*adm, "pgd", "bf16", cpu, batch_size),
                "free bf16, eager": lambda: training(*adm, "free", "bf16", cpu, batch_size, False),
                **({} if cpu else {"free fp16": lambda: training(*adm, "free", "fp16", cpu, batch_size)}),
            },
        ]
        for group in groups:
            loops = {name: make() for name, make in group.items()}
            seconds |= take_turns(loops, {name: 1 if "pgd" in name else K for name in loops}, rounds, synchronize, 2)
            sizes |= {name: (K + 1 if "pgd" in name else 1) * batch_size for name in loops}
            del loops  # and with them the networks
            gc.collect()
            if not cpu:
                torch.cuda.empty_cache()
        model = load_model(folder / "pipeline").to(device)
        if not cpu:
            fuse_norms(model.network.to(memory_format=torch.channels_last))
        loops = {f"sampling {p}": sampled(model, p, 2 * batch_size) for p in (("bf16",) if cpu else ("bf16", "fp16"))}
        seconds |= take_turns(loops, dict.fromkeys(loops, 1), rounds, synchronize, 2)
        sizes |= dict.fromkeys(loops, 2 * batch_size)
    own = ("fashion-16-at", [])
    small = load_recipe(*own).data.load()
    loops = {f"fashion-16 {n}": training(own, small, n, "bf16", cpu, batch_size) for n in ("free", "none")}
    loops["fashion-16 free, eager"] = training(own, small, "free", "bf16", cpu, batch_size, False)
    seconds |= take_turns(loops, dict.fromkeys(loops, K), rounds, synchronize, 2)
    sizes |= dict.fromkeys(loops, batch_size)
    return {
        "images_per_second": {name: quartiles(sizes[name] / values) for name, values in seconds.items()},
        "milliseconds": {name: quartiles(1000 * values) for name, values in seconds.items()},
        "ratios": {
            "free_over_bare": quartiles(seconds["bare bf16"] / seconds["free bf16"]),
            "free_over_plain": quartiles(seconds["none bf16"] / seconds["free bf16"]),
            "fashion-16_eager_over_free": quartiles(seconds["fashion-16 free, eager"] / seconds["fashion-16 free"]),
        },
        "settings": {
            "network": "tiny" if tiny else "cifar10-adm",
            "batch_size": batch_size,
            "K": K,
            "sampling_steps": STEPS,
            "rounds": rounds,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "torch": torch.__version__,
        },
    }


def table(result):
    """The table of a result, for the documentation."""
    speeds, times = result["images_per_second"], result["milliseconds"]
    rows = [
        f"| {name} | {speed['median']:,.0f} | {speed['quartiles'][0]:,.0f} to {speed['quartiles'][1]:,.0f} "
        f"| {times[name]['median']:.1f} |"
        for name, speed in speeds.items()
    ]
    return "\n".join(["| | image passes/s | quartiles | ms per update |", "|---|---:|---:|---:|", *rows]) + "\n"


def main(arguments=None):
    parser = command_line(__doc__.splitlines()[0], rounds=15, batch_size=128)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to see whether this runs")
    options = parser.parse_args(arguments)
    result = measure(options.rounds, options.batch_size, options.tiny)
    lines = [
        f"{name:24}{found['median']:9.1f} images/s  ({found['quartiles'][0]:.1f} to {found['quartiles'][1]:.1f})"
        for name, found in result["images_per_second"].items()
    ]
    lines += [
        f"{name:24}{found['median']:9.2f} ms" for name, found in result["milliseconds"].items() if "fashion" in name
    ]
    publish(result, lines, options.out)


if __name__ == "__main__":
    main()
