"""Figures as files: sizes on paper, text, and what happens without a browser."""

from __future__ import annotations

import logging
import re
import struct
import sys
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
from helpers import can_draw, cell, result

import circuitlens as cl
from circuitlens.experiments.cell_folder import CellFolder
from circuitlens.run_folder import RunFolder
from circuitlens.run_settings import RunSettings
from circuitlens.view.gallery import figures_of, write_figures
from circuitlens.view.paper import export, export_all, on_paper
from circuitlens.view.theme import figure
from circuitlens.view.tradeoff import transfer_tradeoff

# The package may export the function under the name of its module.
module = sys.modules["circuitlens.view.paper"]
PT_PER_MM = 72 / 25.4


needs_browser = pytest.mark.skipif(not can_draw(), reason="no kaleido or no Chromium here")


@pytest.fixture
def small():
    fig = figure("A title", height=300)
    fig.add_scatter(x=[0, 1], y=[0, 1], marker={"size": [12, 6]}, name="a & b")
    fig.add_annotation(text="note", x=0, y=0, font={"size": 6})
    return fig


def comparison() -> cl.Comparison:
    return cl.Comparison(
        tuple(
            cell("x", s, seed, after + 0.02 * seed)
            for s, after in (("circuit", 0.7), ("full", 0.6))
            for seed in (0, 1)
        )
    )


# -- size, without a browser -----------------------------------------------------------------


def test_a_figure_on_paper_is_a_copy_with_smaller_text(small):
    before = small.to_json()
    paper = on_paper(small)
    assert small.to_json() == before
    ratio = 8 / 9  # 8 points are 10.67 pixels; figures have 12
    layout = paper.layout
    assert layout.width == pytest.approx(85 / 25.4 * 96)
    assert layout.height == pytest.approx(300 * ratio)
    assert layout.font.size == pytest.approx(12 * ratio)
    assert layout.title.font.size == pytest.approx(15 * ratio)
    assert layout.margin.t == pytest.approx(50 * ratio)
    assert layout.margin.l <= 10
    assert layout.xaxis.automargin
    assert list(paper.data[0].marker.size) == pytest.approx([12 * ratio, 6 * ratio])
    # Nothing gets smaller than 6.5 points.
    assert layout.annotations[0].font.size == pytest.approx(6.5 * 96 / 72)
    assert on_paper(small, "page", 60).layout.width == pytest.approx(178 / 25.4 * 96)
    assert on_paper(small, 100, 60).layout.height == pytest.approx(60 / 25.4 * 96)


def test_long_titles_are_broken_and_empty_ones_leave_no_room():
    words = "a title much too long for what a column of a paper has room for"
    long = on_paper(figure(words, height=300))
    lines = long.layout.title.text.split("<br>")
    assert " ".join(lines) == words
    assert len(lines) == 2
    short = on_paper(figure("a title", height=300))
    assert long.layout.height > short.layout.height
    assert long.layout.height - long.layout.margin.t == pytest.approx(
        short.layout.height - short.layout.margin.t
    )
    own = on_paper(figure(f"<i>{words}</i>"))
    assert own.layout.title.text == f"<i>{words}</i>"
    bare = figure(height=300)
    bare.update_layout(margin_t=90)
    assert on_paper(bare).layout.margin.t == 24


def test_mistakes_are_said_before_a_browser_starts(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda *_: pytest.fail("a browser was started"))
    formats = "figures are written as .pdf, .svg, .png, .html"
    for call, pattern in (
        (lambda: export(small, tmp_path / "a.eps"), rf"a\.eps ends in '\.eps': {formats}"),
        (lambda: export(small, tmp_path / "a"), f"a has no suffix: {formats}"),
        (lambda: export(small, tmp_path / "a.pdf", -3.0), "width must be positive"),
        (lambda: export(small, tmp_path / "a.pdf", height=0.0), "height must be positive"),
        (lambda: export(small, tmp_path / "a.pdf", scale=0.0), "scale must be positive"),
        (lambda: on_paper(small, float("nan")), "width must be positive"),
        (lambda: write_figures(tmp_path, tmp_path, ("gif",)), "no format 'gif'"),
    ):
        with pytest.raises(cl.InputError, match=pattern):
            call()
    assert not list(tmp_path.iterdir())


def test_html_needs_no_browser_and_no_network(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda *_: pytest.fail("a browser was started"))
    path = export(small, tmp_path / "new" / "a.HTML")
    page = path.read_text()
    assert "Plotly.newPlot(" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    assert [p.name for p in path.parent.iterdir()] == ["a.HTML"]


