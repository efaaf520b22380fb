"""Print pyproject.toml's lower bounds as constraints for pip: `>=` becomes `==`. torch is constraints.txt's."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in sorted({*project["dependencies"], *project["optional-dependencies"]["test"]}):
        name, bound = requirement.split(">=")
        if name != "torch":
            print(f"{name}=={bound}")
    print(next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")))


if __name__ == "__main__":
    main()
