"""Recipes: what is given by name, what is overridden, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustdiff.errors import InputError
from robustdiff.recipe import Recipe, load_recipe, shipped_recipes


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
    assert load_recipe(str(path)).model_dump(exclude={"objective"}) == recipe.model_dump(exclude={"objective"})


def test_the_shipped_recipes_are_there():
    assert {"fashion-16", "fashion-16-at", "digits", "fashion-mnist"} <= set(shipped_recipes())


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
        ("2.5", {"value": 2.5, "eta": None, "sampler_steps": None}),
        ("{eta: 0.1}", {"value": None, "eta": 0.1, "sampler_steps": None}),
        ("{eta: 0.1, sampler_steps: 50}", {"value": None, "eta": 0.1, "sampler_steps": 50}),
    ],
)
def test_the_forms_of_a_radius(radius, expected):
    recipe = load_recipe("digits", [f"adversary.radius={radius}"])
    assert recipe.adversary.radius is not None
    assert recipe.adversary.radius.model_dump() == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", ["learning_rate", "lr"]),
        ("adversary: {name: free, alpha: 1}\n", ["adversary.alpha", "step_size"]),
        ("objective: {loss: 1}\n", ["objective.loss", "prediction"]),
        ("adversary: {radius: {etta: 1}}\n", ["adversary.radius.etta", "eta"]),
        ("adversary: strong\n", ["adversary.name"]),
        ("steps: 0\n", ["steps"]),
        ("lr: -1\n", ["lr"]),
        ("ema: 1.0\n", ["ema"]),
        ("batch_size: 7\naccumulate: 2\n", ["batch_size", "accumulate"]),
        ("adversary: {name: free, ramp: 10}\n", ["ramp", "radius"]),
        ("adversary: {name: free, radius: {value: 1, eta: 0.1}}\n", ["radius"]),
        ("adversary: {name: free, radius: {sampler_steps: 50}}\n", ["radius"]),
        ("model: pretrained\n", ["model.path"]),
        ("model: {name: unet, path: x}\n", ["model.path"]),
        ("model: {channels: [10], groups: 4}\n", ["model.channels", "groups"]),
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


@pytest.mark.parametrize("assignment", ["steps", "=3", "data=["])
def test_an_assignment_that_is_none_is_named(tmp_path, assignment):
    assert assignment in mistake(tmp_path, "data: digits\n", assignment)


@pytest.mark.parametrize("source", ["nothing", "nothing.yaml"])
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(source):
    with pytest.raises(InputError, match=r"nothing.*digits"):
        load_recipe(source)


def test_nothing_changes_after_validation():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().steps = 3  # type: ignore[misc]
