"""Free adversarial training as the authors' loop ran it: δ and losses of every pass, parameters and average after."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdiff import DenoisingObjective, DiffusionProcess, FreeAdversary, load_adm, save_adm
from robustdiff.perturbation import PerDimension
from robustdiff.perturbation.norms import L2
from robustdiff.training.ema import EMA

# Biases in front of a group norm that has one channel a group: they have no effect, so that their gradient is rounding,
# of which AdamW makes steps of ±lr. All other parameters are met one by one, and all together.
UNDETERMINED = {
    "input_blocks.1.0.in_layers.2.bias",
    "input_blocks.2.0.in_layers.2.bias",
    "output_blocks.4.0.in_layers.2.bias",
    "output_blocks.5.0.in_layers.2.bias",
    "output_blocks.5.0.out_layers.3.bias",
    "output_blocks.5.0.skip_connection.bias",
}


def summary(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """[ℓ2 norm, sum, first 24 entries] of each parameter, as the golden data have it."""
    flat = {name: value.double().flatten().numpy() for name, value in state.items()}
    return {name: np.array([np.linalg.norm(v), v.sum(), *v[:24]]) for name, v in flat.items()}


@pytest.mark.parametrize("run", ["at_K3", "at_K5"])
def test_every_pass_and_the_end_agree(golden: Path, tmp_path: Path, run: str, authors_l2: L2) -> None:
    config = json.loads((golden / "config.json").read_text())
    settings = config[run]
    unet = load_adm(golden / settings["init_from"], **{**config["models"]["cifar_like"], "dropout": 0.0}).train()
    objective = DenoisingObjective(DiffusionProcess.cosine(1000), variance="learned_range", vb_scale=1000 / 1000)
    adversary = FreeAdversary(settings["steps"], settings["step_size"], PerDimension(settings["max_norm"]))
    adversary.norm = authors_l2
    optimizer = torch.optim.AdamW(unet.parameters(), **settings["adamw"])
    ema = EMA(list(unet.parameters()), settings["ema_rate"])
    with np.load(golden / f"{run}.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}

    step = 0
    for x0, noise, t in zip(data["x0"], data["noise"], data["t"], strict=True):
        draw = objective.draw(x0, t=t, noise=noise)
        for delta in adversary(draw.x_t, t):
            losses = objective(unet, draw, delta)
            expected = data["delta"][step]
            assert (delta.detach() - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-12
            for name in ("mse", "vb", "loss"):
                expected = data[name][step]
                assert (losses[name].detach() - expected).abs().max() <= 1e-4 * expected.abs().max(), (name, step)
            losses["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            step += 1
    assert step == len(data["delta"]) == settings["iterations"] * settings["steps"]

    def compare(name: str) -> None:
        save_adm(unet, tmp_path / "after.pt")
        state = torch.load(tmp_path / "after.pt", weights_only=True)
        mine, sizes = summary(state), {name: value.numel() for name, value in state.items()}
        with np.load(golden / f"{run}_{name}_after.npz") as file:
            assert set(file.files) == set(mine)
            theirs = {parameter: file[parameter] for parameter in file.files}
        norm = np.sqrt(sum(value[0] ** 2 for value in theirs.values()))
        error = np.sqrt(sum(np.sum((mine[p][2:] - theirs[p][2:]) ** 2) for p in theirs))
        assert error <= 1e-5 * norm
        for parameter, value in theirs.items():
            entries = np.linalg.norm(mine[parameter][2:] - value[2:])
            if parameter in UNDETERMINED:
                assert entries <= 2 * settings["adamw"]["lr"] * step * np.sqrt(len(value) - 2), parameter
            else:
                assert abs(mine[parameter][0] - value[0]) <= 1e-5 * value[0], parameter
                assert entries <= 1e-5 * value[0], parameter
                # |Σ(a − b)| ≤ √n ‖a − b‖: what the tolerance leaves to the sum, which sees the entries after the 24th.
                assert abs(mine[parameter][1] - value[1]) <= 1e-5 * value[0] * np.sqrt(sizes[parameter]), parameter

    compare("params")
    with ema.applied():
        compare("ema")


def test_the_undetermined_biases_are_those_without_effect(golden: Path, tmp_path: Path) -> None:
    """In float64 the output's derivative by them is rounding, and by every other parameter it is not."""
    flags = json.loads((golden / "config.json").read_text())["models"]["cifar_like"]
    unet = load_adm(golden / "adm_cifar_like.pt", **flags).double()
    with np.load(golden / "adm_cifar_like_forward.npz") as file:
        x, t = torch.from_numpy(file["x"]).double(), torch.from_numpy(file["t"])
    output = unet(x, t).sample
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(parameter.grad)
    save_adm(unet, tmp_path / "gradient.pt")  # under ADM's names
    sizes = {name: float(g.norm()) for name, g in torch.load(tmp_path / "gradient.pt", weights_only=True).items()}
    largest = max(sizes.values())
    assert {name for name, size in sizes.items() if size <= 1e-12 * largest} == UNDETERMINED
    assert all(size > 1e-6 * largest for name, size in sizes.items() if name not in UNDETERMINED)
