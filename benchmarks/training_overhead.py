"""What adversarial training costs, and what the trainer costs.

Four loops train copies of one network in turns, in one process, so that whatever slows the machine slows all of them;
the ratios are taken within a round, and the median over the rounds is reported with its quartiles:

    free_over_plain     one batch of free adversarial training (K updates) over K updates of plain training: 1 is free
    trainer_over_bare   the trainer's images per second over those of a bare forward, backward and step
    pgd_over_free       one update of PGD over one of free adversarial training (2.6 in Wang et al., 2025)

    python benchmarks/training_overhead.py --out benchmarks/results/training_overhead.json
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed

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


def seconds(loop, updates):
    start = time.perf_counter()
    for _ in range(updates):
        next(loop)
    return time.perf_counter() - start


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
    updates = {"bare": K, "plain": K, "free": K, "pgd": 1}
    names = list(loops)
    times = {name: [] for name in names}
    for name in names:
        seconds(loops[name], K)  # allocations, and torch's choice of kernels
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(loops[name], updates[name]) / updates[name])

    per_update = {name: np.array(values) for name, values in times.items()}
    ratios = {
        "free_over_plain": per_update["free"] / per_update["plain"],
        "trainer_over_bare": per_update["bare"] / per_update["plain"],
        "pgd_over_free": per_update["pgd"] / per_update["free"],
    }
    return {
        "ratios": {
            name: {"median": median, "quartiles": [low, high], "target": TARGETS[name]}
            for name, values in ratios.items()
            for low, median, high in [np.quantile(values, [0.25, 0.5, 0.75]).tolist()]
        },
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to see whether this runs")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args(arguments)
    result = measure(options.rounds, options.batch_size, options.tiny)
    for name, ratio in result["ratios"].items():
        low, high = ratio["quartiles"]
        target = f", target {ratio['target']}" if ratio["target"] else ""
        print(f"{name:20}{ratio['median']:.3f}  (quartiles {low:.3f} to {high:.3f}{target})")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