def test_a_missing_browser_or_kaleido_is_one_sentence(small, tmp_path, monkeypatch):
    path = tmp_path / "a.pdf"
    monkeypatch.setattr(module, "_kaleido", lambda: SimpleNamespace())
    with monkeypatch.context() as patch:
        patch.delenv("BROWSER_PATH", raising=False)
        patch.setenv("PATH", str(tmp_path))
        patch.setattr(module, "_usual_place", lambda: None)
        with pytest.raises(cl.InputError, match=r"no Chromium or Chrome on PATH: install one"):
            export(small, path)
        patch.setattr(module, "_usual_place", lambda: "/opt/chrome")
        assert module._browser() == "/opt/chrome"
        found = tmp_path / "google-chrome"
        found.write_text("#!/bin/sh\n")
        found.chmod(0o755)
        assert module._browser() == str(found)
        patch.setenv("BROWSER_PATH", "/no/where")
        with pytest.raises(cl.InputError, match=r"/no/where, which is not a program"):
            export(small, path)
        patch.setenv("BROWSER_PATH", str(found))
        assert module._browser() == str(found)
    assert not path.exists()


def test_without_kaleido_it_says_what_to_install(monkeypatch):
    # None in sys.modules is how Python notes that an import fails.
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(cl.InputError, match="pip install 'kaleido>=1'"):
        module._kaleido()
    monkeypatch.setitem(sys.modules, "kaleido", SimpleNamespace(scopes="version 0"))
    with pytest.raises(cl.InputError, match="kaleido 1 or later"):
        module._kaleido()


def test_a_failing_browser_leaves_no_file(small, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, **options):
            self.left = 1

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            return None

        async def calc_fig(self, fig, options):
            if not self.left:
                raise RuntimeError("out of ink.\nand more")
            self.left -= 1
            return b"%PDF"

    monkeypatch.setattr(module, "_kaleido", lambda: SimpleNamespace(Kaleido=Broken))
    monkeypatch.setattr(module, "_browser", lambda: "/opt/chrome")
    figures = {tmp_path / "a.pdf": small, tmp_path / "b.svg": small}
    with pytest.raises(cl.InputError, match=r"/opt/chrome could not draw \S+b\.svg .*out of ink"):
        export_all(figures)
    assert not list(tmp_path.iterdir())
    assert export(small, tmp_path / "a.pdf").read_bytes() == b"%PDF"


