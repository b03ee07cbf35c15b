"""Figures as files for papers: PDF, SVG, PNG, and HTML that needs no network.

Drawing needs Chromium (or Chrome, or Edge) and kaleido, ``pip install circuitlens[figures]``;
HTML needs neither. A browser is started once for all figures of a call, because that is what takes
time.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import logging
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from circuitlens.errors import InputError, first_line
from circuitlens.utils.storage import replacing

__all__ = ["FORMATS", "WIDTHS", "Width", "check_formats", "export", "export_all", "on_paper"]

logger = logging.getLogger(__name__)

Width = str | float | int

# Millimetres: what a column and the whole page of most journals and proceedings have room for.
WIDTHS: dict[str, float] = {"column": 85.0, "page": 178.0}
FORMATS = ("pdf", "svg", "png", "html")

_PX_PER_MM = 96 / 25.4
_PX_PER_PT = 96 / 72
_TEXT = 8 * _PX_PER_PT
# Below this nobody reads it on paper.
_SMALLEST = 6.5 * _PX_PER_PT
_SCREEN_FONT = 12.0
_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
_SECONDS = 90.0
_WITH_AXES = ("scatter", "scattergl", "bar", "heatmap", "box", "violin", "histogram", "contour")


class _Job(NamedTuple):
    path: Path
    figure: go.Figure
    kind: str


def export(
    fig: go.Figure,
    path: str | Path,
    width: Width = "column",
    height: float | int | None = None,
    scale: float | int = 300 / 96,
) -> Path:
    """Write a figure for print, or as a separate page; the suffix says which.

    Text becomes 8 points large, and margins and symbols shrink as text does. The figure itself does
    not change.

    Args:
        fig: any figure.
        path: ends in ``.pdf``, ``.svg``, ``.png`` or ``.html``. HTML is one file that needs no
            network; it is for the screen, so it keeps its size, and the rest does not matter.
        width: ``"column"`` (85 mm), ``"page"`` (178 mm), or millimetres.
        height: in millimetres; by default that of the figure, reduced as the text is.
        scale: of a PNG, pixels per 1/96 inch; by default 300 dots per inch.

    Returns:
        The path. The file is there whole, or not at all.

    Raises:
        InputError: for another suffix, for a size that is not positive, or if kaleido or a browser
            is missing or fails.
    """
    return export_all({path: fig}, width, height, scale)[0]


def export_all(
    figures: Mapping[str | Path, go.Figure] | Mapping[str, go.Figure] | Mapping[Path, go.Figure],
    width: Width = "column",
    height: float | int | None = None,
    scale: float | int = 300 / 96,
) -> list[Path]:
    """Write several figures, starting the browser only once.

    Args:
        figures: by path; the same figure may come more than once.
        width, height, scale: as for :func:`export`.

    Returns:
        The paths.

    Raises:
        InputError: as :func:`export` does; then no file was written.
    """
    if not scale > 0:
        raise InputError(f"scale must be positive, but is {scale}.")
    jobs: list[_Job] = []
    for name, fig in figures.items():
        path = Path(name)
        kind = path.suffix.lower().removeprefix(".")
        check_formats(
            [kind], f"{path} ends in {path.suffix!r}" if kind else f"{path} has no suffix"
        )
        jobs.append(_Job(path, fig if kind == "html" else on_paper(fig, width, height), kind))
    to_draw = [job for job in jobs if job.kind != "html"]
    pictures = iter(_draw(to_draw, scale) if to_draw else ())
    for job in jobs:
        with replacing(job.path) as temporary:
            if job.kind == "html":
                page = job.figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
                temporary.write_text(page, encoding="utf-8")
            else:
                temporary.write_bytes(next(pictures))
    return [job.path for job in jobs]


def check_formats(formats: Sequence[str], what: str = "") -> None:
    """Find formats that no figure can be written in.

    Raises:
        InputError: naming the ones that are known.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise InputError(
                f"{what or f'There is no format {kind!r}'}: figures are written as "
                f"{', '.join('.' + name for name in FORMATS)}."
            )


# -- size ------------------------------------------------------------------------------------


def on_paper(
    fig: go.Figure, width: Width = "column", height: float | int | None = None
) -> go.Figure:
    """Return a copy of a figure in the size it has on paper, with text of 8 points.

    Args:
        fig: any figure.
        width: ``"column"`` (85 mm), ``"page"`` (178 mm), or millimetres.
        height: in millimetres; by default that of the figure, reduced as the text is.

    Raises:
        InputError: for another name, or a size that is not positive.
    """
    if isinstance(width, str):
        if width not in WIDTHS:
            known = " or ".join(repr(name) for name in WIDTHS)
            raise InputError(f"The width must be {known}, or millimetres, but is {width!r}.")
        width = WIDTHS[width]
    for name, size in (("width", width), ("height", height)):
        if size is not None and not 0 < size < 5000:
            raise InputError(f"The {name} must be positive millimetres, but is {size}.")
    # A plain dictionary: plotly objects hide which sizes were set and which are defaults.
    spec = copy.deepcopy(fig.to_plotly_json())
    layout = spec.setdefault("layout", {})
    font = layout.setdefault("font", {})
    ratio = _TEXT / float(font.get("size") or _SCREEN_FONT)
    _shrink_fonts(spec, ratio)
    font["size"] = _TEXT
    for trace in spec.get("data", ()):
        if "size" in (marker := trace.get("marker") or {}):
            sizes = marker["size"]
            several = isinstance(sizes, (list, tuple)) or hasattr(sizes, "tolist")
            marker["size"] = [ratio * n for n in sizes] if several else ratio * sizes
    margin = layout.setdefault("margin", {})
    for side in "trbl":
        margin[side] = ratio * margin.get(side, 80)
    wide = width * _PX_PER_MM
    if any(trace.get("type", "scatter") in _WITH_AXES for trace in spec.get("data", ())):
        # Axes make the room that they need; what is more is lost to the figure.
        margin["l"] = min(margin["l"], 10.0)
        margin["r"] = min(margin["r"], 10.0)
    # The space above is for a title, which papers set themselves, and for plotly's buttons.
    headings = [a for a in layout.get("annotations", ()) if a.get("yanchor") == "bottom"]
    more = max((str(a.get("text")).count("<br>") for a in headings), default=0)
    bare = min(margin["t"], 24.0 + 1.5 * _TEXT * more)
    top = margin["t"] if (layout.get("title") or {}).get("text") else bare
    extra = _wrap_title(layout, wide - 10) + top - margin["t"]
    margin["t"] += extra
    tall = height * _PX_PER_MM if height else ratio * float(layout.get("height") or 450) + extra
    layout.update(width=wide, height=tall, autosize=False)
    paper = go.Figure(spec)
    paper.update_xaxes(automargin=True)
    paper.update_yaxes(automargin=True)
    return paper


