r"""The process, the parameterisation and the settings of sampling that a checkpoint's diffusers scheduler defines.

    diffusion     any scheduler with ᾱ_t (DDPM, DDIM, Euler, DPM-Solver, …), with its prediction_type
    flow          FlowMatch…, and any with use_flow_sigmas, with any fixed or dynamic shift
    edm           EDMEulerScheduler and EDMDPMSolverMultistepScheduler: a denoiser in Karras et al.'s preconditioning
    consistency   CMStochasticIterativeScheduler
    lcm           LCMScheduler: a latent consistency model over the process of a diffusion model

Euler-like schedulers scale the network's input to x/√(1 + σ²), the variance-preserving point, so the process is the one
with ᾱ_t. (:meth:`DiffusionProcess.from_scheduler` returns the process of ``add_noise`` instead, with α = 1.)

diffusers' EDM schedulers call a denoiser at the time ln σ/4. Denoisers trained by this package use 250 ln σ, the
convention of Song et al. for consistency models and their teachers; their scheduler stores the factor as
``_time_scale``. Schedulers written by this package also have ``_timestep_spacing: own``, with which each sampler uses
its own default spacing. (diffusers preserves fields that begin with an underscore, and ignores them.)

The shift s of a flow (Esser et al., 2024, equation 23) is a number, or with ``use_dynamic_shifting`` a function of the
number of tokens of an image: s = e^μ or, with ``time_shift_type: linear``, s = μ, where μ is on the line through
(``base_image_seq_len``, ``base_shift``) and (``max_image_seq_len``, ``max_shift``), as in the pipelines of Flux and
Stable Diffusion 3. Images of one size have one shift, in the process of training and in the levels of sampling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from robustdiff.backbones.backbone import Backbone
from robustdiff.errors import InputError, first_line, first_mistake
from robustdiff.objectives.consistency import ConsistencyConfig
from robustdiff.objectives.denoising import DenoisingConfig
from robustdiff.objectives.edm import EdmConfig
from robustdiff.objectives.latent_consistency import LatentConsistencyConfig
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import (
    Denoise,
    DiffusionDenoiser,
    OverTimes,
    Preconditioned,
    karras_process,
    karras_sigmas,
)
from robustdiff.process import PREDICTIONS, DiffusionProcess
from robustdiff.samplers.denoiser import DynamicThreshold
from robustdiff.samplers.spacing import scheduled

__all__ = ["Kind", "denoiser_of", "kind_of", "mark_as_own", "model_of", "objective_of", "process_of", "sampling_of"]

Kind = Literal["diffusion", "flow", "edm", "consistency", "lcm"]

_TIME_SCALE = 250.0
_FIXED = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")


def mark_as_own(scheduler: Any) -> Any:
    """Mark a scheduler as written by this package (``_timestep_spacing``, ``_time_scale``), and return it."""
    own: dict[str, Any] = {"_timestep_spacing": "own"}
    if kind_of(scheduler) == "edm":
        own["_time_scale"] = _TIME_SCALE
    scheduler.register_to_config(**own)
    return scheduler


def kind_of(scheduler: Any) -> Kind:
    """Return the kind of model that a scheduler is for.

    Raises:
        InputError: If the kind of model is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name == "CMStochasticIterativeScheduler":
        return "consistency"
    if name == "LCMScheduler":
        return "lcm"
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        return "edm"
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas", False):
        return "flow"
    if hasattr(scheduler, "alphas_cumprod"):
        return "diffusion"
    raise InputError(
        f"the scheduler {name} has no alphas_cumprod and is not one of flow matching, EDM or consistency models: "
        "replace it by the scheduler that the model was trained with, such as DDPMScheduler"
    )


def _sigmas_of(scheduler: Any) -> Tensor:
    config = scheduler.config
    if config.get("sigma_schedule", "karras") != "karras":
        raise InputError(
            f"sigma_schedule={config.sigma_schedule} is not supported: use karras in scheduler_config.json"
        )
    try:
        return karras_sigmas(config.num_train_timesteps, config.sigma_min, config.sigma_max, config.rho)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _incorrect(scheduler, error) from None


