"""A device's samples are the CPU's, and the originals' numbers are met on it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustdiff import ConsistencyObjective, DenoisingObjective, DiffusionProcess, FreeAdversary, load_adm
from robustdiff.codecs.vae import VAESection
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import ImageNoise, philox
from robustdiff.evaluation.recorded import Recordings
from robustdiff.metrics.precision_recall import precision_recall
from robustdiff.objectives.preconditioning import Preconditioned
from robustdiff.perturbation import PerDimension

SAMPLERS = ["ddim", "iddpm", "dpm++", "es", "time-shift"]


@pytest.mark.parametrize(("network", "sampler"), [*(("fashion-16", s) for s in SAMPLERS), ("fashion-16-edm", "ddim")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_are_those_of_the_cpu(device, exact, network, sampler, memory_format):
    images = []
    for place in ("cpu", device):
        generator = Generator.load(network, sampler=sampler, steps=5)
        generator.model.network.to(place, memory_format=memory_format if images else torch.contiguous_format)
        images.append(generator.sample(range(8), None).cpu())
    # Steps enlarge differences of rounding; time-shift chooses among times by numbers that may be as good as equal.
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=3e-2 if sampler == "time-shift" else 3e-3)


def test_noise_is_that_of_the_cpu(device):
    words = torch.randint(2**32, (2, 2, 1000), generator=torch.Generator().manual_seed(0))
    expected = philox(*words.clone(), (2**32 - 1, 2**31))
    for found, own in zip(philox(*words.to(device), (2**32 - 1, 2**31)), expected, strict=True):
        assert torch.equal(found.cpu(), own)
    for ahead in (0, 20):
        draws = (
            ImageNoise(2**63 - 1, range(2**32 - 3, 2**32 + 3), (3, 7, 5), torch.device(place), ahead)
            for place in ("cpu", device)
        )
        for ours, theirs in itertools.islice(zip(*draws, strict=False), 6):
            torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=4e-6)


def assert_as_unrecorded(generator, tolerance):
    """Batches of two sizes, of which each but the first is replayed."""
    plain = replace(generator, capture=False, recordings=Recordings())
    for batch in (range(8), range(8, 16), range(16, 19)):
        labels = generator.labels(batch)
        found = generator.sample(batch, labels)
        torch.testing.assert_close(found, plain.sample(batch, labels), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++"])
def test_recorded_samples_are_those_of_the_network_itself(device, exact, caplog, sampler, precision, tolerance):
    generator = Generator.load("fashion-16", device, sampler=sampler, steps=5, precision=precision, capture=True)
    assert_as_unrecorded(generator, tolerance)
    with torch.no_grad():
        for parameter in generator.model.network.parameters():  # as an optimiser or a moving average does
            parameter.mul_(1.01)
    assert_as_unrecorded(generator, tolerance)
    bias = generator.model.network.conv_out.bias
    generator.model.network.conv_out.bias = torch.nn.Parameter(bias.detach() + 0.1)
    assert_as_unrecorded(generator, tolerance)
    assert not caplog.records, "every call could be recorded"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_with_an_autocast_of_its_own_is_recorded(device, exact, caplog, precision):
    """As accelerate makes it for training in mixed precision."""
    generator = Generator.load("fashion-16", device, steps=5, precision=precision, capture=True)
    network = generator.model.network
    network.forward = torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=True)(network.forward)
    assert_as_unrecorded(generator, 2e-2)
    assert not caplog.records


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_samples_in_half_precision(device, precision):
    exact, half = (Generator.load("fashion-16", device, steps=5, precision=p) for p in ("fp32", precision))
    first, second = (generator.sample(range(8), None) for generator in (exact, half))
    assert second.dtype == torch.float32
    assert (first - second).abs().mean() < 0.1


def load(path):
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def assert_met(value, expected, tolerance=1e-4):
    assert (value.cpu() - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12


@pytest.mark.parametrize("file", ["cifar_like", "imagenet_like"])
def test_outputs_of_the_original_network(device, exact, golden, file):
    flags = json.loads((golden / "config.json").read_text())["models"][file]
    unet, data = (
        load_adm(golden / f"adm_{file}.pt", **flags).to(device).eval(),
        load(golden / f"adm_{file}_forward.npz"),
    )
    labels = data["y"].to(device) if "y" in data else None
    with torch.no_grad():
        assert_met(unet(data["x"].to(device), data["t"].to(device), class_labels=labels).sample, data["out"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_passes_of_the_original_adversarial_training(device, exact, golden, memory_format, authors_l2):
    config = json.loads((golden / "config.json").read_text())
    settings, data = config["at_K3"], load(golden / "at_K3.npz")
    unet = load_adm(golden / settings["init_from"], **{**config["models"]["cifar_like"], "dropout": 0.0}).train()
    unet.to(device, memory_format=memory_format)
    objective = DenoisingObjective(DiffusionProcess.cosine(1000), variance="learned_range", vb_scale=1.0)
    adversary = FreeAdversary(settings["steps"], settings["step_size"], PerDimension(settings["max_norm"]))
    adversary.norm = authors_l2
    optimizer = torch.optim.AdamW(unet.parameters(), **settings["adamw"], fused=True)
    step = 0
    for batch in zip(data["x0"], data["noise"], data["t"], strict=True):
        x0, noise, t = (value.to(device) for value in batch)
        draw = objective.draw(x0, t=t, noise=noise)
        for delta in adversary(draw.x_t, t):
            losses = objective(unet, draw, delta)
            assert_met(delta.detach(), data["delta"][step], 1e-3)
            for name in ("mse", "vb", "loss"):
                assert_met(losses[name].detach(), data[name][step], 1e-3)
            losses["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == len(data["delta"])


@pytest.mark.parametrize("kind", ["cd", "ct"])
@pytest.mark.parametrize("perturb", ["solver", "student"])
def test_losses_of_the_original_consistency_models(device, exact, golden, kind, perturb):
    flags = json.loads((golden / "config.json").read_text())["cm"]["model"]
    student, target, teacher = (
        load_adm(golden / f"cm_{name}.pt", **flags).to(device).eval() for name in ("student", "target", "teacher")
    )
    data = load(golden / "cm.npz")
    objective = ConsistencyObjective(
        target, Preconditioned(teacher) if kind == "cd" else None, 18, metric="l2", perturb=perturb
    )
    # The original counts the levels from the largest, and the pair (n + 1, n) by the first of them.
    n = 16 - data["N18_l2_indices"]
    draw = objective.draw(data["N18_l2_x0"].to(device), t=n.to(device), noise=data["N18_l2_noise"].to(device))
    with torch.no_grad():
        assert_met(objective(student, draw)["distance"], data[f"N18_l2_{kind}_loss"])


def test_latents_are_encoded_and_decoded_as_on_the_cpu(device, exact):
    vae = VAESection(name="vae", path="fashion-16-vae", posterior="mean").build(None)
    images = 2 * torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    expected = vae.encode(images), vae.decode(vae.encode(images))
    vae.to(device)
    latents = vae.encode(images.to(device))
    torch.testing.assert_close(latents.cpu(), expected[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(vae.decode(latents).cpu(), expected[1], rtol=0, atol=1e-3)


def test_precision_and_recall_are_those_of_the_cpu(device):
    x, y = (np.random.default_rng(seed).normal(size=(300, 8)).astype(np.float32) for seed in (0, 1))
    assert precision_recall(0.8 * x, y, chunk=70, device=device) == precision_recall(0.8 * x, y)
