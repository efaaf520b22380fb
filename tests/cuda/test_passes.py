"""A training pass waits for nothing: on a GPU it is captured as a CUDA graph, which no pass that waits can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from robustdiff import ConsistencyObjective, DenoisingObjective, DiffusionProcess, FreeAdversary
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.objectives.edm import EDMObjective
from robustdiff.objectives.preconditioning import DiffusionDenoiser
from robustdiff.objectives.timesteps import LossSecondMoment
from robustdiff.perturbation import NoiseLevel, SamplerDistance, Within


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Inside the block what makes the host wait for a GPU is an error."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def network(device, variance="fixed"):
    torch.manual_seed(0)
    return (
        UNetSection(channels=(8, 16), layers=1, groups=4)
        .build((1, 8, 8), None, variance == "learned_range")
        .network.to(device)
        .eval()
    )


def denoising(device):
    process = DiffusionProcess.cosine(50)
    objective = DenoisingObjective(process, variance="learned_range", timesteps=LossSecondMoment(50))
    return objective, network(device, "learned_range"), SamplerDistance(process, 0.1, 10)


def teacher(device):
    return DiffusionDenoiser(network(device), DiffusionProcess.cosine(1000))


def edm(device):
    objective = EDMObjective(teacher=teacher(device))
    return objective, network(device), Within(NoiseLevel(objective.process, 0.05), objective.process, 0.01, 10.0)


def consistency(device):
    objective = ConsistencyObjective(network(device), teacher(device), metric="pseudo-huber")
    return objective, network(device), NoiseLevel(objective.process, 0.05)


CASES = [denoising, edm, consistency]


def passes(objective, model, adversary, draw):
    """The losses of all passes over a batch, with their gradients, and the sampler's history."""
    losses = []
    for delta in adversary(draw.x_t, draw.t):
        loss = objective(model, draw, delta)["loss"]
        loss.mean().backward()
        losses.append(loss.detach())
    if isinstance(objective.timesteps, LossSecondMoment):
        objective.timesteps.update(draw.t, losses[0])
    objective.after_update(model, torch.ones((), dtype=torch.bool, device=losses[0].device))
    return torch.stack(losses)


@pytest.mark.parametrize("case", CASES)
def test_neither_draws_nor_passes_wait(device, case):
    objective, model, radius = case(device)
    adversary = FreeAdversary(3, 0.1, radius)
    generator = torch.Generator(device).manual_seed(0)
    x0 = torch.rand(16, 1, 8, 8, device=device) * 2 - 1
    passes(objective, model, adversary, objective.draw(x0, generator=generator))  # the tables go to the device once
    with without_waiting(device):
        for _ in range(2):
            losses = passes(objective, model, adversary, objective.draw(x0, generator=generator))
    assert losses.shape == (3, 16)
    assert losses.isfinite().all()
    assert adversary.skipped == 0


@pytest.mark.parametrize("case", CASES)
def test_a_captured_pass_is_the_pass(device, exact, case):
    objective, model, radius = case(device)
    adversary = FreeAdversary(3, 0.1, radius)
    draw = objective.draw(torch.rand(16, 1, 8, 8, device=device) * 2 - 1)

    def once():
        losses = []
        for delta in adversary(draw.x_t, draw.t):
            loss = objective(model, draw, delta)["loss"]
            # Not accumulated into the parameters' .grad, which would be replayed as well.
            *_, delta.grad = torch.autograd.grad(loss.mean(), [*model.parameters(), delta])
            losses.append(loss.detach())
        return torch.stack(losses)

    if device == "cpu":
        assert torch.equal(once(), once())
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = once()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_a_gpu_draws_uniformly_until_the_history_is_full_and_then_by_it(device):
    """With the probabilities and weights of a CPU, and remembering the same losses."""
    sampler, reference = LossSecondMoment(4, history=2), LossSecondMoment(4, history=2)
    generator = torch.Generator(device).manual_seed(0)
    t, weight = sampler.draw(40_000, generator)
    assert weight is None or bool((weight == 1).all())
    torch.testing.assert_close(torch.bincount(t.cpu()) / 40_000, torch.full((4,), 0.25), atol=0.01, rtol=0)
    for losses in torch.rand(3, 16, generator=torch.Generator().manual_seed(1)):
        losses[3], times = float("nan"), torch.arange(16) % 4
        reference.update(times, losses)
        sampler.update(times.to(device), losses.to(device))
    for name, value in reference.state_dict().items():
        assert torch.equal(sampler.state_dict()[name], value)
    torch.testing.assert_close(sampler.probabilities.cpu(), reference.probabilities, rtol=1e-12, atol=0)
    t, weight = sampler.draw(40_000, generator)
    p = reference.probabilities
    torch.testing.assert_close((torch.bincount(t.cpu()) / 40_000).double(), p, atol=0.01, rtol=0)
    torch.testing.assert_close(weight.cpu().double(), 1 / (4 * p[t.cpu()]), rtol=1e-6, atol=0)