def _incorrect(scheduler: Any, error: Exception) -> InputError:
    return InputError(f"{type(scheduler).__name__}: {error}: correct scheduler_config.json")


def _mu_of(scheduler: Any, backbone: Backbone | None) -> float | None:
    """Return the μ of a dynamic shift for the size of a network's input; None if the shift is fixed."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    tokens = None if backbone is None else backbone.tokens
    if tokens is None:
        raise InputError(
            "use_dynamic_shifting=true in scheduler_config.json is for networks of tokens, such as Flux: set a fixed "
            "shift instead"
        )
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    values = [config.get(name) for name in names]
    if not all(type(value) in (int, float) for value in values) or values[2] == values[3]:
        given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise InputError(f"use_dynamic_shifting=true needs a line, and scheduler_config.json has {given}: correct it")
    low, high, first, last = values
    return float(low + (high - low) * (tokens - first) / (last - first))


def _shift_of(scheduler: Any, backbone: Backbone | None) -> float:
    """Return the shift s of a flow-matching scheduler."""
    config, mu = scheduler.config, _mu_of(scheduler, backbone)
    if mu is not None:
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    shift = config.get("shift", config.get("flow_shift"))
    return 1.0 if shift is None else float(shift)


def process_of(scheduler: Any, backbone: Backbone | None = None) -> DiffusionProcess:
    """Return the process of a scheduler, which defines the times of :func:`model_of`.

    Args:
        scheduler: The diffusers scheduler.
        backbone: The network, whose number of tokens defines the shift of a scheduler with dynamic shifting.

    Raises:
        InputError: If the scheduler defines no process, or its table has an invalid noise level.
    """
    config = scheduler.config
    match kind_of(scheduler):
        case "consistency":
            return karras_process(_sigmas_of(scheduler))
        case "edm":
            return OverTimes.process(_sigmas_of(scheduler))
        case "flow":
            if config.get("invert_sigmas", False):
                raise InputError("invert_sigmas=true in scheduler_config.json is not supported: set it to false")
            try:
                T = config.num_train_timesteps
                return DiffusionProcess.flow(T, _shift_of(scheduler, backbone), time_scale=T)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise _incorrect(scheduler, error) from None
    try:
        return DiffusionProcess.from_alphas_cumprod(scheduler.alphas_cumprod)
    except ValueError:
        at = int(((scheduler.alphas_cumprod >= 1) | ~(scheduler.alphas_cumprod >= 0)).nonzero()[0])
        raise InputError(
            f"{type(scheduler).__name__} has ᾱ = {float(scheduler.alphas_cumprod[at]):g} at time {at}, which is no "
            "noisy point: take betas that are all above 0 and below 1"
        ) from None


def objective_of(scheduler: Any, backbone: Backbone) -> ObjectiveConfig:
    """Return the parameterisation of a pipeline's network; 2C output channels mean a learned variance.

    Raises:
        InputError: If the scheduler contradicts the number of channels or the process, or has an unknown setting.
    """
    config, kind = scheduler.config, kind_of(scheduler)
    given = config.get("prediction_type", "epsilon")
    learned = backbone.learned_variance
    if kind in ("consistency", "edm"):
        if kind == "edm" and given != "epsilon":
            raise InputError(f"prediction_type={given} of an EDM scheduler is not supported: only epsilon is")
        levels = {name: config[name] for name in ("sigma_min", "sigma_max", "rho", "sigma_data")}
        try:
            if kind == "edm":
                return EdmConfig(name="edm", levels=config.num_train_timesteps, **levels)
            return ConsistencyConfig(name="consistency", scales=config.num_train_timesteps, **levels)
        except ValidationError as error:
            name = type(scheduler).__name__
            raise InputError(f"{name}: {first_mistake(error)}: correct scheduler_config.json") from None
    if kind == "flow":
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise InputError(f"prediction_type={given} with flow sigmas is not supported: only flow_prediction is")
        return DenoisingConfig(prediction="flow", variance="learned_range" if learned else "fixed")
    if given not in PREDICTIONS or given == "flow":
        known = ", ".join(name for name in PREDICTIONS if name != "flow")
        raise InputError(f"prediction_type={given} of {type(scheduler).__name__} is not supported: {known} are")
    variance = config.get("variance_type")
    if variance not in (None, *_FIXED, "learned_range"):
        raise InputError(f"variance_type={variance} is not supported: {', '.join(_FIXED)} and learned_range are")
    if variance is not None and learned != (variance == "learned_range"):
        raise InputError(
            f"variance_type={variance} does not go with a network of {backbone.channels} input and "
            f"{(1 + learned) * backbone.channels} output channels: set "
            f"{'learned_range' if learned else 'fixed_small'} in scheduler_config.json"
        )
    if given == "epsilon" and not bool((process_of(scheduler).alphas > 0).all()):
        raise InputError(
            "prediction_type=epsilon does not go with zero terminal SNR (rescale_betas_zero_snr), where x_0 does not "
            "follow from the noise: such a model predicts v_prediction; correct scheduler_config.json"
        )
    if kind == "lcm":
        if learned:
            raise InputError("a latent consistency model has no learned variance, and the network has 2C channels")
        steps, scaling = config.original_inference_steps, config.timestep_scaling
        try:
            return LatentConsistencyConfig(prediction=given, solver_steps=steps, timestep_scaling=scaling)
        except ValidationError as error:
            raise InputError(f"LCMScheduler: {first_mistake(error)}: correct scheduler_config.json") from None
    return DenoisingConfig(prediction=given, variance="learned_range" if learned else "fixed")


def model_of(scheduler: Any, network: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pipeline's network for samplers, with the times of :func:`process_of` and the parameterisation of
    :func:`objective_of`."""
    config = scheduler.config
    match kind_of(scheduler):
        case "consistency":
            return Preconditioned(network, config.sigma_data, config.sigma_min)
        case "edm":
            return OverTimes(_preconditioned(scheduler, network))
    return network


