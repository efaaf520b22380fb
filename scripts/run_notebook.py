"""Run the cells of a notebook in this process and put their outputs into it: python scripts/run_notebook.py FILE.ipynb

The outputs are what is printed, and the value of an expression in the last line of a cell as Jupyter shows it: its
picture, its HTML or its repr. Jupyter is not needed.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def run(cells: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run the code cells in order, in one namespace, and return the outputs of each."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module(body, []), "<cell>", "exec"), variables)
            value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), variables)
        found: list[dict[str, Any]] = []
        if text := printed.getvalue():
            found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
        if value is not None:
            found.append({"output_type": "execute_result", "data": _shown(value), "metadata": {}})
        outputs.append(found)
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if (png := getattr(value, "_repr_png_", lambda: None)()) is not None:
        return {"image/png": base64.b64encode(png).decode(), "text/plain": [repr(value)]}
    if (html := getattr(value, "_repr_html_", lambda: None)()) is not None:
        return {"text/html": html.splitlines(keepends=True), "text/plain": [repr(value)]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def main(path: Path) -> None:
    """Run a notebook, and write it with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(code, run(notebook["cells"]), strict=True), 1):
        cell["execution_count"] = number
        cell["outputs"] = [{**out, "execution_count": number} if "data" in out else out for out in outputs]
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
