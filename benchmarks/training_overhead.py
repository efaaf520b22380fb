"""What adversarial training costs, and what the trainer costs.

Four loops train copies of one network in turns, in one process, so that whatever slows the machine slows all of them;
the ratios are taken within a round, and the median over the rounds is reported with its quartiles:

    free_over_plain     one batch of free adversarial training (K updates) over K updates of plain training: 1 is free
    trainer_over_bare   the trainer's images per second over those of a bare forward, backward and step
    pgd_over_free       one update of PGD over one of free adversarial training (2.6 in Wang et al., 2025)

    python benchmarks/training_overhead.py --out benchmarks/results/training_overhead.json
"""

import platform

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from interleaved import command_line, publish, quartiles, take_turns

from robustdiff.data import load_dataset
from robustdiff.recipe import Recipe
from robustdiff.training.build import build_model
from robustdiff.training.trainer import Trainer

K = 3
TARGETS = {"free_over_plain": "≤ 1.05", "trainer_over_bare": "≥ 0.95", "pgd_over_free": None}


def bare_loop(unet, batch_size, shape, lr):
    """Forward, backward and step, on the same noisy batch again and again: nothing else."""
    unet = unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, fused=True)
    x_t, noise = torch.randn(2, batch_size, *shape)
    t = torch.randint(1000, (batch_size,))
    while True:
        loss = F.mse_loss(unet(x_t, t).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def measure(rounds, batch_size, tiny):
    torch.set_num_threads(1)
    model = (
        {"channels": [8, 16], "layers": 1, "groups": 4}
        if tiny
        else {"channels": [16, 48, 96], "layers": 1, "groups": 8}
    )
    recipe = Recipe.model_validate(
        {"data": "fashion-16", "model": model, "batch_size": batch_size, "steps": 10**9, "ema": 0.999, "threads": 1}
    )
    dataset, accelerator = load_dataset(recipe.data.name), Accelerator(cpu=True)

    def network(recipe):
        set_seed(0)
        return build_model(recipe, dataset)

    def trainer_loop(adversary):
        with_adversary = Recipe.model_validate({**recipe.model_dump(), "adversary": {"name": adversary, "steps": K}})
        return Trainer(with_adversary, accelerator, dataset, network(with_adversary)).updates()

    loops = {
        "bare": bare_loop(network(recipe).model.network, batch_size, dataset.shape, recipe.lr),
        "plain": trainer_loop("none"),
        "free": trainer_loop("free"),
        "pgd": trainer_loop("pgd"),
    }
    # K updates of each are one batch of free adversarial training, and as many plain ones; PGD's cost K + 1 times that.
    per_update = take_turns(loops, {"bare": K, "plain": K, "free": K, "pgd": 1}, rounds)
    ratios = {
        "free_over_plain": per_update["free"] / per_update["plain"],
        "trainer_over_bare": per_update["bare"] / per_update["plain"],
        "pgd_over_free": per_update["pgd"] / per_update["free"],
    }
    return {
        "ratios": {name: {**quartiles(values), "target": TARGETS[name]} for name, values in ratios.items()},
        "seconds_per_update": {name: float(np.median(values)) for name, values in per_update.items()},
        "settings": {
            "model": model,
            "data": dataset.name,
            "shape": dataset.shape,
            "batch_size": batch_size,
            "precision": "float32",
            "K": K,
            "ema": recipe.ema,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def main(arguments=None):
    parser = command_line(__doc__.splitlines()[0], rounds=40, batch_size=128)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to see whether this runs")
    options = parser.parse_args(arguments)
    result = measure(options.rounds, options.batch_size, options.tiny)
    lines = []
    for name, ratio in result["ratios"].items():
        low, high = ratio["quartiles"]
        target = f", target {ratio['target']}" if ratio["target"] else ""
        lines.append(f"{name:20}{ratio['median']:.3f}  (quartiles {low:.3f} to {high:.3f}{target})")
    publish(result, lines, options.out)


if __name__ == "__main__":
    main()
