"""Figures of tokens: relevance on the text itself, and where heads attend."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots
from torch import Tensor

from circuitlens.errors import InputError
from circuitlens.utils.pieces import of_bytes, readable
from circuitlens.view.theme import Look, Mode, colour_bar, figure, look, plain

__all__ = [
    "attention_pattern",
    "attention_patterns",
    "short_tokens",
    "token_axis",
    "token_relevance",
    "visible",
]

# Cells of the heatmap below a character of text: the gap between tokens is one of them.
_FINE = 4
_LINE = 24
_MONOSPACE = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


# -- text ------------------------------------------------------------------------------------


def visible(tokens: Sequence[str]) -> list[str]:
    """Tokens with a dot for every space in front, and with signs for line breaks and tabs."""
    if (parts := of_bytes(tokens)) is not None:
        # Of a vocabulary of bytes, other scripts than Latin are not to be read as they stand.
        tokens = readable(parts)
    # Ġ is a letter of Maltese, so it is a marker only in vocabularies that have no other.
    marker = "▁" if any(token.startswith("▁") for token in tokens) else "Ġ"
    shown = []
    for token in tokens:
        rest = token.lstrip(marker + " ")
        text = "·" * (len(token) - len(rest)) + rest
        for sign, old in (("↵", "\r\n"), ("↵", "\n"), ("↵", "Ċ"), ("⇥", "\t")):
            text = text.replace(old, sign)
        shown.append(text)
    return shown


def short_tokens(tokens: Sequence[str], longest: int = 12) -> list[str]:
    """Labels of an axis: visible, escaped, and shortened to ``longest`` characters."""
    return [plain(_shorten(token, longest)) for token in visible(tokens)]


def token_axis(labels: Mapping[str, str]) -> dict[str, Any]:
    """Describe an axis of tokens by the text of every place.

    Plotly leaves out labels that would touch only on axes whose ticks it chooses itself, so places
    are categories of their own, and tokens, which come more than once, are their aliases.
    """
    return {"type": "category", "labelalias": dict(labels), "showgrid": False}


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _columns(text: str) -> int:
    """Characters of a monospace font that ``text`` takes up."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


# -- relevance on the text -------------------------------------------------------------------


