"""Check that the wheel has every file that the package reads, and that the sdist makes the same wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from robustdiff import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "robustdiff"
LARGEST = 50 * 2**20
"""The largest wheel in bytes. Three quarters of it are the models, data and features of the package."""


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build an sdist or a wheel as pip does, without an environment of its own."""
    code = f"from hatchling.build import build_{kind} as build; print(build({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return zipfile.ZipFile(build("wheel", next(path for path in folder.iterdir() if path.is_dir()), folder))


def test_the_wheel_of_the_sdist_has_every_file_of_the_package(wheel):
    there = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    held = {info.filename: info for info in wheel.infolist() if ".dist-info/" not in info.filename}
    assert set(held) == there, "and nothing else, such as tests"
    for name in there:
        assert wheel.read(name) == (SOURCE.parent / name).read_bytes(), name


def test_the_wheel_is_small_enough_for_its_models(wheel):
    assert Path(str(wheel.filename)).stat().st_size < LARGEST


def test_the_wheel_says_what_it_is(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = wheel.read(f"robustdiff-{project['version']}.dist-info/METADATA").decode()
    assert f"Version: {__version__}\n" in metadata
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata
    entry_points = wheel.read(f"robustdiff-{project['version']}.dist-info/entry_points.txt").decode()
    assert "robustdiff = robustdiff.cli:main" in entry_points
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {__version__}" in changes, "the changelog has a section of this version"
