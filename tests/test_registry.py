"""Kinds by name: the files of a folder, and the modules that installed packages name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from robustdiff.errors import InputError
from robustdiff.registry import Registry

KIND = """
from toys.registry import TOYS

@TOYS.register("{name}")
class Toy: ...
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[type]:
    """A registry over a folder with two files, and a distribution that adds a third."""
    folder = tmp_path / "toys" / "kinds"
    folder.mkdir(parents=True)
    (tmp_path / "toys" / "__init__.py").write_text("")
    (tmp_path / "toys" / "registry.py").write_text(
        "from robustdiff.registry import Registry\nTOYS = Registry('toy', 'toys')\nTOYS.folder = 'toys.kinds'\n"
    )
    (folder / "__init__.py").write_text("")
    for name in ("car", "ball"):
        (folder / f"{name}_file.py").write_text(KIND.format(name=name))
    (tmp_path / "other_toys.py").write_text(KIND.format(name="kite"))
    information = tmp_path / "other_toys-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other-toys\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[robustdiff.toys]\nkite = other_toys\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("toys.registry", fromlist=["TOYS"]).TOYS
    for name in [name for name in sys.modules if name.split(".")[0] in ("toys", "other_toys")]:
        del sys.modules[name]


def test_files_and_entry_points_are_found_by_their_names(toys):
    assert list(toys) == ["ball", "car", "kite"]
    assert toys["kite"].__name__ == "Toy"
    assert toys["kite"] is not toys["car"]
    assert "car" in toys
    assert "boat" not in toys


def test_unknown_names_are_refused_with_those_that_are_known(toys):
    with pytest.raises(InputError, match="unknown toy 'boat': use one of ball, car, kite"):
        toys["boat"]


def test_a_name_stands_for_one_thing(toys):
    assert len(toys) == 3
    with pytest.raises(ValueError, match="two of the toy car"):
        toys.register("car")(object)
    assert toys.register("car")(toys["car"]) is toys["car"]


def test_a_package_that_cannot_be_imported_is_named(toys, tmp_path):
    (tmp_path / "other_toys.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(InputError, match=r"toy kite of the installed package other-toys cannot be loaded \(No module"):
        list(toys)


def test_a_look_up_that_was_interrupted_is_made_again(toys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("robustdiff.registry.entry_points", lambda group: interrupted(group))
        with pytest.raises(KeyboardInterrupt):
            list(toys)
    assert list(toys) == ["ball", "car", "kite"]
