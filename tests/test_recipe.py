"""Recipes: what is given by name, what is overridden, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.objectives.objective import OBJECTIVES
from robustdiff.perturbation import ADVERSARIES, AdversaryConfig
from robustdiff.recipe import DataConfig, Recipe, load_data_config, load_recipe, shipped_recipes
from robustdiff.yaml_reader import parse_yaml


def test_a_watch_is_switched_by_a_truth_value() -> None:
    on, off = (Recipe.model_validate({"data": "digits", "watch": watch}).watch for watch in (True, False))
    assert off is None
    assert on == Recipe.model_validate({"data": "digits", "watch": {}}).watch is not None


def test_without_an_adversary_its_settings_are_dropped() -> None:
    recipe = Recipe.model_validate({"data": "digits", "adversary": {"name": "none", "step_size": 5.0, "ramp": 5}})
    assert recipe.adversary.model_dump() == {"name": "none"}


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    """The message of a recipe that is wrong."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(str(path), overrides)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "--set" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_is_its_own_yaml(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(str(path))
    assert again.model_dump() == recipe.model_dump()
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize(
    ("gpu", "instructions", "precision"),
    [
        ((8, 0), {}, "bf16"),
        ((7, 5), {"avx512_bf16": True}, "fp32"),
        (None, {"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        (None, {"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        (None, {"avx512_f": True, "avx2": True}, "fp32"),
    ],
)
def test_the_precision_is_that_of_the_device_unless_named(gpu, instructions, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    recipe = load_recipe("fashion-16-at")
    assert recipe.precision == precision
    assert yaml.safe_load(recipe.to_yaml())["precision"] == precision
    assert load_recipe("fashion-16-at", ["precision=fp16"]).precision == "fp16"
    assert Recipe().precision == "fp32"


def test_the_precision_is_single_where_torch_does_not_know_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert Recipe(precision="auto").precision == "fp32"


def test_what_is_left_to_the_checkpoint_stays_so_in_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: pretrained, path: fashion-16}\nobjective: {input_perturbation: 0.1}\n")
    recipe = load_recipe(str(path))
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)).objective.model_fields_set == {"input_perturbation"}
    assert load_recipe(str(path)) == recipe


def test_an_objective_over_levels_is_written_whole(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: pretrained, path: fashion-16}\nobjective: {name: consistency, scales: 40}\n")
    path.write_text(load_recipe(str(path)).to_yaml())
    written = yaml.safe_load(path.read_text())["objective"]
    assert (written["scales"], written["decay"], written["sigma_max"]) == (40, 0.95, 80.0)


def test_an_objective_is_the_denoising_loss_unless_named(tmp_path):
    kinds = {"{prediction: epsilon}": "denoising", "denoising": "denoising", "edm": "edm", "consistency": "consistency"}
    for text, name in kinds.items():
        (tmp_path / "r.yaml").write_text(f"objective: {text}\n")
        assert load_recipe(str(tmp_path / "r.yaml")).objective.name == name
    recipe = load_recipe("fashion-16-consistency", ["objective.scales=40", "objective.perturb=student"])
    assert (recipe.objective.scales, recipe.objective.perturb, recipe.objective.name) == (40, "student", "consistency")


def test_an_empty_recipe_is_all_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert (recipe.data.name, recipe.model.name, recipe.adversary.name) == ("fashion-16", "unet", "none")
    assert (recipe.sampler.name, recipe.sampler.steps) == (None, None)
    assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.seed) == (1000, 128, 1e-4, 0)
    assert recipe.process is None, "cosine, or the checkpoint's"
    assert recipe.objective is None, "ε-prediction, or the checkpoint's"


