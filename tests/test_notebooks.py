"""The notebooks run from a clean kernel, and what stands in the files came from their code."""

from __future__ import annotations

import importlib.util
import json
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
PLOTLY = "application/vnd.plotly.v1+json"

_spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
assert _spec is not None
assert _spec.loader is not None
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> list[set[str]]:
    """What a reader sees below a cell, whatever can draw pictures on this machine."""
    return [{o.output_type, *o.get("data", {})} - {"image/png"} for o in cell.outputs]


def test_there_are_four():
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_file_can_be_read_without_running_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_500_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "display_data",
        "execute_result",
        "stream",
    }
    assert not [output for output in outputs if output.get("name") == "stderr"]
    figures = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    assert figures
    assert all("image/png" in data for data in figures)
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
def test_it_runs_from_a_clean_kernel(path):
    committed = nbformat.read(path, as_version=4)
    before = {p.name for p in FOLDER.iterdir()}
    executed = refresh.execute(path, timeout=180)
    assert {p.name for p in FOLDER.iterdir()} == before
    assert refresh.code_of(executed) == refresh.code_of(committed)
    refresh.tidy(executed, committed)
    for new, old in zip(code_cells(executed), code_cells(committed), strict=True):
        assert kinds(new) == kinds(old), new.source
