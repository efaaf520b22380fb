"""Put the result of a search into the documentation: python scripts/update_tune.py FOLDER

It goes to benchmarks/results/tune-fashion-16-iddpm-10 and docs/tune.md. A test checks that the page holds it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from robustdiff.report.tune import tune_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tune-fashion-16-iddpm-10"
PAGE = ROOT / "docs" / "tune.md"
START, END = "<!-- tune -->", "<!-- /tune -->"


def main(folder: Path) -> None:
    """Copy the result and rewrite the section of the page."""
    RESULT.mkdir(parents=True, exist_ok=True)
    for path in (folder / "tune.yaml", folder / "result.json", folder / "recipe.yaml"):
        if path.exists() and folder.resolve() != RESULT:
            shutil.copy(path, RESULT / path.name)
    section = tune_markdown(json.loads((RESULT / "result.json").read_text(encoding="utf-8")))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{section}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
