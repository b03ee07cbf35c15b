"""Draw the pictures of the page on figures, by running the code that stands there.

    python -m figures.gallery

Every figure of ``cl.view`` whose call stands on a line of its own becomes
``docs/images/gallery/NAME.svg``, as wide as a column.
"""

from __future__ import annotations

import ast
import re
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

import circuitlens as cl

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "howto" / "figures.md"
OUT = ROOT / "docs" / "images" / "gallery"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        found = drawn(PAGE.read_text(encoding="utf-8"))
        written = cl.view.export_all({OUT / f"{n}.svg": fig for n, fig in found.items()}, 110)
    print(f"{len(written)} files")


def drawn(page: str) -> dict[str, go.Figure]:
    """Run the blocks of a page, and return the figures that stand on lines of their own."""
    known: dict[str, Any] = {}
    found: dict[str, go.Figure] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        if "export" in block or "notebook_pictures" in block:
            break
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            name = re.match(r"cl\.view\.(\w+)\(", code)
            if isinstance(statement, ast.Expr) and name:
                found.setdefault(name[1], eval(code, known))
            else:
                exec(code, known)
    return found


if __name__ == "__main__":
    main()
