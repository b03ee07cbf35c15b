"""Run notebooks from a clean kernel and keep their outputs: ``notebooks/refresh.py [NAME …]``.

* A digest of the code goes into the file, so that a test can see outputs of other code.
* Figures are kept as PNG alone, with a palette of 255 colours if Pillow is installed: GitHub shows
  those, and files stay small. A cell that is not in the file asks for them, so that readers get
  whatever their own Jupyter draws.
* Widgets live in a running kernel only, so the cell of the explorer (tagged ``explorer``) keeps the
  picture that stands in it.
* Results have long texts beside their tables; the tables are what is shown.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
LONGEST = 1000
DRAWN = "import circuitlens\ncircuitlens.view.notebook_pictures();"
NOT_DRAWN = "import plotly.io\nplotly.io.renderers.default = 'plotly_mimetype'"


def code_of(notebook: Any) -> list[str]:
    """Sources of the code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: Any) -> str:
    """SHA-256 of the code, 16 hex digits."""
    return hashlib.sha256("\0".join(code_of(notebook)).encode()).hexdigest()[:16]


def execute(path: Path, timeout: int = 900, *, pictures: bool = True) -> Any:
    """Return a copy of the notebook with new outputs; an error in a cell is raised.

    Args:
        path: of the file, which stays as it is.
        timeout: of one cell, in seconds.
        pictures: draw the figures. That takes a browser, and longer.
    """
    notebook = copy.deepcopy(nbformat.read(path, as_version=4))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(DRAWN if pictures else NOT_DRAWN))
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        # How a cell's text is divided depends on timing.
        coalesce_streams=True,
    ).execute()
    del notebook.cells[0]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    return notebook


def smaller(png: str) -> str:
    """The picture with a palette, a quarter of the size; as it is without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return png
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    file = io.BytesIO()
    picture.convert("RGB").quantize(255, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def tidy(notebook: Any, old: Any) -> None:
    """Remove what has no place in a file."""
    before = {cell["id"]: cell for cell in old.cells}
    for cell in notebook.cells:
        # When a cell ran changes with every run.
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if "explorer" in cell.metadata.get("tags", ()):
            cell.outputs = [
                o for o in before[cell["id"]].outputs if "image/png" in o.get("data", {})
            ]
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data and len(data.get("text/plain", "")) > LONGEST:
                data["text/plain"] = data["text/plain"].split("(")[0] + "(…)"
            if "image/png" in data:
                data.pop(PLOTLY, None)
                data["image/png"] = smaller(data["image/png"])
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "circuitlens": {"code": digest(notebook)},
        }
    )


def refresh(path: Path) -> None:
    """Write the notebook with new outputs."""
    notebook = execute(path)
    tidy(notebook, nbformat.read(path, as_version=4))
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / name)
