"""Print pyproject.toml's lower bounds as constraints for pip: `>=` becomes `==`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REUSED = ("torch", "torch-fidelity", "lpips", "wandb")
"""Not installed by `make oldest`: the first is taken from the main environment, the others are not tested there."""


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in sorted({*project["dependencies"], *extras["datasets"], *extras["tensorboard"], *extras["test"]}):
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is not None and match[1] not in REUSED:
            print(f"{match[1]}=={match[2]}")


if __name__ == "__main__":
    main()
