"""docs/plug-in.md and examples/schedulers.py: their loops have the perturbations and gradients of our own objectives.

The cells of the page's tables and its blocks of code are run as they stand, around tiny networks.
"""

from __future__ import annotations

import copy
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_dream_and_update_latents
from torch import nn

from robustdiff import DenoisingObjective, DiffusionProcess, FreeAdversary, LatentConsistencyObjective, absorb
from robustdiff.objectives.edm import EDMObjective
from robustdiff.objectives.latent_consistency import boundary_scalings

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = (EXAMPLES.parent / "docs" / "plug-in.md").read_text(encoding="utf-8")
ADVERSARY = FreeAdversary(steps=3, step_size=0.3)


def rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table whose header ends so, by their first cell; code without its quotes."""
    (table,) = re.findall(rf"^\| your loop \|.*\| {heading} \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
    return {first.strip("| "): rest for first, *rest in cells}


def code(word: str) -> str:
    """Return the block of code with a word that no other has."""
    (block,) = (block for block in re.findall(r"^```py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if word in block)
    return block


class Network(nn.Module):
    """Imitate a network of diffusers, with a Jacobian that is not symmetric."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(2, 8, 3, padding=1).double(), nn.Conv2d(8, 2, 3, padding=1).double()
        self.sign = sign

    def forward(self, x: torch.Tensor, t: Any = None, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.sign * self.last(torch.tanh(self.first(x))))


def tensors(n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(n)]


class Passes:
    """Act as an adversary and an optimiser, and keep each δ and the gradients at its update, which is made too."""

    def __init__(self, network: nn.Module, adversary: FreeAdversary = ADVERSARY) -> None:
        self.parameters = list(network.parameters())
        self.sgd = torch.optim.SGD(self.parameters, 0.1)
        self.ascents, self.found = adversary, list[torch.Tensor]()

    def adversary(self, *points: torch.Tensor) -> Any:
        for delta in self.ascents(*points):
            self.found.append(delta.detach())
            yield delta

    def step(self) -> None:
        self.found += [p.grad.clone() for p in self.parameters if p.grad is not None]
        self.sgd.step()

    def zero_grad(self) -> None:
        self.sgd.zero_grad()


