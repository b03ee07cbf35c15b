"""The notebooks run from a clean kernel, and what stands in the files came from their code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("anywidget", reason="anywidget is not installed")

pytestmark = pytest.mark.docs

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/circuitlens/circuitlens/blob/main/notebooks/"

# What a notebook needs beside circuitlens, and where this machine may have it.
NEEDS = {
    "06_minilm": {
        "CIRCUITLENS_MINILM": None,
        "CIRCUITLENS_DATA": FOLDER.parents[1] / "shared" / "data" / "sib200",
    },
}

_spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
assert _spec is not None
assert _spec.loader is not None
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> list[set[str]]:
    """What a reader sees below a cell; figures are pictures in the file, and not drawn here."""
    drawn = {refresh.PLOTLY: "figure", "image/png": "figure"}
    return [{o.output_type, *(drawn.get(k, k) for k in o.get("data", {}))} for o in cell.outputs]


def test_all_are_numbered_and_listed():
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))
    for page in ("notebooks/README.md", "docs/notebooks.md", "mkdocs.yml"):
        text = (FOLDER.parent / page).read_text(encoding="utf-8")
        assert re.findall(r"\d\d_\w+\.ipynb", text) == [path.name for path in NOTEBOOKS], page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_file_can_be_read_without_running_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {int(path.stem[:2])}. ")
    assert COLAB + path.name in first.source
    cells = code_cells(notebook)
    assert "%pip install" in cells[0].source
    assert not [cell.source for cell in cells if len(cell.source.split("\n")) > 16]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "display_data",
        "execute_result",
        "stream",
    }
    assert not [output for output in outputs if output.get("name") == "stderr"]
    # GitHub shows pictures; whoever runs the notebook has the figures themselves.
    early = [output for cell in cells[:5] for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in early)
    assert not [output for output in outputs if refresh.PLOTLY in output.get("data", {})]
    assert not [output for output in outputs if refresh.WIDGET in output.get("data", {})]
    for cell in cells:
        if "explorer" in cell.metadata.get("tags", ()):
            assert "image/png" in cell.outputs[0].data
    # Nothing of the machine that made it.
    texts = [json.dumps({k: v for k, v in o.items() if k != "metadata"}) for o in outputs]
    assert not [text for text in texts if re.search(r"[\"' ]/(tmp|home|root|Users|work)/", text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_the_code_that_stands_there(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["circuitlens"]["code"] == refresh.digest(notebook), (
        "the outputs are of other code: run python notebooks/refresh.py"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_clean_kernel(path, monkeypatch):
    for name, place in NEEDS.get(path.stem, {}).items():
        given = os.environ.get(name) or place
        if given is None or not Path(given).is_dir():
            pytest.skip(f"{name} names no folder with what {path.stem} needs")
        monkeypatch.setenv(name, str(given))
    committed = nbformat.read(path, as_version=4)
    before = {p.name for p in FOLDER.iterdir()}
    executed = refresh.execute(path, pictures=False)
    assert {p.name for p in FOLDER.iterdir()} == before
    assert refresh.code_of(executed) == refresh.code_of(committed)
    refresh.tidy(executed, committed)
    for new, old in zip(code_cells(executed), code_cells(committed), strict=True):
        assert kinds(new) == kinds(old), new.source
