"""The extras that messages and documents name are those of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from robustdiff.errors import installing

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_what_a_message_says():
    assert installing("text") == "install the extra text (pip install '.[text]' in the clone of robustdiff)"


def test_messages_name_extras_that_there_are():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"\binstalling\(['\"](.*?)['\"]\)", source))
    assert len(named) >= 5
    assert named <= EXTRAS


def test_documents_install_extras_from_the_clone():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert "robustdiff[" not in text, f"{path.name}: robustdiff is on no index"
        for command, extras in re.findall(r"(pip install[^`\n]*)'\.\[([\w,]+)\]'", text):
            assert "-c constraints.txt" in command, path.name
            assert set(extras.split(",")) <= EXTRAS, path.name
