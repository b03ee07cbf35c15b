"""Run notebooks from a clean kernel and keep their outputs: ``notebooks/refresh.py [NAME …]``.

* A digest of the code goes into the file, so that a test can see outputs of other code.
* Widgets live in a running kernel only, so the cell of the explorer (tagged ``explorer``) keeps the
  picture that stands in it.
* Results have long texts beside their tables; the tables are what is shown.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
LONGEST = 1000


def code_of(notebook: Any) -> list[str]:
    """Sources of the code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: Any) -> str:
    """SHA-256 of the code, 16 hex digits."""
    return hashlib.sha256("\0".join(code_of(notebook)).encode()).hexdigest()[:16]


def execute(path: Path, timeout: int = 180) -> Any:
    """Return a copy of the notebook with new outputs; an error in a cell is raised."""
    notebook = copy.deepcopy(nbformat.read(path, as_version=4))
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        # How a cell's text is divided depends on timing.
        coalesce_streams=True,
    ).execute()
    return notebook


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
