"""Pipeline folders from strangers: nothing that they name is imported, and no number in them fills memory or time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler

from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError

FILES = {
    "index": "model_index.json",
    "unet": "unet/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@pytest.fixture
def pipeline(make_unet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline folder that is the working folder, with modules in it that leave a mark when they are imported."""
    unet = make_unet((4,), sample_size=4, norm_num_groups=2, attention_head_dim=4)
    folder = tmp_path / "p"
    Model.of(unet, DDPMScheduler()).save(folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\nclass EvilScheduler: pass\n"
    for name in ("evil.py", "pipeline.py", "unet.py", "scheduler.py", "unet/evil.py", "scheduler/evil.py"):
        (folder / name).write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # as `python -m` has it
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return folder


def change(pipeline: Path, part: str, fields: dict[str, Any]) -> None:
    path = pipeline / FILES[part]
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(pipeline: Path) -> None:
    loaded = load_model(pipeline)
    loaded.kind.process()
    loaded.kind.objective()


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("index", {"scheduler": ["evil", "EvilScheduler"]}),
        ("index", {"scheduler": ["evil", "DDPMScheduler"]}),
        ("index", {"scheduler": ["diffusers", "evil.EvilScheduler"]}),
        ("index", {"scheduler": ["diffusers.schedulers.evil", "DDPMScheduler"]}),
        ("index", {"scheduler": ["diffusers", "SchedulerMixin"]}),
        ("index", {"scheduler": ["scheduler", "EvilScheduler"]}),
        ("index", {"unet": ["evil", "Evil"]}),
        ("index", {"unet": ["evil", "UNet2DModel"]}),
        ("index", {"unet": ["unet", "Evil"]}),
        ("index", {"unet": [None, "Evil"]}),
        ("index", {"unet": ["builtins", "eval"]}),
        ("index", {"safety": ["evil", "Evil"]}),
        ("index", {"_class_name": ["evil", "Evil"]}),
        ("index", {"_class_name": ["pipeline", "Evil"]}),
        ("unet", {"_class_name": "Evil"}),
        ("unet", {"_class_name": ["evil", "Evil"]}),
        ("unet", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("unet", {"down_block_types": ["evil.Evil"]}),
        ("unet", {"act_fn": "evil.Evil"}),
    ],
)
def test_what_a_folder_names_is_not_imported(pipeline, part, fields):
    change(pipeline, part, fields)
    with pytest.raises(InputError) as caught:
        load(pipeline)
    assert "\n" not in str(caught.value)
    assert not (pipeline.parent / "ran").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("index", {"_class_name": "EvilPipeline"}),
        ("index", {"_module": "evil", "_custom_pipeline": "evil"}),
        ("unet", {"_module": "evil", "_auto_map": {"": "evil.Evil"}, "_name_or_path": "http://127.0.0.1:9/evil"}),
        ("scheduler", {"_class_name": "EvilScheduler", "_module": "evil"}),
        ("scheduler", {"_class_name": ["evil", "EvilScheduler"]}),
    ],
)
def test_fields_that_only_mean_code_are_without_effect(pipeline, part, fields):
    change(pipeline, part, fields)
    load(pipeline)
    assert not (pipeline.parent / "ran").exists()


def test_the_mark_is_left_when_the_module_is_imported(pipeline):
    __import__("evil")
    assert (pipeline.parent / "ran").exists()


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"layers_per_block": -(10**9)}),
        ("unet", {"block_out_channels": [10**9]}),
        ("unet", {"block_out_channels": [2**62]}),
        ("unet", {"block_out_channels": [4] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"sample_size": 10**9}),
        ("unet", {"num_class_embeds": 10**12}),
        ("unet", {"downsample_padding": 10**9}),
        ("unet", {"time_embedding_dim": 10**12}),
        ("unet", {"act_fn": {"a": [[[]]]}}),
        ("unet", {"norm_eps": float("nan")}),
        ("scheduler", {"num_train_timesteps": 10**9}),
        ("scheduler", {"num_train_timesteps": True}),
        ("scheduler", {"trained_betas": [0.1] * 10**6}),
        ("scheduler", {"trained_betas": [[0.1]]}),
        ("scheduler", {"trained_betas": 5}),
        ("scheduler", {"trained_betas": [float("nan")] * 5}),
        ("scheduler", {"beta_start": 1e308}),
        ("scheduler", {"steps_offset": 10**18}),
        ("scheduler", {"solver_order": 10**9}),
    ],
)
def test_numbers_without_bounds_are_refused(pipeline, part, fields):
    change(pipeline, part, fields)
    with pytest.raises(InputError) as caught:
        load(pipeline)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["CMStochasticIterativeScheduler", "EDMEulerScheduler"])
@pytest.mark.parametrize(
    "fields", [{"num_train_timesteps": 1}, {"sigma_min": 0.0}, {"sigma_max": -1.0}, {"rho": 0.0}, {"sigma_data": 0.0}]
)
def test_levels_that_are_none_are_refused(pipeline, kind, fields):
    change(pipeline, "index", {"scheduler": ["diffusers", kind]})
    (pipeline / FILES["scheduler"]).write_text(json.dumps({"_class_name": kind, **fields}))
    with pytest.raises(InputError) as caught:
        load(pipeline)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES.values())
@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 10**5, '{"a": "\\ud800"}', "null", '"\\u0000"'])
def test_odd_json_is_one_line(robustdiff, pipeline, name, text):
    (pipeline / name).write_text(text)
    outcome = robustdiff("sample", pipeline, "--output", pipeline / "s.npz", "--cpu")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