def of_objective(
    objective: Any, draw: Any, network: nn.Module, name="loss", weight=1.0, step=0.3
) -> list[torch.Tensor]:
    """Return what the package's objective makes, with a weight for each sample."""
    passes = Passes(network, FreeAdversary(steps=3, step_size=step))
    for delta in passes.adversary(draw.x_t):
        (weight * objective(network, draw, delta)[name]).mean().backward()
        passes.step()
        passes.zero_grad()
    return passes.found


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 3 * 5
    assert any(delta.abs().sum() > 0.1 for delta in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the two tables


def of_row(call: str, prediction: str, target: str, variables: dict[str, Any]) -> list[torch.Tensor]:
    """Return what a loop with the expressions of a row makes."""
    network, passes = variables["network"], Passes(variables["network"])
    names = {"absorb": absorb, **variables}
    for delta in passes.adversary(variables["noisy"]):
        names["delta"] = delta
        names["prediction"] = network(eval(call, names), variables["t"]).sample
        F.mse_loss(eval(prediction, names), eval(target, names)).backward()
        passes.step()
        passes.zero_grad()
    return passes.found


def over_times(scheduler: Any, prediction: Any, weight: str | None = None, sign: float = 1.0) -> tuple[Any, ...]:
    """Return, for a scheduler with ᾱ_t, the variables of its loop, and the objective with its draw and its weights."""
    (x0, noise), t = tensors(), torch.tensor([10, 300, 600, 990])
    process = DiffusionProcess.from_scheduler(scheduler)
    noisy = scheduler.add_noise(x0, noise, t)
    objective = DenoisingObjective(process, prediction)
    variables = {"x0": x0, "noise": noise, "t": t, "noisy": noisy, "noise_scheduler": scheduler, "process": process}
    of_x0 = process.levels(t, x0)[1].flatten() ** 2 if weight else 1.0
    return variables, objective, objective.draw(x0, t, noise), {"weight": of_x0}, sign


def euler() -> tuple[Any, ...]:
    """At one time, at which x_t is longer than that of DDPM by one factor for all samples."""
    (x0, noise), t, scheduler = tensors(), torch.full((4,), 300), EulerDiscreteScheduler(1000)
    process = DiffusionProcess.from_scheduler(scheduler)
    sigma = process.levels(t, x0)[1]
    variables = {"x0": x0, "noise": noise, "t": t, "process": process, "sigma": sigma}
    objective = DenoisingObjective(DiffusionProcess.from_scheduler(DDPMScheduler.from_config(scheduler.config)))
    longer = float((1 + sigma[0] ** 2).sqrt())
    draw = objective.draw(x0, t, noise)
    return {**variables, "noisy": x0 + sigma * noise}, objective, draw, {"step": 0.3 / longer}, 1.0


def flow(weight: bool = False, sign: float = 1.0, reverse: bool = False) -> tuple[Any, ...]:
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    (x0, noise), index = tensors(), torch.tensor([10, 300, 600, 990])
    process = DiffusionProcess.from_scheduler(scheduler)
    sigma = process.sigmas[index]
    sigmas = sigma.reshape(-1, 1, 1, 1)
    variables = {"x0": x0, "noise": noise, "t": index, "noisy": (1 - sigmas) * x0 + sigmas * noise}
    objective = DenoisingObjective(process, "flow")
    draw = objective.draw(x0, index, noise)
    of_x0 = sigma**2 if weight else 1.0
    if reverse:
        sigma, sigmas = 1 - sigma, 1 - sigmas
    return {**variables, "sigma": sigma, "sigmas": sigmas}, objective, draw, {"weight": of_x0}, sign


def edm() -> tuple[Any, ...]:
    x0, noise = tensors()
    sigma = torch.tensor([0.05, 0.3, 1.0, 9.0], dtype=torch.float64)
    sigmas = sigma.reshape(-1, 1, 1, 1)
    variables = {"x0": x0, "noise": noise, "t": sigma, "sigmas": sigmas, "noisy": x0 + sigmas * noise}
    objective = EDMObjective()
    draw = objective.draw(x0, sigma, noise)
    return {**variables, "noise_scheduler": EDMEulerScheduler()}, objective, draw, {"name": "mse"}, 1.0


V = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
TARGETS = {
    "predicts ε: DDPM, DDIM, PNDM, LCM": lambda: over_times(DDPMScheduler(), "epsilon"),
    "predicts v": lambda: over_times(DDPMScheduler(**V), "v_prediction"),
    "predicts x_0": lambda: over_times(DDPMScheduler(prediction_type="sample"), "sample"),
    "Euler, Euler ancestral, Heun, LMS, KDPM2, predicting ε": euler,
    "flow matching: Stable Diffusion 3, Flux": flow,
    "flow matching that predicts x_0 − ε: Ideogram 4": lambda: flow(sign=-1.0),
    "the same with x_t = (1 − σ) ε + σ x_0: Lumina 2": lambda: flow(sign=-1.0, reverse=True),
}
CONVERTED = {
    "flow matching: Stable Diffusion 3": lambda: flow(weight=True),
    "predicts v: CogVideoX": lambda: over_times(CogVideoXDDIMScheduler(**V), "v_prediction", "of x0"),
    "EDM": edm,
}


def expected_of(objective: Any, draw: Any, arguments: dict[str, Any], sign: float) -> list[torch.Tensor]:
    """Return the objective's own, of a network with the sign of its parameterisation; δ in the unit of the loop."""
    network = Network(sign)
    found = of_objective(objective, draw, network, **arguments)
    unit = 0.3 / arguments.get("step", 0.3)
    return [unit * x if x.shape == draw.x_t.shape else x for x in found]


@pytest.mark.parametrize("name", rows("the target"))
def test_a_target_of_the_table_is_that_of_the_objective(name):
    variables, objective, draw, arguments, sign = TARGETS[name]()
    call, target = rows("the target")[name]
    found = of_row(call, "prediction", target, {**variables, "network": Network()})
    agree(found, expected_of(objective, draw, arguments, sign))


@pytest.mark.parametrize("name", rows("x̂_0"))
def test_a_conversion_of_the_table_is_that_of_the_objective(name):
    variables, objective, draw, arguments, sign = CONVERTED[name]()
    call, converted = rows("x̂_0")[name]
    found = of_row(call, converted, "x0", {**variables, "network": Network()})
    agree(found, expected_of(objective, draw, arguments, sign))


@pytest.mark.parametrize("name", ["flow matching: Stable Diffusion 3", "predicts v: CogVideoX"])
def test_without_detach_the_ascent_is_that_of_the_whole_loss(name):
    variables, objective, draw, arguments, sign = CONVERTED[name]()
    call, converted = rows("x̂_0")[name]
    found = of_row(call, converted.replace(".detach()", ""), "x0", {**variables, "network": Network()})
    with pytest.raises(AssertionError):
        agree(found, expected_of(objective, draw, arguments, sign))
    objective.through_target = True
    agree(found, expected_of(objective, draw, arguments, sign))


# ---------------------------------------------------------------------------------------------- the blocks of code


class GuidedDiffusion:
    """guided-diffusion's interface, with the loss of ε."""

    def __init__(self) -> None:
        self.alphas_cumprod = DiffusionProcess.linear().alphas_cumprod.numpy()

    def q_sample(self, x0, t, noise):
        levels = torch.from_numpy(self.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        return levels.sqrt() * x0 + (1 - levels).sqrt() * noise

    def training_losses(self, model, x0, t, model_kwargs=None, noise=None):
        error = noise - model(self.q_sample(x0, t, noise), t, **(model_kwargs or {})).sample
        return {"loss": error.square().flatten(1).mean(1)}


def test_a_loss_that_makes_x_t_itself_has_the_objectives_gradients():
    (x0, _), network = tensors(), Network()
    passes = Passes(network)
    names = {
        "diffusion": GuidedDiffusion(),
        "x0": x0,
        "model": network,
        "torch": torch,
        "DiffusionProcess": DiffusionProcess,
    }
    names |= {"adversary": passes.adversary, "optimizer": passes}
    exec(code("training_losses("), names)
    objective = DenoisingObjective(DiffusionProcess.linear())
    agree(passes.found, of_objective(objective, objective.draw(x0, names["t"], names["noise"]), Network()))
    assert not network._forward_pre_hooks


def test_k_diffusions_loss_has_the_gradients_of_the_edm_objective():
    (hook,) = re.findall(r"hook = model(\.register_forward_pre_hook\(.*\))\n", PAGE)
    (x0, noise), network = tensors(), Network()
    sigma = torch.tensor([0.05, 0.3, 1.0, 9.0], dtype=torch.float64)

    def loss(inner_model, x0, noise, sigma):
        s = sigma.reshape(-1, 1, 1, 1)
        size, x = (s**2 + 0.25).sqrt(), x0 + noise * s
        target = (x0 - 0.25 / size**2 * x) / (0.5 * s / size)
        return (inner_model(x / size, sigma).sample - target).square().flatten(1).mean(1)

    passes = Passes(network)
    for delta in passes.adversary(x0 + sigma.reshape(-1, 1, 1, 1) * noise):
        added = eval("network" + hook, {"network": network, "delta": delta})
        loss(network, x0, absorb(noise, delta, sigma), sigma).mean().backward()
        added.remove()
        passes.step()
        passes.zero_grad()
    objective = EDMObjective()
    agree(passes.found, of_objective(objective, objective.draw(x0, sigma, noise), Network()))


@pytest.mark.parametrize("shared", [False, True])
def test_a_script_of_lcm_has_the_gradients_of_the_students_variant(shared):
    process, network = DiffusionProcess.linear(), Network()
    x0, noise = tensors()
    other = copy.deepcopy(network)

    def own(student):
        target = student if shared else other
        arguments = {"guidance": (0.0, 0.0), "metric": "l2", "perturb": "student"}
        objective = LatentConsistencyObjective(target, other, process, **arguments)
        return objective, objective.draw(x0, t=torch.tensor([3, 20, 30, 49]), noise=noise)

    student = Network()
    objective, draw = own(student)
    expected = of_objective(objective, draw, student)
    other.requires_grad_(False)
    passes = Passes(network)

    def get_predicted_original_sample(output, t, x):
        return process.split("epsilon", x, t, output)[0]

    def scalings(t):
        return [values.reshape(-1, 1, 1, 1) for values in boundary_scalings(t.double())]

    (c_skip_start, c_out_start), (c_skip, c_out) = scalings(draw.upper), scalings(draw.lower)
    names = {"adversary": passes.adversary, "optimizer": passes, "noisy_model_input": draw.x_next}
    names |= {"start_timesteps": draw.upper, "timesteps": draw.lower, "x_prev": draw.solved, "unet": network}
    names |= {"c_skip_start": c_skip_start, "c_out_start": c_out_start, "c_skip": c_skip, "c_out": c_out}
    names |= {"get_predicted_original_sample": get_predicted_original_sample, "torch": torch, "F": F}
    block = code("get_predicted_original_sample(")
    exec(block if shared else block.replace("unet(x_prev", "target_unet(x_prev"), {**names, "target_unet": other})
    agree(passes.found, expected)


@pytest.mark.usefixtures("no_state_of_accelerate")
@pytest.mark.parametrize(("done", "updates", "kept"), [(0, 30, [5, 10, 15, 20, 25, 30]), (12, 18, [15, 20, 25, 30])])
def test_a_script_of_diffusers_stops_saves_and_resumes_where_it_should(done, updates, kept):
    """30 updates, 12 in an epoch of 4 batches; a run that goes on from the end of the first epoch."""
    accelerator, saved, steps = Accelerator(cpu=True), [], []
    network, optimizer, loader = accelerator.prepare(
        Network().float(),
        torch.optim.SGD(Network().parameters(), 0.1),
        torch.utils.data.DataLoader(torch.randn(8, 2, 4, 4), 2),
    )
    scheduler = DDPMScheduler()
    names = {
        "args": SimpleNamespace(gradient_accumulation_steps=1, max_train_steps=30, checkpointing_steps=5),
        "global_step": done,
        "train_dataloader": loader,
        "encode": lambda batch: batch.bfloat16(),
        "noise_scheduler": scheduler,
        "process": DiffusionProcess.from_scheduler(scheduler),
        "adversary": ADVERSARY,
        "accelerator": accelerator,
        "unet": network,
        "optimizer": optimizer,
        "lr_scheduler": SimpleNamespace(step=lambda: steps.append(1)),
        "save": saved.append,
        "math": math,
        "torch": torch,
        "F": F,
    }
    exec(code("num_update_steps_per_epoch"), names)
    assert names["global_step"] == 30
    assert len(steps) == updates
    assert saved == kept


def test_accumulation_under_accelerate_is_that_of_the_example():
    """Which test_examples.py runs."""
    plugin = code("GradientAccumulationPlugin").splitlines()[0].removeprefix("plugin = ")
    assert plugin in (EXAMPLES / "plug_in.py").read_text(encoding="utf-8")


def test_the_target_of_dream_is_the_noise_of_its_point():
    scheduler, (x0, noise), t = DDPMScheduler(), tensors(), torch.tensor([10, 300, 600, 990])
    noisy = scheduler.add_noise(x0, noise, t)
    moved, target = compute_dream_and_update_latents(Network(), scheduler, t, noise, noisy, noise, torch.zeros(4, 1, 1))
    assert not torch.allclose(moved, noisy)
    torch.testing.assert_close(scheduler.add_noise(x0, target, t), moved)


# ------------------------------------------------------------------------------------------- examples/schedulers.py


def drawn(name: str, scheduler: Any, x0: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    """Return the objective of a loop, its draw of what the loop drew, and its weights."""
    noise = torch.randn_like(x0)
    if name == "edm":
        objective, t = EDMObjective(), (1.2 * torch.randn(1) - 1.2).exp().double()
        return objective, objective.draw(x0, t, noise), {}
    t, arguments = torch.randint(1000, (1,)), {}
    if name == "euler":
        longer = float((1 + DiffusionProcess.from_scheduler(scheduler).sigmas[t] ** 2).sqrt())
        scheduler, arguments = DDPMScheduler.from_config(scheduler.config), {"step": 0.3 / longer}
    objective = DenoisingObjective(
        DiffusionProcess.from_scheduler(scheduler), "flow" if name == "flow_matching" else "epsilon"
    )
    return objective, objective.draw(x0, t, noise), arguments


@pytest.mark.parametrize("name", ["ddpm", "euler", "flow_matching", "edm"])
def test_a_loop_of_the_example_is_that_of_the_objective(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "schedulers.py"))
    loop, network, x0 = example[name], Network(), tensors()[0][:1]
    passes = Passes(network)
    loop.__globals__["adversary"] = passes.adversary
    torch.manual_seed(0)
    assert len(list(loop(network, passes, [x0], example["LOOPS"][loop]))) == 3
    torch.manual_seed(0)
    agree(passes.found, expected_of(*drawn(name, example["LOOPS"][loop], x0), 1.0))