def _preconditioned(scheduler: Any, network: Callable[..., Any]) -> Preconditioned:
    config = scheduler.config
    return Preconditioned(network, config.sigma_data, time_scale=config.get("_time_scale", 0.25))


def denoiser_of(scheduler: Any, backbone: Backbone, network: Callable[..., Any] | None = None) -> Denoise:
    """Return a pipeline's network, or a wrapper ``network`` of it, as a denoiser D(x, σ), such as a teacher.

    Raises:
        InputError: If the network is a consistency model or a flow-matching model.
    """
    kind, network = kind_of(scheduler), backbone.bind(backbone.network if network is None else network)
    if kind == "edm":
        return _preconditioned(scheduler, network)
    if kind != "diffusion":
        names = {"flow": "a flow-matching model", "lcm": "a latent consistency model"}
        name = names.get(kind, "a consistency model")
        raise InputError(f"{name} cannot be a teacher: give a diffusion model, or one trained with objective=edm")
    return DiffusionDenoiser(network, process_of(scheduler), objective_of(scheduler, backbone).prediction)


# -- settings of sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TableSpacing:
    """The times of a scheduler: its ``timestep_spacing`` over T discrete times.

    Multistep solvers (those with ``solver_order``) space one more time than they use, and drop the last.
    """

    spacing: Literal["leading", "trailing", "linspace"]
    offset: int = 0
    left_out: int = 0

    def __call__(self, steps: int, T: int) -> Tensor:
        return scheduled(self.spacing, steps, T, self.offset, self.left_out)


