"""The plugin package that docs/extending.md shows works."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from robustdiff import DiffusionProcess, sample

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return str(re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[0])


def test_the_sampler_of_a_package_is_found_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("robustdiff.samplers.sampler")
    ((group, names),) = tomllib.loads(block("toml"))["project"]["entry-points"].items()
    ((name, module),) = names.items()
    (tmp_path / f"{module}.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name, module, group)
    from robustdiff.samplers.sampler import SAMPLERS

    monkeypatch.setattr(SAMPLERS, "_entries", dict(SAMPLERS._load()))  # a module registers itself once in a process
    monkeypatch.setattr("robustdiff.registry.entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(SAMPLERS, "_loaded", False)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 2, "latents": noise, "step_noise": torch.stack([noise, noise])}
    network = torch.nn.Conv2d(1, 1, 1)

    def model(x, t, class_labels=None):
        return network(x)

    images = [sample(model, DiffusionProcess.cosine(100), sampler=kind, **settings) for kind in (name, "ddim")]
    assert images[0].shape == noise.shape
    assert not torch.equal(*images)
