"""Put the results of a demonstration into the documentation: python scripts/update_demo.py robustdiff-demo

Those of `robustdiff demo` go to docs/demo and docs/demo.md, those of `robustdiff demo --text` to docs/demo-text and
docs/emoji.md. A test checks that the two documents hold what the two result.json say.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from robustdiff.metrics.metric import number_named
from robustdiff.notation import difference, interval, number
from robustdiff.report.words import table

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- demo -->", "<!-- /demo -->"


def _processes(on: dict[str, Any]) -> str:
    return "one process of one thread" if on["threads"] == 1 else f"{on['threads']} processes of one thread"


def demo_section(record: dict[str, Any]) -> str:
    """Return the section of docs/demo.md, from what a demo's result.json holds."""
    methods = list(record["training"])
    cells = {(c["checkpoint"], c["sampler"], c["steps"]): c for c in record["cells"]}
    differences = {(d["checkpoint"], d["baseline"], d["sampler"], d["steps"]): d for d in record["differences"]}
    columns = ["sampler", "steps"]
    for method in methods:
        columns += [method] if method == "plain" else [method, f"{method} vs plain"]
    rows = []
    for sampler, steps in dict.fromkeys((s, k) for _, s, k in cells):
        row = [sampler, str(steps)]
        for method in methods:
            cell = cells[method, sampler, steps]
            row.append(number(cell["fid"], ".2f"))
            if method != "plain":
                row.append(_change(differences[method, "plain", sampler, steps], "fid"))
        rows.append(row)
    training = record["training"]["free AT"]
    adversary = training["recipe"]["adversary"]
    on = record["obtained_on"]
    return "\n".join(
        [
            f"Measured by `make demo` on {on['data']}, {_processes(on)} on a "
            f"{on['device'].upper()}, torch {on['torch']}, seed {record['seed']}: the shipped checkpoint is fine-tuned "
            f"plainly, with a random perturbation, and with free AT (K = {adversary['steps']}, "
            f"α = {adversary['step_size']:g}, ℓ2), each for {training['steps']} optimiser updates of batch "
            f"{training['batch_size']} "
            f"(moving average {training['recipe']['ema']}) with one backward pass each, on "
            f"the same sequence of batches. FID of {record['cells'][0]['n']} images a cell on the features "
            f"`{on['features']}`, from common noise, and its change against plain fine-tuning with the 95 % bootstrap "
            "interval (of the images: one training seed):",
            "",
            table(columns, rows),
            "",
            "The intervals are of the images of one training each. Trainings of one method with other seeds differ as "
            "well, so that this table compares these networks and not the methods.",
            "",
            "![FID against steps](demo/fid.png)",
            "",
            "![Samples of iddpm, where image i of each network starts from the same noise](demo/samples-iddpm.png)",
        ]
    )


def text_section(record: dict[str, Any]) -> str:
    """Return the section of docs/emoji.md, from the result.json of a demonstration of text-to-image models."""
    methods = list(record["training"])
    training = record["training"]
    first = training["plain"]
    at = next(own for name, own in training.items() if name != "plain")["recipe"]
    adversary, objective, on = at["adversary"], at["objective"], record["obtained_on"]
    low, high = objective["guidance"]
    shown = {"fid": "FID", "clip_score": "CLIP score"}
    parts = [
        f"Measured on {on['data']}, {_processes(on)} on a {on['device'].upper()}, torch "
        f"{on['torch']}, seed {record['seed']}. Each student makes {first['steps']} updates of batch "
        f"{first['batch_size']} from the same first network, with N = {objective['solver_steps']} and w from {low:g} "
        f"to {high:g}. AT has K = {adversary['steps']} passes over each batch, so that it sees a K-th of the batches, "
        f"α = {adversary['step_size']:g}, and a radius of {adversary['radius']['eta']:g}·√d for the noise "
        f"(`by_noise`). FID and CLIP score of {record['cells'][0]['n']} images of held-out captions on the embeddings "
        "of the shipped CLIP, and their change against plain distillation, with 95 % bootstrap intervals over images:"
    ]
    for name, title in shown.items():
        rows = []
        for cell in record["cells"]:
            own = (cell["checkpoint"], cell["steps"])
            found = [
                d
                for d in record["differences"]
                if name in d and (d["checkpoint"], d["baseline"], d["steps"]) == (own[0], "plain", own[1])
            ]
            changes = "".join(_change(d, name) for d in found)
            rows.append([own[0], str(own[1]), _with_interval(cell, name), changes])
        rows += [["teacher", str(cell["steps"]), _with_interval(cell, name), ""] for cell in record["teacher"]]
        parts.append(table(["network", "steps", title, "change vs plain"], rows))
    return "\n\n".join(
        [
            *parts,
            "The intervals are of one training each, and so these tables compare "
            f"{len(methods)} networks and not the methods.",
            "![FID against steps](demo-text/fid.png)",
            "![Samples of each caption in a row, from the same noise](demo-text/samples-lcm.png)",
        ]
    )


def _with_interval(cell: dict[str, Any], name: str) -> str:
    return interval(cell[name], cell[f"{name}_ci"], number_named(name).format)


def _change(record: dict[str, Any], name: str) -> str:
    """Return the relative change with its interval, or the difference where that has none."""
    spec = number_named(name).format
    return difference(record[name], record[f"{name}_ci"], spec, record["relative"], record.get("relative_ci"))


def main(folder: Path) -> None:
    """Copy the results and rewrite the section of the document."""
    record = json.loads((folder / "result.json").read_text())
    with_text = "clip_score" in record["cells"][0]
    name, section = ("emoji.md", text_section) if with_text else ("demo.md", demo_section)
    document = ROOT / "docs" / name
    target = ROOT / "docs" / ("demo-text" if with_text else "demo")
    target.mkdir(parents=True, exist_ok=True)
    text = section(record)
    for file in ("result.json", *re.findall(r"\(\S+/(\S+\.png)\)", text)):
        if folder.resolve() != target:
            shutil.copy(folder / file, target / file)
    before, _, rest = document.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