def _shrink_fonts(node: Any, ratio: float) -> None:
    """Shrink every font below ``node`` whose size was set."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name.endswith("font") and isinstance(value, dict) and value.get("size"):
                sizes = value["size"]
                if isinstance(sizes, (int, float)):
                    value["size"] = max(_SMALLEST, ratio * sizes)
            elif name != "customdata":
                _shrink_fonts(value, ratio)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _shrink_fonts(value, ratio)


def _wrap_title(layout: dict[str, Any], room: float) -> float:
    """Break a title that is wider than the figure; return the height of the new lines.

    A title with markup of its own is left as it is.
    """
    title = layout.get("title") or {}
    text = title.get("text") or ""
    size = (title.get("font") or {}).get("size", _TEXT)
    # A letter of Helvetica is about half as wide as high.
    lines = textwrap.wrap(text, max(12, int(room / (0.53 * size))))
    if "<" in text or len(lines) < 2:
        return 0.0
    title["text"] = "<br>".join(lines)
    return float(1.3 * size * (len(lines) - 1))


# -- the browser -----------------------------------------------------------------------------


def _kaleido() -> Any:
    try:
        kaleido = importlib.import_module("kaleido")
    except ImportError:
        kaleido = None
    # Version 0 brought a browser of its own and had no such class.
    if not hasattr(kaleido, "Kaleido"):
        raise InputError(
            "PDF, SVG and PNG need kaleido 1 or later: pip install 'kaleido>=1', or write .html."
        )
    return kaleido


def _browser() -> str:
    """Find a browser: the one that BROWSER_PATH names, one on PATH, or where kaleido looks."""
    if named := os.environ.get("BROWSER_PATH"):
        if found := shutil.which(named):
            return found
        raise InputError(
            f"BROWSER_PATH is {named}, which is not a program: set it to a Chromium, or remove it."
        )
    for name in _BROWSERS:
        if found := shutil.which(name):
            return found
    if found := _usual_place():
        return found
    raise InputError(
        "PDF, SVG and PNG need a browser, and there is no Chromium or Chrome on PATH: install one "
        "(apt install chromium, or kaleido_get_chrome), set BROWSER_PATH to it, or write .html."
    )


def _usual_place() -> str | None:
    """Where macOS and Windows keep a browser, and where kaleido_get_chrome puts one."""
    chromium = importlib.import_module("choreographer.browsers.chromium")
    found: str | None = chromium.Chromium.find_browser(skip_local=False)
    return found


def picture_server() -> dict[str, Any]:
    """Options of a kaleido server, after a browser has drawn an empty figure.

    Raises:
        InputError: if kaleido or a browser is missing or fails.
    """
    _draw([_Job(Path("an empty figure"), on_paper(go.Figure()), "png")], 1)
    return {"path": _browser(), "mathjax": False, "silence_warnings": True}


@contextmanager
def _killing_is_fine() -> Iterator[None]:
    """No warning of a browser that is slow to close and is killed: everything is drawn by then."""
    closing = logging.getLogger("choreographer.browser_async")
    before = closing.level
    closing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        closing.setLevel(before)


def _draw(jobs: Sequence[_Job], scale: float | int) -> list[bytes]:
    kaleido, browser = _kaleido(), _browser()
    pictures: list[bytes] = []

    async def draw() -> None:
        # Without a sandbox, which is kaleido's default, it also runs as root; MathJax would come
        # from the network.
        async with kaleido.Kaleido(path=browser, mathjax=False, timeout=_SECONDS) as page:
            for job in jobs:
                layout = job.figure.layout
                options = {
                    "format": job.kind,
                    "width": layout.width,
                    "height": layout.height,
                    # Vectors have no pixels: there, a scale would change the size of the page.
                    "scale": scale if job.kind == "png" else 1,
                }
                pictures.append(await page.calc_fig(job.figure, options))

    try:
        # In a thread of its own: notebooks have an event loop that is running already.
        with _killing_is_fine(), ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, draw()).result()
    except Exception as error:
        if len(pictures) == len(jobs):
            # It drew everything, and only did not end well.
            logger.debug("%s: %s", browser, error)
            return pictures
        raise InputError(
            f"The browser {browser} could not draw {jobs[len(pictures)].path} "
            f"({type(error).__name__}: {first_line(error)}): set BROWSER_PATH to another one, or "
            "write .html."
        ) from error
    return pictures