def test_a_browser_that_has_to_be_killed_is_nobodys_concern(small, tmp_path, monkeypatch, caplog):
    closing = logging.getLogger("choreographer.browser_async")

    class Slow:
        def __init__(self, **options):
            pass

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            closing.warning("Resorting to unclean kill browser.")

        async def calc_fig(self, fig, options):
            return b"%PDF"

    monkeypatch.setattr(module, "_kaleido", lambda: SimpleNamespace(Kaleido=Slow))
    monkeypatch.setattr(module, "_browser", lambda: "/opt/chrome")
    export(small, tmp_path / "a.pdf")
    assert not caplog.records
    closing.warning("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


# -- notebooks -------------------------------------------------------------------------------


@pytest.fixture
def renderer():
    before = plotly.io.renderers.default
    yield plotly.io.renderers
    plotly.io.renderers.default = before


@pytest.mark.parametrize("browser", ["none", "one that does not start"])
def test_a_notebook_without_a_browser_does_not_wait_for_one(
    renderer, tmp_path, monkeypatch, browser
):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    if browser == "none":
        monkeypatch.delenv("BROWSER_PATH", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(module, "_usual_place", lambda: None)
    else:
        found = tmp_path / "chromium"
        found.write_text("#!/bin/sh\nexit 1\n")
        found.chmod(0o755)
        monkeypatch.setenv("BROWSER_PATH", str(found))
    assert cl.view.notebook_pictures() is False
    assert renderer.default == "plotly_mimetype"


@needs_browser
@pytest.mark.slow
def test_a_notebook_shows_a_picture_beside_a_figure(renderer, small):
    kaleido = pytest.importorskip("kaleido")
    try:
        assert cl.view.notebook_pictures() is True
        bundle = renderer._build_mime_bundle(small.to_dict())
    finally:
        kaleido.stop_sync_server()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png"}


# -- files -----------------------------------------------------------------------------------


@needs_browser
def test_files_have_the_width_of_a_column(tmp_path):
    fig = transfer_tradeoff(comparison(), mode="dark")
    pdf, svg, png, wide = export_all(
        {tmp_path / name: fig for name in ("a.pdf", "a.svg", "a.png", "b.html")}, scale=2
    )
    assert pdf.read_bytes().startswith(b"%PDF")
    box = re.search(rb"/MediaBox\s*\[([^]]*)\]", pdf.read_bytes())
    left, _, right, _ = (float(n) for n in box[1].split())
    # Chromium's pages are whole pixels wide, three quarters of a point.
    assert right - left == pytest.approx(85 * PT_PER_MM, abs=0.76)
    width = float(re.search(r'<svg[^>]* width="([\d.]+)"', svg.read_text())[1])
    assert width == pytest.approx(85 / 25.4 * 96, abs=1)
    assert "circuit" in svg.read_text()
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">I", header[16:20])[0] == pytest.approx(2 * 85 / 25.4 * 96, abs=2)
    assert wide.is_file()
    assert len(list(tmp_path.iterdir())) == 4
    (page,) = export_all({str(tmp_path / "page.pdf"): fig}, "page", 90)
    box = re.search(rb"/MediaBox\s*\[([^]]*)\]", page.read_bytes())
    found = [float(n) / PT_PER_MM for n in box[1].split()][2:]
    assert found == pytest.approx([178, 90], abs=0.3)


def drawn(jobs, scale):
    return [f"{job.kind} {job.figure.layout.width:.0f}".encode() for job in jobs]


def test_all_figures_of_a_comparison_are_written_with_their_data(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_draw", drawn)
    comparison().save(tmp_path / "grid")
    files = write_figures(tmp_path / "grid", tmp_path / "out", (".PDF", "svg"), width="page")
    assert {f.name for f in files} == {f.name for f in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "tradeoff.pdf").read_bytes() == b"pdf 673"
    assert (tmp_path / "out" / "tradeoff.svg").read_bytes() == b"svg 673"
    table = pd.read_csv(tmp_path / "out" / "table-gain.csv")
    assert table["gain"].tolist() == pytest.approx([21, 11])
    assert {f.stem for f in files if f.suffix == ".csv"} == {f.stem for f in files}


def test_tables_and_settings_without_cells_are_a_comparison(tmp_path):
    # As in figures/: enough to compute what is missing, and to draw what is there.
    comparison().save(tmp_path)
    without = set(figures_of(tmp_path))
    CellFolder.open(tmp_path / "grid", {}, {"x": "1"})
    (tmp_path / "grid" / "grid.json").rename(tmp_path / "grid.json")
    assert set(figures_of(tmp_path)) == without
    assert "tradeoff" in without


def test_a_run_shows_what_it_has_and_computes_nothing(tmp_path, monkeypatch):
    import torch

    from circuitlens.utils.provenance import Provenance

    run = tmp_path / "run"
    RunFolder(run, RunSettings(model="m", task="gone", targets=("y", "x"))).write_record()
    with pytest.raises(cl.InputError, match="no results yet"):
        figures_of(run)
    values = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    origin = Provenance("m", "f", "t", "d", 0)
    scores = cl.HeadScores(values, "random", "all", tuple("abcde"), origin)
    scores.save(run / "scores.safetensors")
    found = figures_of(run)
    assert list(found) == ["heads", "head-bars"]
    assert len(found["heads"].data) == 4
    scores.top(2).save(run / "circuit.json")
    for language, strategy in (("x", "full"), ("y", "circuit"), ("y", "full")):
        write(run, result(strategy, language))
    comparison().save(run / "compare")
    found = figures_of(run)
    assert {"circuit", "tradeoff", "training-y", "drift-x-full", "compare-pairs"} <= set(found)
    # The run's own targets come first, as they were given.
    assert list(dict.fromkeys(found["tradeoff"].data["language"]))[:2] == ["y", "x"]
    assert found["drift-x-full"].data["drift"].tolist() == [0, 2, 0.5, 0]
    assert all(isinstance(f.figure, go.Figure) and len(f.data) for f in found.values())
    other = Provenance("m", "another", "t", "d", 0)
    write(run, result("norms", "x", provenance=other))
    with pytest.raises(cl.InputError, match="models with different weights"):
        figures_of(run)


def write(run, transfer):
    from circuitlens.utils.storage import write_json

    folder = run / "transfers" / transfer.target_language / transfer.strategy
    write_json(folder / "result.json", "circuitlens.transfer/2", transfer.to_dict())
