"""A run of a second: a tiny UNet on 8×8 digits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robustdiff.recipe import Recipe

TINY = {
    "data": "digits",
    "model": {"channels": [8, 16], "groups": 4, "layers": 1},
    "steps": 6,
    "batch_size": 8,
    "lr": 1e-3,
    "ema": 0.9,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 1000,
}


@pytest.fixture(autouse=True)
def one_thread(no_state_of_accelerate):
    """Run every test on one thread, on which a run is bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path):
    """tiny(name, field=…): the recipe of a run in its own folder; fields as in YAML, {"section": {…}} merged."""

    def recipe(output="run", **fields):
        values = {**TINY, "output": str(tmp_path / output)}
        for name, value in fields.items():
            same = isinstance(value, dict) and value.get("name") != "pretrained"
            if same and isinstance(values.get(name), dict):
                value = {**values[name], **value}
            values[name] = value
        return Recipe.model_validate(values)

    return recipe


@pytest.fixture
def outcome():
    """outcome(recipe): all that a finished run has learned, by name, to compare runs by."""

    def read(recipe):
        folder = Path(recipe.output)
        checkpoint = max((folder / "checkpoints").glob("step-*"))
        tensors = {
            f"model/{name}": value
            for name, value in load_file(folder / "model/unet/diffusion_pytorch_model.safetensors").items()
        }
        for part in ("model", "target", "ema", "optimizer"):
            if (file := checkpoint / f"{part}.safetensors").exists():
                tensors |= {f"{part} now/{name}": value for name, value in load_file(file).items()}
        # Copies: safetensors maps the files, which a test may change.
        return {name: value.clone() for name, value in tensors.items()}

    return read


@pytest.fixture
def tuned(tiny, digits_run):
    """tuned(name, field=…, watch={…}): a fine-tuning of nine updates, in batches of three, which is watched."""

    def recipe(output="run", watch=None, **fields):
        own = {"steps": 9, "checkpoint_every": 3, "adversary": "free", "ema": 0.5}
        own["model"] = {"name": "pretrained", "path": str(digits_run)}
        return tiny(output, **{**own, **fields}, watch={"every": 4, "steps": [2], "num": 40, **(watch or {})})

    return recipe