@dataclass(frozen=True)
class _FlowSpacing:
    """The levels σ of a flow-matching scheduler, in descending order.

    Attributes:
        scheduler: The scheduler.
        mu: The μ of a dynamic shift; None if the shift is fixed.
        linear: Whether the scheduler is given the levels 1, (S − 1)/S, …, 1/S, which it shifts.
    """

    scheduler: Any
    mu: float | None = field(default=None, repr=False)
    linear: bool = field(default=False, repr=False)

    def __call__(self, steps: int, T: int) -> Tensor:
        scheduler = copy.deepcopy(self.scheduler)
        given: dict[str, Any] = {"num_inference_steps": steps}
        if self.linear and not scheduler.config.get("use_flow_sigmas", False):
            given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if self.mu is not None:
            given["mu"] = self.mu
        try:
            scheduler.set_timesteps(**given)
        except Exception as error:  # the classes differ in the arguments that they take, and check few of them
            raise InputError(
                f"{type(scheduler).__name__} of the checkpoint makes no {steps} levels ({first_line(error)}): use "
                "FlowMatchEulerDiscreteScheduler, or choose a --spacing"
            ) from None
        # Solvers of second order have each level but the first twice.
        sigmas = torch.unique_consecutive(scheduler.sigmas.to(torch.float64))[:steps]
        if not bool(((sigmas > 0) & (sigmas <= 1)).all()):
            raise InputError(
                f"the checkpoint's scheduler has no {steps} levels in (0, 1] to visit: choose another number of steps, "
                "or a --spacing"
            )
        return sigmas


@dataclass(frozen=True)
class _UnknownSpacing:
    """A spacing that is not supported: calling it raises InputError."""

    name: str

    def __call__(self, steps: int, T: int) -> Tensor:
        raise InputError(
            f"the checkpoint's scheduler says {self.name}, a spacing that is not known here: choose one by --spacing, "
            "own, leading, trailing or linspace"
        )


def sampling_of(scheduler: Any, backbone: Backbone | None = None) -> dict[str, Any]:
    """Return a scheduler's settings of sampling for a network, as arguments of :func:`robustdiff.sample`.

    Each setting applies to the samplers that take it. ``clip`` is present only if the scheduler has a setting for
    clipping, and ``spacing`` only if it differs from the samplers' own.
    """
    config, result = scheduler.config, dict[str, Any]()
    if config.get("thresholding", False):
        result["clip"] = DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    elif "clip_sample" in config:
        result["clip"] = float(config.get("clip_sample_range", 1.0)) if config.clip_sample else False
    if kind_of(scheduler) == "lcm":
        result["solver_steps"] = config.original_inference_steps
        result["timestep_scaling"] = config.timestep_scaling
    if config.get("variance_type") in _FIXED:
        result["variance"] = config.variance_type.removesuffix("_log")
    if not config.get("set_alpha_to_one", True) and kind_of(scheduler) == "diffusion":
        result["set_alpha_to_one"] = False
    if config.get("steps_offset"):
        result["steps_offset"] = config.steps_offset
    spacing = _spacing_of(scheduler, backbone)
    if spacing is not None:
        result["spacing"] = spacing
    return result


def _spacing_of(scheduler: Any, backbone: Backbone | None) -> Callable[[int, int], Tensor] | None:
    config, kind = scheduler.config, kind_of(scheduler)
    if config.get("_timestep_spacing") == "own" or kind in ("consistency", "lcm"):
        return None
    if kind == "flow":
        if config.get("stochastic_sampling", False):
            raise InputError("stochastic_sampling=true in scheduler_config.json is not supported: set it to false")
        return _FlowSpacing(scheduler, _mu_of(scheduler, backbone), backbone is not None and backbone.linear_levels)
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(name, False):
            return _UnknownSpacing(f"{name}=true")
    if "original_inference_steps" in config:
        return _UnknownSpacing("original_inference_steps")
    spacing: Any = "linspace" if kind == "edm" else config.get("timestep_spacing")
    if spacing is None:
        return None
    if spacing not in ("leading", "trailing", "linspace"):
        return _UnknownSpacing(f"timestep_spacing={spacing}")
    left_out = int("solver_order" in config and kind != "edm")
    return _TableSpacing(spacing, config.get("steps_offset", 0), left_out)