def test_numbers_without_a_point_are_numbers(tmp_path):
    """YAML 1.1 takes 1e-4 for a string."""
    (tmp_path / "r.yaml").write_text("lr: 1e-4\nadversary: {name: free, radius: {eta: 1e-1}}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["adversary.step_size=5e-1", "steps=1e3"])
    assert (recipe.lr, recipe.adversary.step_size, recipe.steps) == (1e-4, 0.5, 1000)
    assert recipe.adversary.radius.eta == 0.1
    (tmp_path / "r.yaml").write_text("adversary: {name: free, radius: 2.5e3, step_size: .5e-1}\nsteps: 1.E+3\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["betas=[9e-1, 9.9E-1]", "lr=+1e-4"])
    assert (recipe.adversary.radius.value, recipe.adversary.step_size, recipe.steps) == (2500.0, 0.05, 1000)
    assert (recipe.betas, recipe.lr) == ((0.9, 0.99), 1e-4)


@pytest.mark.parametrize("text", ["'2024'", '"1e5"', "1e5", "1E+05", "1_0e3"])
def test_text_that_looks_like_a_number_is_text(tmp_path, text):
    plain = text.strip("'\"")
    (tmp_path / "r.yaml").write_text(f"output: {text}\n")
    assert load_recipe("digits", [f"output={text}"]).output == plain
    assert load_recipe("digits", changes={"output": plain}).output == plain
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.output == plain
    (tmp_path / "written.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "written.yaml")) == recipe


def test_a_number_in_the_place_of_text_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"output: .*string: put quotes around it.*--set \"output='…'\""):
        load_recipe("digits", ["output=2024"])


def test_keys_that_look_like_numbers_with_exponents_are_names():
    values = parse_yaml("{1e-4: 1e-4, x: '1e-4', y: [1e2, 1e, 0x1e2]}", "a text")
    assert values == {"1e-4": 1e-4, "x": "1e-4", "y": [100.0, "1e", 482]}
    with pytest.raises(InputError, match="given twice"):
        parse_yaml("{1e-4: 1, '1e-4': 2}", "a text")
    with pytest.raises(InputError, match="a number of 103 characters"):
        parse_yaml("1" * 100 + "e99", "a text")


@pytest.mark.parametrize("text", ["010", "-007", "1:30", "1:30.5", "0_1"])
def test_numbers_in_another_base_are_refused(text):
    """YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    with pytest.raises(InputError, match=r"in base (8|60) .* without leading zeros, or text in quotes"):
        load_recipe("digits", [f"seed={text}"])
    assert parse_yaml(f"'{text}'", "a text") == text


def test_the_shipped_recipes_are_there():
    assert {"fashion-16", "fashion-16-at", "digits", "fashion-mnist"} <= set(shipped_recipes())


def test_fine_tunings_have_a_falling_rate_but_for_those_with_the_settings_of_others():
    constant = set()
    for name in shipped_recipes():
        recipe = load_recipe(name)
        distils = recipe.objective is not None and "consistency" in recipe.objective.name
        if recipe.model.name == "pretrained" and not distils and recipe.lr_schedule == "constant":
            constant.add(name)
    assert constant == {"cifar10-adm", "imagenet64-adm", "sd15-at-lora", "flux-at-lora"}


def test_the_recipe_of_the_results_is_measured_with_the_sampler_for_which_it_lowers_fid():
    recipe = load_recipe("fashion-16-at")
    assert (recipe.sampler.name, recipe.sampler.steps) == ("iddpm", 10)
    assert (recipe.watch.samplers, recipe.watch.steps) == ((), (10, 50))  # that of the recipe


def test_a_section_may_be_a_name(tmp_path):
    (tmp_path / "r.yaml").write_text("data: digits\nadversary: free\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.data.name == "digits"
    assert recipe.adversary.name == "free"
    assert recipe.adversary.steps == 3


def test_overrides_reach_into_sections_and_apply_in_order():
    recipe = load_recipe(
        "fashion-16-at",
        ["adversary.step_size=0.25", "lr=1e-5", "adversary=random", "steps=7", "steps=8", "data.name=digits"],
    )
    assert recipe.adversary.name == "random"
    assert recipe.adversary.step_size == 0.25
    assert (recipe.lr, recipe.steps, recipe.data.name) == (1e-5, 8, "digits")


def test_an_override_reaches_into_a_section_given_by_its_name(tmp_path):
    (tmp_path / "r.yaml").write_text("data: imagefolder\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["data.root=photos", "data.size=32"])
    assert (recipe.data.name, recipe.data.root, recipe.data.size) == ("imagefolder", "photos", 32)


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        ("2.5", {"value": 2.5}),
        ("{eta: 0.1}", {"eta": 0.1}),
        ("{eta: 0.1, sampler_steps: 50}", {"eta": 0.1, "sampler_steps": 50}),
        ("{eta: 0.1, by_noise: true}", {"eta": 0.1, "by_noise": True}),
        ("{value: 1, within: [0, 0.5]}", {"value": 1.0, "within": (0.0, 0.5)}),
    ],
)
def test_the_forms_of_a_radius(radius, expected):
    recipe = load_recipe("digits", [f"adversary.radius={radius}"])
    assert recipe.adversary.radius is not None
    unset = {"value": None, "eta": None, "sampler_steps": None, "by_noise": False, "within": None}
    assert recipe.adversary.radius.model_dump() == unset | expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", ["learning_rate", "lr"]),
        ("adversary: {name: free, alpha: 1}\n", ["adversary.alpha", "step_size"]),
        ("objective: {loss: 1}\n", ["objective.loss", "prediction"]),
        ("objective: {name: edm, prediction: epsilon}\n", ["unknown field objective.prediction", "levels"]),
        ("objective: {name: consistency, levels: 10}\n", ["unknown field objective.levels", "scales"]),
        ("objective: diffusion\n", ["objective", "consistency, denoising, edm"]),
        ("objective: 3\n", ["objective", "consistency, denoising, edm"]),
        ("objective: {name: edm, sigma_min: 90}\n", ["objective: ", "sigma_min 90", "sigma_max 80"]),
        ("objective: {name: edm, std: 0}\n", ["objective.std"]),
        ("objective: {name: consistency, metric: l3}\n", ["objective.metric", "pseudo-huber"]),
        ("objective: {name: consistency, decay: 1}\n", ["objective.decay"]),
        ("objective: {name: consistency, schedule: growing}\n", ["start_scales"]),
        ("objective: {name: consistency, start_scales: 4}\n", ["start_scales", "growing"]),
        ("objective: {name: consistency, schedule: growing, start_scales: 40}\n", ["start_scales 40", "18"]),
        (
            "objective: {name: consistency, schedule: growing, start_scales: 2}\n"
            "adversary: {name: free, radius: {eta: 0.1, by_noise: true}}\n",
            ["by_noise", "schedule=fixed"],
        ),
        ("objective: {name: consistency, scales: 100001}\n", ["objective.scales", "100000"]),
        ("objective: {name: edm, levels: 100001}\n", ["objective.levels", "100000"]),
        ("objective: {name: consistency, solver: euler}\n", ["solver", "objective.teacher"]),
        ("objective: {name: edm, teacher_below: 2}\n", ["teacher_below", "objective.teacher"]),
        ("objective: {name: consistency, mean: 0}\n", ["mean", "objective.times=log-normal"]),
        ("objective: {name: consistency, std: 1}\n", ["std", "objective.times=log-normal"]),
        ("adversary: {name: free, radius: {etta: 1}}\n", ["adversary.radius.etta", "eta"]),
        ("adversary: strong\n", ["adversary.name"]),
        ("adversary: {step_size: 0.5}\n", ["adversary.step_size is set and adversary.name is not", "free"]),
        ("adversary: {name: free, radius: {by_noise: true}}\n", ["radius.by_noise needs radius.eta"]),
        ("sampler: nope\n", ["sampler.name", "nope", "ddim"]),
        ("watch: {steps: 5}\n", ["watch.steps", "give a list", "'[5]'"]),
        ('watch: {steps: "\\e[31m"}\n', ["watch.steps", r"'[\x1b[31m]'"]),
        ("watch: {steps: " + "x" * 1000 + "}\n", ["watch.steps", "[" + "x" * 100 + "]"]),
        ("data: {name: imagefolder, root: ''}\n", ["data.root", "an empty path is the working folder"]),
        ("adversary: {name: free, radius: 1e60}\n", ["adversary.radius.value", "less than"]),
        ("adversary: {name: free, radius: {eta: 1e60}}\n", ["adversary.radius.eta", "less than"]),
        ("trackers: wandb\n", ["trackers", "give a list", "'[wandb]'"]),
        ("steps: 0\n", ["steps"]),
        ("lr: -1\n", ["lr"]),
        ("ema: 1.0\n", ["ema", "[0, 1)", "auto", "1.0"]),
        ("ema: -0.1\n", ["ema", "-0.1"]),
        ("ema: automatic\n", ["ema", "auto", "automatic"]),
        ("ema: .nan\n", ["ema", "nan"]),
        ("ema: null\n", ["ema", "auto"]),
        ("ema: [0.9]\n", ["ema", "auto"]),
        ("batch_size: 7\naccumulate: 2\n", ["batch_size", "accumulate"]),
        ("adversary: {name: free, ramp: 10}\n", ["ramp", "radius"]),
        ("adversary: {name: free, radius: {value: 1, eta: 0.1}}\n", ["radius"]),
        ("adversary: {name: free, radius: {sampler_steps: 50}}\n", ["radius"]),
        (
            "adversary: {name: free, radius: {eta: 0.1, by_noise: true}}\n"
            "objective: {name: consistency, schedule: growing, start_scales: 2}\n",
            ["by_noise"],
        ),
        (
            "adversary: {name: free, radius: {value: 1.0, within: [0, 1]}}\n"
            "objective: {name: consistency, schedule: growing, start_scales: 2}\n",
            ["within", "schedule=fixed"],
        ),
        ("adversary: {name: free, radius: {value: 1.0, by_noise: true}}\n", ["by_noise"]),
        ("adversary: {name: free, radius: {value: 1.0, within: [0.5, 0.1]}}\n", ["within", "0.5, 0.1"]),
        ("model: pretrained\n", ["model.path"]),
        ("model: {name: unet, path: x}\n", ["model.path"]),
        ("model: {channels: [10], groups: 4}\n", ["model.channels", "groups"]),
        ("model: {channels: []}\n", ["model.channels"]),
        ("model: {channels: [-32]}\n", ["model.channels"]),
        ("lr: .inf\n", ["lr", "finite"]),
        ("lr: .nan\n", ["lr"]),
        ("adversary: {name: free, step_size: .inf}\n", ["adversary.step_size", "finite"]),
        ("adversary: {name: free, radius: .nan}\n", ["adversary.radius"]),
        ("adversary: 3\n", ["adversary"]),
        ("data: [digits]\n", ["data"]),
        ("data: {1: 2}\n", ["data.1"]),
        ('"two\\nlines": 1\n', ["two lines"]),
        ("model: {channels: [8, 8], groups: 4, attention: [true]}\n", ["model.attention"]),
        ("- a\n- b\n", ["mapping"]),
        ("data: [\n", ["not YAML"]),
        ("data: !!python/object/apply:os.getcwd []\n", ["not YAML"]),
    ],
)
def test_a_mistake_is_named(tmp_path, text, words):
    message = mistake(tmp_path, text)
    for word in words:
        assert word in message


def test_no_code_in_a_recipe_runs(tmp_path):
    bait = tmp_path / "ran"
    code = f'!!python/object/apply:os.system ["touch {bait}"]'
    assert "os.system" in mistake(tmp_path, f"data: {code}\n")
    assert "os.system" in mistake(tmp_path, "data: digits\n", f"data={code}")
    assert not bait.exists()
    yaml.unsafe_load(code)
    assert bait.exists(), "it would have"


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00data")
    with pytest.raises(InputError, match=r"r\.yaml: not YAML"):
        load_recipe(str(tmp_path / "r.yaml"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
# Two NaN are distinct keys of a dictionary and one key of a YAML mapping.
KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "steps", "radius", "eta", "value", "path"]) | KEYS, inner)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*Recipe.model_fields, "other"]), value=VALUES)
def test_any_value_is_valid_or_named_in_one_line(tmp_path, field, value):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({field: value}, allow_unicode=True), encoding="utf-8")
    try:
        recipe = load_recipe(str(path))
    except InputError as error:
        assert field in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("assignment", "word"),
    [("adversary.alpha=1", "adversary.alpha"), ("alpha=1", "alpha"), ("lr.x=1", "lr"), ("steps=1.5", "steps")],
)
def test_an_override_that_does_not_fit_is_named(tmp_path, assignment, word):
    assert word in mistake(tmp_path, "data: digits\n", assignment)


@pytest.mark.parametrize("assignment", ["steps", "=3", "data=[", ".lr=1", "adversary..steps=1"])
def test_an_assignment_that_is_none_is_named(tmp_path, assignment):
    assert assignment in mistake(tmp_path, "data: digits\n", assignment)


@pytest.mark.parametrize("source", ["nothing", "nothing.yaml"])
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(source):
    with pytest.raises(InputError, match=r"nothing.*digits"):
        load_recipe(source)


@pytest.mark.parametrize(
    ("assignments", "word"),
    [
        (["adversary.radius={eta: 0.1, sampler_steps: 2000}"], "radius.sampler_steps is 2000: give at most 1000"),
        (["objective.vb_scale=1"], "objective: vb_scale has a meaning only with"),
        (["process=flow", "objective={prediction: flow, variance: learned_range}"], "objective: a learned variance"),
        (["process=flow"], "process=flow and objective.prediction=flow go together"),
        (["process=pretrained"], "process=pretrained needs model.name=pretrained"),
        (["objective=edm", "process=cosine"], "objective=edm has levels of its own"),
    ],
)
def test_sections_that_do_not_go_together(assignments, word):
    def build(recipe):
        objective = recipe.objective or OBJECTIVES["denoising"]()
        process, _ = objective.new_process(recipe.process, recipe.steps)
        return recipe.adversary.build(process), objective.build(process, recipe.steps)

    build(load_recipe("digits"))
    recipe = load_recipe("digits", assignments)
    with pytest.raises(InputError, match=word):
        build(recipe)


def test_a_kind_that_is_registered_later_is_found(monkeypatch):
    class Nudge(AdversaryConfig):
        name: Literal["nudge"]
        by: float = 1.0

    monkeypatch.setitem(ADVERSARIES._entries, "nudge", Nudge)
    recipe = load_recipe("digits", ["adversary={name: nudge, by: 2}"])
    assert recipe.adversary == Nudge(name="nudge", by=2.0)
    assert Recipe(adversary=recipe.adversary) == Recipe(adversary={"name": "nudge", "by": 2})
    assert yaml.safe_load(recipe.to_yaml())["adversary"] == {"name": "nudge", "by": 2.0}


@pytest.mark.parametrize("name", ["none", "free", "pgd", "random"])
def test_backward_passes(name):
    passes = load_recipe("digits", [f"adversary.name={name}", "adversary.steps=4"]).adversary.example().backward_passes
    assert passes == (5 if name == "pgd" else 1)


def test_nothing_changes_after_validation():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().steps = 3  # type: ignore[misc]


@pytest.fixture
def own(tmp_path) -> str:
    """A recipe with data of its own."""
    path = tmp_path / "own.yaml"
    path.write_text("data: {name: npz, root: a.npz, size: 8, channels: 1, flip: true}\n")
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "short", "expected"),
    [
        ([], {}, {"name": "npz", "root": "a.npz", "size": 8, "channels": 1, "flip": True}),
        (["data.size=16"], {}, {"name": "npz", "root": "a.npz", "size": 16, "channels": 1, "flip": True}),
        (["data.name=npz"], {"root": "b: c"}, {"name": "npz", "root": "b: c", "size": 8, "channels": 1, "flip": True}),
        (["data.name=digits"], {}, {"name": "digits"}),
        (["data=digits"], {}, {"name": "digits"}),
        (["data.size=4", "data=digits"], {}, {"name": "digits", "size": 4}),
        (["data={name: digits, size: 4}"], {}, {"name": "digits", "size": 4}),
        (
            ["data.channels=3"],
            {"name": "imagefolder", "root": "12"},
            {"name": "imagefolder", "root": "12", "channels": 3},
        ),
    ],
)
def test_the_data_of_a_recipe_with_fields_changed(own, overrides, short, expected):
    assert load_data_config(own, overrides, **short) == DataConfig(**expected)


@pytest.mark.parametrize(
    ("overrides", "short", "word"),
    [
        (["lr=1"], {}, "only fields of data"),
        (["database=1"], {}, "only fields of data"),
        (["data.name=digits"], {"name": "npz"}, "--data and --set data.name are the same"),
        (["data.root=a"], {"root": "b"}, "--root and --set data.root are the same"),
        (["data.workers=2"], {}, "data.workers: this command does not use it"),
        (["data.flip=true"], {"workers": True}, "data.flip: this command does not use it"),
        (["data=3"], {}, "data"),
        (["data.size=[1]"], {}, "data.size"),
    ],
)
def test_data_that_cannot_be_changed_so(own, overrides, short, word):
    with pytest.raises(InputError, match=word):
        load_data_config(own, overrides, **short)


def test_a_colour_survives_yaml(tmp_path):
    recipe = load_recipe("digits", ["data.name=imagefolder", "data.background=#808080"])
    assert recipe.data.background == "#808080"
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe
    (tmp_path / "r.yaml").write_text("data:\n  name: imagefolder\n  background: #808080\n")
    with pytest.raises(InputError, match=r"data.background: no colour: a code such as '#808080' needs quotes"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_options_of_data_that_the_dataset_does_not_take():
    for option in ("background=black", "image_column=image", "label_column=label"):
        with pytest.raises(InputError, match=f"digits takes no {option.partition('=')[0]}"):
            load_recipe("digits", [f"data.{option}"]).data.load()