def token_relevance(
    tokens: Sequence[str],
    values: Float[Tensor, " token"] | ArrayLike,
    title: str = "",
    *,
    unit: str = "relevance (logits)",
    columns: int = 44,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the relevance of every token of one example as the colour behind its text.

    Args:
        tokens: of the example, with or without the tokenizer's marks of spaces.
        values: one for every token, such as a row of ``scores.by_position`` summed over heads.
        title: of the figure.
        unit: what the values are, written at the colour bar.
        columns: characters on a line. The figure is as wide as they need; 44 fit into a paper's
            column.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if there are no tokens, not one finite value for each, or fewer than 8 columns.
    """
    numbers = _numbers(values, "values", 1)
    if not tokens or len(tokens) != len(numbers):
        raise InputError(
            f"Every token needs one value, but there are {len(tokens)} tokens and "
            f"{len(numbers)} values."
        )
    if columns < 8:
        raise InputError(f"A line needs room for at least 8 characters, but columns is {columns}.")
    colours = look(mode)
    words = [_shorten(word, columns - 1) for word in visible(tokens)]
    places = _wrap(words, columns)
    n_lines = places[-1][0] + 1
    limit = float(np.abs(numbers).max()) or 1.0
    # A heatmap rather than shapes: its hover reaches the whole box, and it draws the colour bar.
    cells = np.full((n_lines, columns * _FINE), np.nan)
    owner = np.zeros(cells.shape, dtype=int)
    for k, (line, start, width) in enumerate(places):
        box = (line, slice(start * _FINE, (start + width) * _FINE - 1))
        cells[box], owner[box] = numbers[k], k
    # With less room plotly puts the colour bar on the text.
    n_rows = max(4, n_lines)
    # The title's margin comes on top of that of the lines.
    height = (140 if title else 110) + _LINE * n_rows
    fig = figure(title, mode=mode, width=20 + 9 * columns, height=height)
    escaped = [plain(token) for token in visible(tokens)]
    fig.add_heatmap(
        z=cells,
        x0=0.5 / _FINE,
        dx=1 / _FINE,
        zmin=-limit,
        zmax=limit,
        colorscale=colours.diverging,
        ygap=5,
        hoverongaps=False,
        customdata=[[[escaped[k], k + 1] for k in row] for row in owner],
        hovertemplate=(
            "“%{customdata[0]}”<br>token %{customdata[1]} of "
            f"{len(tokens)}<br>%{{z:.4f}}<extra></extra>"
        ),
        colorbar=colour_bar(unit),
    )
    fig.add_scatter(
        x=[start + width / 2 - 0.5 / _FINE for _, start, width in places],
        y=[line for line, _, _ in places],
        text=[plain(word) for word in words],
        mode="text",
        textfont={"family": _MONOSPACE, "color": _on(numbers / limit, colours)},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    hidden = {"visible": False, "fixedrange": True}
    fig.update_xaxes(range=[0, columns], **hidden)
    fig.update_yaxes(range=[n_rows - 0.5, -0.5], **hidden)
    fig.update_layout(margin={"l": 10, "r": 10, "b": 60})
    return fig


def _wrap(words: Sequence[str], columns: int) -> list[tuple[int, int, int]]:
    """Line, first column and width of every box; a box has half a character of room each side."""
    places: list[tuple[int, int, int]] = []
    line = column = 0
    for word in words:
        width = min(columns, _columns(word) + 1)
        if column + width > columns:
            line, column = line + 1, 0
        places.append((line, column, width))
        column += width
        if "↵" in word:
            line, column = line + 1, 0
    return places


def _on(shares: np.ndarray, colours: Look) -> list[str]:
    """The colour of text, of ink and paper, that can be read on each place of the scale."""
    stops = [place for place, _ in colours.diverging]
    channels = np.array([_rgb(colour) for _, colour in colours.diverging]).T
    behind = np.array([np.interp((shares + 1) / 2, stops, channel) for channel in channels]).T
    dark, light = sorted((colours.ink, colours.paper), key=lambda c: _luminance(_rgb(c)))
    # Where black and white have the same contrast, by WCAG 2.
    return [dark if _luminance(colour) > 0.18 else light for colour in behind]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def _luminance(rgb: Sequence[float] | np.ndarray) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


# -- attention -------------------------------------------------------------------------------


def attention_pattern(
    pattern: Float[Tensor, "query key"] | ArrayLike,
    tokens: Sequence[str],
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw where one head attends: queries downwards, keys to the right.

    Args:
        pattern: attention weights, ``query key``.
        tokens: of the prompt, one for every position.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if the pattern is not square, has an entry that is not finite, or is of
            another length than the tokens.
    """
    numbers = _numbers(pattern, "pattern", 2)
    return _attention({"": numbers}, tokens, title, 1, mode)


def attention_patterns(
    patterns: Mapping[str, Float[Tensor, "query key"] | ArrayLike]
    | Float[Tensor, "head query key"]
    | ArrayLike,
    tokens: Sequence[str],
    title: str = "",
    *,
    names: Sequence[str] | None = None,
    columns: int | None = None,
    mode: Mode = "light",
) -> go.Figure:
    """Draw where several heads attend, on one colour scale.

    Args:
        patterns: attention weights by name, or as one array ``head query key``.
        tokens: of the prompt, one for every position.
        title: of the figure.
        names: of the heads of an array; the default is their number in it.
        columns: of the grid; the default is 2, or 3 for more than four heads.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if there is no pattern, one is not square, has an entry that is not finite, or
            is of another length than the tokens; if names and patterns differ in number; or if
            ``columns`` is not positive.
    """
    if isinstance(patterns, Mapping):
        named = {str(name): _numbers(p, f"pattern {name}", 2) for name, p in patterns.items()}
    else:
        stack = _numbers(patterns, "patterns", 3)
        names = [f"head {k}" for k in range(len(stack))] if names is None else list(names)
        if len(set(names)) != len(stack):
            raise InputError(
                f"Every pattern needs its own name, but there are {len(set(names))} names and "
                f"{len(stack)} patterns."
            )
        named = dict(zip(names, stack, strict=True))
    if not named:
        raise InputError("There are no attention patterns to draw: pass at least one.")
    if columns is not None and columns < 1:
        raise InputError(f"A grid has at least one column, but columns is {columns}.")
    return _attention(named, tokens, title, columns or (2 if len(named) <= 4 else 3), mode)


def _attention(
    named: Mapping[str, np.ndarray], tokens: Sequence[str], title: str, columns: int, mode: Mode
) -> go.Figure:
    for name, pattern in named.items():
        if pattern.shape != (len(tokens), len(tokens)):
            which = f"that of {name}" if name else "this one"
            raise InputError(
                f"A pattern has a row and a column for each of the {len(tokens)} tokens, but "
                f"{which} is {pattern.shape[0]} × {pattern.shape[1]}."
            )
    colours = look(mode)
    columns = min(columns, len(named))
    rows = math.ceil(len(named) / columns)
    side = max(190, min(560, 22 * len(tokens))) if columns == 1 else 230
    room = 100 + (30 if title else 0)
    fig = make_subplots(
        rows,
        columns,
        specs=[
            [{} if row * columns + k < len(named) else None for k in range(columns)]
            for row in range(rows)
        ],
        subplot_titles=[plain(name) for name in named] if any(named) else None,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.12 / columns,
        vertical_spacing=26 / (side * rows),
    )
    fig.update_layout(figure(title, mode=mode, height=room + 70 + side * rows).layout)
    if any(named):
        fig.update_layout(margin={"t": 60 if title else 34})
        fig.update_annotations(font_size=12)
    places = [str(k) for k in range(len(tokens))]
    texts = [plain(token) for token in visible(tokens)]
    words = [[[q, k] for k in texts] for q in texts]
    for number, pattern in enumerate(named.values()):
        fig.add_heatmap(
            z=pattern,
            x=places,
            y=places,
            coloraxis="coloraxis",
            customdata=words,
            hovertemplate=(
                "from “%{customdata[0]}” (%{y})<br>to “%{customdata[1]}” (%{x})<br>%{z:.3f}"
                "<extra></extra>"
            ),
            row=number // columns + 1,
            col=number % columns + 1,
        )
    labels = token_axis(dict(zip(places, short_tokens(tokens), strict=True)))
    fig.update_xaxes(labels, tickangle=-90)
    fig.update_yaxes(labels, autorange="reversed")
    # Below the lowest panel of every column, which is not always in the last row.
    for column in range(1, columns + 1):
        lowest = rows if (rows - 1) * columns + column <= len(named) else rows - 1
        fig.update_xaxes(title="key", showticklabels=True, row=lowest, col=column)
    fig.update_yaxes(title="query", col=1)
    most = max(float(pattern.max()) for pattern in named.values()) or 1.0
    fig.update_layout(
        coloraxis={
            "colorscale": colours.sequential,
            "cmin": 0,
            "cmax": most,
            "colorbar": colour_bar("attention"),
        }
    )
    return fig


def _numbers(values: object, what: str, n_axes: int) -> np.ndarray:
    """Make an array of floats of ``values``, or say why not."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"The {what} must be numbers in {n_axes} axes of equal lengths.") from None
    if numbers.ndim != n_axes or not numbers.size:
        raise InputError(
            f"The {what} must have {n_axes} {'axis' if n_axes == 1 else 'axes'}, none of them "
            f"empty, but the shape is {numbers.shape}."
        )
    if not np.isfinite(numbers).all():
        raise InputError(f"The {what} must be finite, but some entries are not.")
    return numbers
