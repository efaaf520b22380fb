"""The result of a training run: the contents of ``result.json``, which notebooks show as tables."""

from __future__ import annotations

from typing import Any

from robustdiff.notebook import html_table

__all__ = ["RunResult"]


class RunResult(dict[str, Any]):
    """The contents of the ``result.json`` of a run."""

    def _repr_html_(self) -> str:
        best, signs = self.get("best"), self.get("signs")
        rows = [[name, value] for name, value in self.items() if name not in ("best", "signs")]
        text = html_table("result of the training", ["", "value"], rows)
        if best is not None:
            whose = "the start" if best["start"] else f"update {best['step']}"
            columns = ["sampler", "steps", "metric", "value", "ci", "difference", "difference_ci"]
            cells = [[cell.get(name) for name in columns] for cell in best["cells"]]
            text += html_table(f"best checkpoint: {whose}, on fresh noise", columns, cells)
        if signs:
            columns = ["step", "name", "message", "action"]
            text += html_table("signs that fired", columns, [[sign[name] for name in columns] for sign in signs])
        return text
