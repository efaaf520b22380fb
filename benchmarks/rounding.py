"""Measure how much of what δ does to the loss remains in bf16, whose numbers have 8 significant bits.

In bf16 a network sees x_t + δ rounded. The smaller δ is, the less the difference of the rounded points, δ + e, has in
common with δ number by number. But e does not follow the gradient g of the loss: over d numbers ⟨g, e⟩ is of the size
of ‖g‖ ‖e‖/√d, where ⟨g, δ⟩ is nearly ‖g‖ ‖δ‖. What AT trains on is the rise of the loss,

    R(δ) = L(δ) − L(0),

with the ascent and the loss in bf16. Two shares of the rise in fp32 say what is left, for fixed weights:

    seen        R in bf16 over R in fp32, at the δ that was found in fp32
    found       R in fp32 at the δ that was found in bf16, over that at the δ that was found in fp32

Both are ratios of means over images, times and noise, with a 95 % interval (normal, by the delta method). Beside them
is the cosine of δ + e with δ. For a diffusion model L is the loss with the target at δ = 0: in that of training the
target has δ/σ_t, which is not rounded. A consistency model is the student as it starts, with δ at the solver's point
of level σ.

    python benchmarks/rounding.py --out benchmarks/results/rounding.json
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from interleaved import publish
from torch.nn.functional import cosine_similarity

from robustdiff import ConsistencyObjective, DenoisingObjective, PGDAdversary, load_model
from robustdiff.data.dataset import to_unit
from robustdiff.data.registry import load_dataset
from robustdiff.objectives.preconditioning import karras_sigmas
from robustdiff.report.words import table

K = 3
LEVELS = 18
BATCH = 128


def rounded(loss, half):
    """Return the function δ ↦ losses (B,) in bf16, or as it is."""

    def of(delta):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return loss(delta)["loss"]

    return of


def rises(loss, points, step_size, scale):
    """Return the rises of the loss of each image of a batch, and the cosine, with shape (4, B) in float64."""
    losses = [rounded(loss, half) for half in (False, True)]
    adversary = PGDAdversary(K - 1, step_size)  # the ascents between K passes, with fixed weights
    exact, half = (next(adversary(points, loss=of)).detach() for of in losses)
    zero = torch.zeros_like(points)
    with torch.no_grad():
        values = [of(delta) - of(zero) for of, delta in ((losses[0], exact), (losses[1], exact), (losses[0], half))]
        clean, moved = ((scale * point).bfloat16().float() for point in (points, points + exact))
    return torch.stack([*values, cosine_similarity((moved - clean).flatten(1), exact.flatten(1))]).double()


def share(numerator, denominator):
    """Return the ratio of two means over images, and its 95 % interval."""
    ratio = numerator.mean() / denominator.mean()
    error = (numerator - ratio * denominator).std() / len(numerator) ** 0.5 / denominator.mean()
    return {"share": ratio.item(), "interval": [(ratio - 1.96 * error).item(), (ratio + 1.96 * error).item()]}


def summary(batches):
    exact, seen, found, cosines = torch.cat(batches, 1)
    return {
        "rise": exact.mean().item(),
        "seen": share(seen, exact),
        "found": share(found, exact),
        "cosine": cosines.mean().item(),
    }


def frozen(name):
    model = load_model(name)
    model.network.requires_grad_(False)
    return model


def cases(images):
    """Yield the name of a case, and the arguments of ``rises``, for every batch of images."""
    generator = torch.Generator().manual_seed(0)
    base, student = frozen("fashion-16"), frozen("fashion-16-edm").network
    denoising = DenoisingObjective(base.process, prediction=base.prediction)
    for step_size in (0.3, 0.03):
        for x0 in images.split(BATCH):
            draw = denoising.draw(x0, generator=generator)

            def loss(delta, draw=draw):
                return denoising(base.network, replace(draw, x_t=draw.x_t + delta))

            yield f"`fashion-16`, α = {step_size}", (loss, draw.x_t, step_size, 1.0)
    distillation = ConsistencyObjective(
        copy.deepcopy(student), base.denoiser(), LEVELS, metric="pseudo-huber", weighting="inverse-gap"
    )
    for level, sigma in enumerate(karras_sigmas(LEVELS)[:-1].tolist()):
        for x0 in images.split(BATCH):
            draw = distillation.draw(x0, t=torch.full((len(x0),), level), generator=generator)

            def loss(delta, draw=draw):
                return distillation(student, draw, delta)

            yield f"consistency, σ = {sigma:.2g}", (loss, draw.x_t, 0.1, (sigma**2 + 0.25) ** -0.5)


def measure(number):
    torch.set_num_threads(1)
    dataset = load_dataset("fashion-16", split="test")
    images = to_unit(torch.stack([dataset[index][0] for index in range(number)]))
    batches = {}
    for name, case in cases(images):
        batches.setdefault(name, []).append(rises(*case))
    return {
        "cases": {name: summary(of) for name, of in batches.items()},
        "settings": {"images": number, "K": K, "torch": torch.__version__},
    }


def shown(result):
    """Return the table of docs/speed.md."""
    rows = [
        [
            name,
            f"{case['cosine']:.2f}",
            *("{share:.3f} ({interval[0]:.3f} … {interval[1]:.3f})".format(**case[key]) for key in ("seen", "found")),
        ]
        for name, case in result["cases"].items()
    ]
    return table(["network and δ", "cosine", "seen", "found"], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="How much of what δ does to the loss remains in bf16")
    parser.add_argument("--images", type=int, default=512, help="test images for each row")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args(argv)
    result = measure(arguments.images)
    publish(result, [shown(result)], arguments.out)


if __name__ == "__main__":
    main()
