"""Respacing strings mean the times that guided-diffusion's functions give."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.samplers.spacing import evenly_spaced, respaced, scheduled, strided


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("5", [0, 250, 500, 749, 999]),
        ("ddim5", [0, 200, 400, 600, 800]),
        ("ddim7", [0, 143, 286, 429, 572, 715, 858]),
        # Thirds of 0 … 299: 2, 3 and 5 times, each section from its first to its last.
        ("2,3,5", [0, 99, 100, 150, 199, 200, 225, 250, 274, 299]),
        # 10 = 4 + 3 + 3: the first sections are longer.
        ("1,1,1", [0, 4, 7]),
    ],
)
def test_known_values(spacing, expected):
    T = {"2,3,5": 300, "1,1,1": 10}.get(spacing, 1000)
    assert respaced(spacing, T).tolist() == expected


def test_a_number_is_its_string_for_iddpm_and_a_stride_for_ddim():
    assert torch.equal(evenly_spaced(10, 1000), respaced("10", 1000))
    assert torch.equal(strided(25, 1000), respaced("ddim25", 1000))
    assert strided(8, 1000).tolist() == [0, 125, 250, 375, 500, 625, 750, 875]


@pytest.mark.parametrize("T", [1, 2, 1000])
def test_a_single_step_is_at_the_noisiest_time(T):
    for times in (evenly_spaced(1, T), strided(1, T), respaced("1", T), scheduled("trailing", 1, T)):
        assert times.tolist() == [T - 1]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_single_step_is_never_at_the_least_noisy_end(spacing, offset):
    """diffusers' DDIM has it there, and returns the noise that it is given."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [offset if spacing == "leading" else 0]
    assert scheduled(spacing, 1, 1000, offset).tolist() == [999]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_multistep_solver_has_the_times_of_diffusers(spacing, steps):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert scheduled(spacing, steps, 1000, left_out=1).tolist() == scheduler.timesteps.flip(0).tolist()


@given(T=st.integers(1, 300), fraction=st.floats(0, 1))
def test_times_are_ascending_and_as_many_as_asked(T, fraction):
    steps = max(1, int(fraction * T))
    for spacing in (evenly_spaced, strided):
        times = spacing(steps, T).tolist()
        assert times == sorted(set(times))
        assert len(times) == steps
        assert times[0] >= 0
        assert times[-1] < T


@pytest.mark.parametrize("spacing", ["", "ddim", "ddim400", "ten", "0", "5,-1", "ddim5,5", "2000", "600,600"])
def test_what_cannot_be_spaced_is_named(spacing):
    with pytest.raises(InputError, match="steps"):
        respaced(spacing, 1000)
