"""The three changed lines with other schedulers: DDPM-like, Euler-like, flow matching with a shift, EDM.

DPM-Solver, DEIS and UniPC are for sampling alone: train with `DDPMScheduler.from_config(scheduler.config)`.

What differs is how x_t is made of x_0 and noise, and so what the moved noise is: noise + delta / sigma_t. A process
takes sigma_t from the scheduler; `absorb` takes it from the loop. EDM compares with x_0, in which there is no noise.
Run it: some seconds on a CPU.

    python examples/schedulers.py
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from plug_in import make

from robustdiff import DiffusionProcess, FreeAdversary, absorb

adversary = FreeAdversary(steps=3, step_size=0.1)


def update(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def ddpm(unet, optimizer, loader, scheduler):
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, and timesteps that are whole numbers: DDPM, DDIM, PNDM, LCM."""
    process = DiffusionProcess.from_scheduler(scheduler)
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        noisy = scheduler.add_noise(x0, noise, t)
        for delta in adversary(noisy, t):
            prediction = unet(noisy + delta, t).sample
            yield update(F.mse_loss(prediction, process.absorb(noise, t, delta)), optimizer)


def euler(unet, optimizer, loader, scheduler):
    """x_t = x_0 + σ_t ε, and a network that is given x_t/√(1 + σ_t²): Euler, Euler ancestral, LMS, Heun, KDPM2."""
    process = DiffusionProcess.from_scheduler(scheduler)
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        noisy = scheduler.add_noise(x0, noise, t)
        sigma = process.levels(t, x0)[1]
        for delta in adversary(noisy, t):
            prediction = unet((noisy + delta) / (1 + sigma**2).sqrt(), t).sample
            yield update(F.mse_loss(prediction, process.absorb(noise, t, delta)), optimizer)


def flow_matching(unet, optimizer, loader, scheduler):
    """x_t = (1 − σ) x_0 + σ ε with σ drawn from the scheduler's own, shifted ones: the process of SD3 and Flux."""
    for x0 in loader:
        noise = torch.randn_like(x0)
        index = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        t, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
        sigmas = sigma.reshape(-1, 1, 1, 1)
        noisy = (1 - sigmas) * x0 + sigmas * noise
        for delta in adversary(noisy, t):
            prediction = unet(noisy + delta, t).sample
            yield update(F.mse_loss(prediction, absorb(noise, delta, sigma) - x0), optimizer)


def edm(unet, optimizer, loader, scheduler):
    """x_t = x_0 + σ ε with ln σ ~ N(−1.2, 1.2²), and a preconditioned network whose x̂_0 is compared with x_0."""
    data = scheduler.config.sigma_data
    for x0 in loader:
        noise = torch.randn_like(x0)
        sigma = (1.2 * torch.randn(len(x0)) - 1.2).exp()
        sigmas = sigma.reshape(-1, 1, 1, 1)
        noisy = x0 + sigmas * noise
        weight = (sigmas**2 + data**2) / (sigmas * data) ** 2
        for delta in adversary(noisy):
            inputs = scheduler.precondition_inputs(noisy + delta, sigmas)
            output = unet(inputs, scheduler.precondition_noise(sigma)).sample
            # Outside of the network δ is a constant, so that the ascent is through the network alone.
            denoised = scheduler.precondition_outputs(noisy + delta.detach(), output, sigmas)
            yield update((weight * (denoised - x0) ** 2).mean(), optimizer)


LOOPS = {
    ddpm: DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"),
    euler: EulerDiscreteScheduler(1000),
    flow_matching: FlowMatchEulerDiscreteScheduler(1000, shift=3.0),
    edm: EDMEulerScheduler(),
}


if __name__ == "__main__":
    for loop, scheduler in LOOPS.items():
        losses = list(loop(*make(), scheduler))
        name = loop.__name__.replace("_", " ")
        print(f"{name}: {len(losses)} passes, loss {losses[0]:.3f} → {sum(losses[-10:]) / 10:.3f}")
