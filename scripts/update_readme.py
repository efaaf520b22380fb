"""Put the results of a demo into docs/demo and the README: python scripts/update_readme.py robustdiff-demo

The README's table is made from docs/demo/result.json, and a test checks that it still is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- demo -->", "<!-- /demo -->"


def demo_section(record: dict[str, Any]) -> str:
    """The README's section, from what a demo's result.json holds."""
    methods = list(record["training"])
    cells = {(c["checkpoint"], c["sampler"], c["steps"]): c for c in record["cells"]}
    differences = {(d["checkpoint"], d["baseline"], d["sampler"], d["steps"]): d for d in record["differences"]}
    columns = ["sampler", "steps"]
    for method in methods:
        columns += [method] if method == "plain" else [method, "difference to plain"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    better = worse = 0
    for sampler, steps in dict.fromkeys((s, k) for _, s, k in cells):
        row = [sampler, str(steps)]
        for method in methods:
            cell = cells[method, sampler, steps]
            row.append(f"{cell['fid']:.2f} ± {(cell['fid_ci'][1] - cell['fid_ci'][0]) / 2:.2f}")
            if method != "plain":
                difference = differences[method, "plain", sampler, steps]
                low, high = difference["fid_ci"]
                row.append(f"{difference['relative']:+.1%} ({low:+.2f} … {high:+.2f})")
                better += method == "free AT" and high < 0
                worse += method == "free AT" and low > 0
        lines.append("| " + " | ".join(row) + " |")
    training = record["training"]["free AT"]
    adversary = training["recipe"]["adversary"]
    count = len(cells) // len(methods)
    on = record["obtained_on"]
    return "\n".join(
        [
            f"Measured by `make demo` on {on['data']}, {on['threads']} processes of one thread on a "
            f"{on['device'].upper()}, torch {on['torch']}, seed {record['seed']}: the shipped checkpoint is fine-tuned "
            f"plainly, with a random perturbation, and with free AT (K = {adversary['steps']}, "
            f"α = {adversary['step_size']:g}, ℓ2), each for {training['steps']} optimiser updates of batch "
            f"{training['batch_size']} "
            f"(moving average {training['recipe']['ema']}) with one backward pass each, on "
            f"the same sequence of batches. FID of {record['cells'][0]['n']} images a cell on the features "
            f"`{on['features']}`, from common noise, with 95 % bootstrap intervals (of the images: one training seed):",
            "",
            *lines,
            "",
            f"Against plain fine-tuning, free AT is lower beyond the interval of the difference in {better} of {count} "
            f"cells, and higher in {worse}.",
            "",
            "![FID against steps](docs/demo/fid.png)",
            "",
            "![Samples from the same noise](docs/demo/samples-ddim.png)",
        ]
    )


def main(folder: Path) -> None:
    """Copy the results and rewrite the README's section."""
    target = ROOT / "docs" / "demo"
    target.mkdir(parents=True, exist_ok=True)
    for path in (folder / "result.json", *sorted(folder.glob("*.png"))):
        shutil.copy(path, target / path.name)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    section = demo_section(json.loads((target / "result.json").read_text()))
    readme.write_text(f"{before}{START}\n{section}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
