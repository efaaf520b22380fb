"""Latent consistency distillation is that of diffusers' scripts: solver, losses, gradients, updates, samples, LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from robustdiff import DiffusionProcess, LatentConsistencyObjective, sample
from robustdiff.objectives.latent_consistency import boundary_scalings, embed_guidance, solver_times

PREDICTIONS = ("epsilon", "v_prediction")


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "lcm"


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Tensor]:
    return load(folder / "lcd.npz")


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[str, Tensor]:
    return load(folder / "lcm_samples.npz")


@pytest.fixture(scope="module")
def networks(folder: Path) -> dict[str, UNet2DConditionModel]:
    return {
        name: UNet2DConditionModel.from_pretrained(folder / name).requires_grad_(False)
        for name in ("student", "target", "teacher")
    }


@pytest.fixture(scope="module")
def process(folder: Path) -> DiffusionProcess:
    return DiffusionProcess.from_scheduler(DDPMScheduler.from_pretrained(folder / "scheduler"))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def close_gradient(a: Tensor, b: Tensor, metric: str) -> bool:
    """The gradient of "huber" is a sign, so that rounding shows: each sample is compared in ℓ2."""
    if metric == "l2":
        return close(a, b, 1e-4)
    a, b = a.flatten(1), b.flatten(1)
    return bool(((a - b).norm(dim=1) <= 2e-4 * b.norm(dim=1)).all())


def summary(tensors: Any, entries: int = 0) -> Tensor:
    """[ℓ2 norm, sum, first entries, zero-padded] of each tensor."""
    rows = []
    for tensor in tensors:
        flat = tensor.double().flatten()
        first = torch.nn.functional.pad(flat[:entries], (0, max(entries - len(flat), 0)))
        rows.append(torch.stack([flat.norm(), flat.sum(), *first]))
    return torch.stack(rows)


def drawn(objective: LatentConsistencyObjective, data: dict[str, Tensor], N: int) -> Any:
    draw = objective.draw(
        data["latents"],
        t=data[f"N{N}_index"],
        noise=data["noise"],
        w=data["w"],
        encoder_hidden_states=data["prompt_embeds"],
        unconditional={"encoder_hidden_states": data["uncond_prompt_embeds"]},
    )
    draw.w_embedding = data["w_embedding"]
    return draw


def make(networks, process, N=50, prediction="epsilon", **settings) -> LatentConsistencyObjective:
    return LatentConsistencyObjective(
        networks["target"], networks["teacher"], process, N, prediction=prediction, guidance_embedding=32, **settings
    )


@pytest.mark.parametrize("N", [50, 20])
def test_tables(data, process, N):
    times = solver_times(N, 1000)
    assert torch.equal(times, data[f"N{N}_ddim_timesteps"])
    assert close(process.alphas_cumprod.float(), data["alphas_cumprod"])
    before = (times - 1000 // N).clamp_min(0)
    assert close(process.alphas_cumprod[before].float(), data[f"N{N}_ddim_alpha_cumprods_prev"])
    for name, suffix in (("start_timesteps", "_start"), ("timesteps", "")):
        skip, out = boundary_scalings(data[f"N{N}_{name}"].float())
        assert close(skip, data[f"N{N}_c_skip{suffix}"])
        assert close(out, data[f"N{N}_c_out{suffix}"])


def test_embedding(data):
    embedding = embed_guidance(data["w"], 32)
    assert (embedding - data["w_embedding"]).abs().max() <= 1e-3


@pytest.mark.parametrize("N", [50, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_draw(networks, process, data, N, prediction):
    draw = drawn(make(networks, process, N, prediction), data, N)
    key = f"N{N}_{prediction}"
    assert torch.equal(draw.upper, data[f"N{N}_start_timesteps"])
    assert torch.equal(draw.lower, data[f"N{N}_timesteps"])
    assert close(draw.x_next, data[f"N{N}_noisy_latents"])
    assert close(draw.solved, data[f"{key}_x_prev"])
    assert torch.equal(draw.x_t, draw.solved)


@pytest.mark.parametrize("N", [50, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions(networks, process, data, N, prediction):
    objective = make(networks, process, N, prediction)
    draw, key = drawn(objective, data, N), f"N{N}_{prediction}"
    with torch.no_grad():
        assert close(objective._function(networks["student"], draw.x_next, draw.upper, draw), data[f"{key}_model_pred"])
        goal = objective._function(networks["target"], draw.solved, draw.lower, draw)
    assert close(goal, data[f"{key}_target"])
    first = draw.lower == 0
    assert first.any()
    assert torch.equal(goal[first], draw.solved[first])


@pytest.mark.parametrize("N", [50, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("metric", ["l2", "huber"])
def test_losses_and_gradients(networks, process, data, N, prediction, metric):
    student, key = networks["student"].requires_grad_(True), f"N{N}_{prediction}_{metric}"
    target = networks["target"].requires_grad_(True)  # and gets none
    for perturb in ("solver", "student"):
        objective = make(networks, process, N, prediction, metric=metric, perturb=perturb)
        draw = drawn(objective, data, N)
        for name, delta in (("zero", torch.zeros_like(draw.x_t)), ("delta", data[f"delta_{perturb}"].clone())):
            losses = objective(student, draw, delta.requires_grad_(True))["loss"]
            expected = data[f"{key}_loss_per_sample" if name == "zero" else f"{key}_{perturb}_delta_loss_per_sample"]
            assert close(losses.detach(), expected, 1e-4)
            losses.mean().backward()
            assert close_gradient(delta.grad, data[f"{key}_{perturb}_{name}_grad"], metric), (perturb, name)
            if name == "zero":
                assert close(losses.mean().detach(), data[f"{key}_loss"], 1e-4)
                mine = summary(p.grad for p in student.parameters())
                expected = data[f"{key}_student_grad"].double()
                tolerance = 1e-4 if metric == "l2" else 1e-3
                # |Σ(a − b)| ≤ √n ‖a − b‖, of which the sum may have much less left.
                sizes = torch.tensor([p.numel() for p in student.parameters()]).sqrt()
                assert ((mine - expected)[:, 0].abs() <= tolerance * expected[:, 0] + 1e-9).all()
                assert ((mine - expected)[:, 1].abs() <= tolerance * sizes * expected[:, 0] + 1e-9).all()
            student.zero_grad(set_to_none=True)
    assert all(p.grad is None and p.requires_grad for p in target.parameters())
    student.requires_grad_(False), target.requires_grad_(False)


def test_three_updates(folder, process, data, config):
    settings = config["train"]
    networks = {name: UNet2DConditionModel.from_pretrained(folder / name) for name in ("student", "target", "teacher")}
    student, target = networks["student"], networks["target"]
    objective = make(networks, process, settings["num_ddim_timesteps"], decay=settings["ema_decay"])
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings["lr"],
        betas=settings["adam_betas"],
        eps=settings["adam_eps"],
        weight_decay=settings["weight_decay"],
    )
    for k in range(settings["updates"]):
        draw = objective.draw(
            data["train_latents"][k],
            t=data["train_index"][k],
            noise=data["train_noise"][k],
            w=data["train_w"][k],
            encoder_hidden_states=data["train_prompt_embeds"][k],
            unconditional={"encoder_hidden_states": data["uncond_prompt_embeds"]},
        )
        loss = objective(student, draw)["loss"].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        objective.after_update(student)
        assert close(loss.detach(), data["train_loss"][k], 1e-4)
        assert close(norm, data["train_grad_norm"][k], 1e-3)
    for network, name in ((student, "train_student_after"), (target, "train_target_after")):
        mine, expected = summary(network.parameters(), 4), data[name].double()
        sizes = torch.tensor([p.numel() for p in network.parameters()]).sqrt()
        error = (mine - expected).abs()
        assert (error[:, 0] <= 1e-4 * expected[:, 0]).all()
        assert (error[:, 1] <= 1e-4 * sizes * expected[:, 0]).all()
        assert (error[:, 2:].norm(dim=1) <= 1e-3 * expected[:, 0]).all()


@pytest.mark.parametrize("N", [50, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_samples(networks, process, samples, data, N, prediction, steps):
    golden, key = samples, f"{prediction}_N{N}_steps{steps}"
    seen: list[Any] = []
    out = sample(
        networks["student"],
        process,
        sampler="lcm",
        steps=steps,
        latents=golden["xT"],
        step_noise=golden["noise"],
        prediction=prediction,
        solver_steps=N,
        condition={"encoder_hidden_states": data["prompt_embeds"], "timestep_cond": golden["w_embedding"]},
        on_evaluation=seen.append,
    )
    times = [int(one.process.times[one.index[0]]) for one in seen]
    assert times == golden[f"{key}_timesteps"].tolist()
    expected = golden[f"{key}_outputs"]
    for one, state in zip(seen[1:], expected[:-1], strict=True):
        assert close(one.x_t, state)
    assert close(out, expected[-1])
    embedding = embed_guidance(golden["w"].expand(4), 32)
    assert (embedding - golden["w_embedding"]).abs().max() <= 1e-3


def adapted(folder: Path, config: dict[str, Any]) -> tuple[UNet2DConditionModel, dict[str, torch.nn.Parameter]]:
    """The teacher with the adapter, and the adapter's parameters under peft's names."""
    from peft import LoraConfig, set_peft_model_state_dict

    settings = config["lora"]
    network = UNet2DConditionModel.from_pretrained(folder / "teacher").requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["target_modules"])
    )
    state = load_file(folder / "lora" / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    assert not set_peft_model_state_dict(network, state).unexpected_keys
    trained = {f"base_model.model.{name}": p for name, p in network.named_parameters() if p.requires_grad}
    assert list(trained) == settings["parameters"]
    return network, trained


@pytest.mark.parametrize("metric", ["l2", "huber"])
def test_lora(folder, process, data, config, metric):
    pytest.importorskip("peft")
    golden = load(folder / "lora.npz")
    network, trained = adapted(folder, config)

    def teacher(x: Tensor, t: Tensor, **condition: Any) -> Any:
        network.disable_adapters()
        try:
            return network(x, t, **condition)
        finally:
            network.enable_adapters()

    objective = LatentConsistencyObjective(network, teacher, process, 50, metric=metric)
    draw = drawn(objective, data, 50)
    draw.w_embedding = None
    assert close(draw.solved, golden["x_prev"])
    with torch.no_grad():
        assert close(objective._function(network, draw.x_next, draw.upper, draw), golden["model_pred"])
        assert close(objective._function(network, draw.solved, draw.lower, draw), golden["target"])
    for delta in (None, torch.zeros_like(draw.x_t, requires_grad=True)):
        loss = objective(network, draw, delta)["loss"].mean()
        assert close(loss.detach(), golden[f"{metric}_loss"], 1e-4)
        loss.backward()
        mine, expected = summary(p.grad for p in trained.values()), golden[f"{metric}_grad"].double()
        sizes = torch.tensor([p.numel() for p in trained.values()]).sqrt()
        tolerance = 1e-4 if metric == "l2" else 1e-3
        assert ((mine - expected)[:, 0].abs() <= tolerance * expected[:, 0] + 1e-9).all()
        assert ((mine - expected)[:, 1].abs() <= tolerance * sizes * expected[:, 0] + 1e-9).all()
        network.zero_grad(set_to_none=True)
    assert delta.grad.abs().max() > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_samples_with_lora(folder, process, data, samples, config, steps):
    pytest.importorskip("peft")
    golden = load(folder / "lora.npz")
    network, _ = adapted(folder, config)
    out = sample(
        network,
        process,
        sampler="lcm",
        steps=steps,
        latents=samples["xT"],
        step_noise=samples["noise"],
        condition={"encoder_hidden_states": data["prompt_embeds"]},
    )
    assert close(out, golden[f"steps{steps}_output"])
