"""What an adversarial iteration of an ADM network costs, over a bare forward and backward of the same network.

One iteration is a batch of 32 through K = 3 passes of free adversarial training with the hybrid loss, AdamW and the
moving average, in float32; a pass is compared with one forward and backward at a fixed point. Both are timed in turns
in one process; the ratio of images per second is taken within a round.

    python benchmarks/adm_iteration.py --out benchmarks/results/adm_iteration.json
"""

import platform

import numpy as np
import torch
from interleaved import command_line, publish, quartiles, take_turns

from robustdiff import DenoisingObjective, DiffusionProcess, FreeAdversary
from robustdiff.backbones.adm import AdmFlags, build_adm
from robustdiff.perturbation import PerDimension
from robustdiff.training.ema import EMA

K = 3
FLAGS = AdmFlags(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2,2",
    attention_resolutions="8,4",
    num_head_channels=32,
    resblock_updown=True,
    use_new_attention_order=True,
    learn_sigma=True,
    dropout=0.3,
)
"""A small network with everything that the CIFAR-10 network has."""


def bare(unet, batch_size):
    """One forward and backward after another."""
    x, t = torch.randn(batch_size, 3, 16, 16), torch.randint(1000, (batch_size,))
    while True:
        unet(x, t).sample.square().mean().backward()
        unet.zero_grad()
        yield


def adversarial(unet, batch_size):
    """The passes of free adversarial training, one after another."""
    objective = DenoisingObjective(DiffusionProcess.cosine(1000), variance="learned_range")
    adversary = FreeAdversary(K, 0.1, PerDimension(0.1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    ema = EMA(list(unet.parameters()), 0.9999)
    x0 = torch.rand(batch_size, 3, 16, 16) * 2 - 1
    while True:
        draw = objective.draw(x0)
        for delta in adversary(draw.x_t, draw.t):
            objective(unet, draw, delta)["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            yield


def measure(rounds, batch_size):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loops = {
        "bare": bare(build_adm(FLAGS).train(), batch_size),
        "free": adversarial(build_adm(FLAGS).train(), batch_size),
    }
    seconds = take_turns(loops, dict.fromkeys(loops, K), rounds)
    return {
        "ratios": {"free_over_bare_images_per_second": quartiles(seconds["bare"] / seconds["free"])},
        "images_per_second": {name: batch_size / float(np.median(values)) for name, values in seconds.items()},
        "settings": {
            "network": "adm_cifar_like: " + ", ".join(f"{name}={value}" for name, value in vars(FLAGS).items()),
            "batch_size": batch_size,
            "precision": "float32",
            "K": K,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def main(arguments=None):
    options = command_line(__doc__.splitlines()[0], rounds=20, batch_size=32).parse_args(arguments)
    result = measure(options.rounds, options.batch_size)
    ratio = result["ratios"]["free_over_bare_images_per_second"]
    low, high = ratio["quartiles"]
    line = f"images/s of free AT over bare forward and backward: {ratio['median']:.3f} ({low:.3f} to {high:.3f})"
    publish(result, [line], options.out)


if __name__ == "__main__":
    main()
