"""All figures of a folder of results at once, each with its data next to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from circuitlens.adapt.result import saved_transfers
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.lens import MarginByLayer
from circuitlens.circuits.looking import HeadRoles
from circuitlens.errors import InputError
from circuitlens.experiments.cell_folder import CellFolder
from circuitlens.experiments.comparison import Comparison
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.utils.storage import RUN_SCHEMA, read_json, replacing
from circuitlens.utils.strangers import for_spreadsheets
from circuitlens.view.curves import faithfulness_curve
from circuitlens.view.fronts import front_frame, transfer_fronts
from circuitlens.view.graph import circuit_graph
from circuitlens.view.heads import head_bars, head_heatmap
from circuitlens.view.paper import WIDTHS, Width, check_formats, export_all
from circuitlens.view.roles import head_card, margin_lens
from circuitlens.view.small_multiples import MEAN, Results, cells_of, transfer_points
from circuitlens.view.strategy_grids import paired_differences, strategy_table
from circuitlens.view.theme import Mode, look
from circuitlens.view.tradeoff import transfer_tradeoff
from circuitlens.view.training import drift_frame, history_frame, training_curves, weight_drift

__all__ = ["Drawn", "figures_of", "write_figures"]


# Heads that get a card each.
_CARDS = 6


class Drawn(NamedTuple):
    """A figure and what it shows.

    Attributes:
        figure: for plotly.
        data: the numbers drawn, one row per head, size, transfer or epoch.
    """

    figure: go.Figure
    data: pd.DataFrame


def figures_of(source: str | Path, *, columns: int = 3, mode: Mode = "light") -> dict[str, Drawn]:
    """Draw everything that a folder of results has; nothing is computed again.

    Args:
        source: folder of a run (``circuitlens run``), with its comparison if it has one, or of a
            comparison (``circuitlens compare``, or :meth:`circuitlens.Comparison.save`), finished
            or not, with scores, circuit and faithfulness if they are saved next to it.
        columns: panels side by side; two are as many as a column of a paper has room for.
        mode: ``"light"`` or ``"dark"``.

    Returns:
        Figures by name, such as ``heads``, ``tradeoff`` or ``training-javanese``; those of a run's
        comparison begin with ``compare-``.

    Raises:
        InputError: if the folder has nothing to draw, or transfers of another model than the
            scores.
    """
    look(mode)
    source = Path(source)
    if (source / "run.json").is_file():
        found = _run(source, columns, mode)
    elif (comparison := _comparison(source)) is not None:
        found = _discovery(source, mode)
        if comparison.cells:
            found |= _transfers(comparison, columns, mode)
    else:
        raise InputError(f"{source} contains neither a circuitlens run nor a comparison.")
    if not found:
        raise InputError(f"{source} contains no results yet, so there is nothing to draw.")
    return found


def write_figures(
    source: str | Path,
    out: str | Path,
    formats: Sequence[str] = ("pdf", "svg"),
    width: Width = "column",
    mode: Mode = "light",
) -> list[Path]:
    """Write everything that a folder of results has to draw, and the data next to it as CSV.

    Args:
        source: as for :func:`figures_of`.
        out: folder of the files; those of the same name are replaced.
        formats: of ``pdf``, ``svg``, ``png`` and ``html``; without any only the data is written.
        width: ``"column"`` (85 mm), ``"page"`` (178 mm), or millimetres.
        mode: ``"light"`` or ``"dark"``.

    Returns:
        The files.

    Raises:
        InputError: as :func:`figures_of` and :func:`circuitlens.view.paper` do.
    """
    formats = [name.lower().removeprefix(".") for name in formats]
    check_formats(formats)
    wide = WIDTHS.get(width, 0.0) if isinstance(width, str) else width
    drawn = figures_of(source, columns=2 if wide < 120 else 3, mode=mode)
    out = Path(out)
    files = export_all(
        {out / f"{name}.{kind}": one.figure for name, one in drawn.items() for kind in formats},
        width,
    )
    for name, one in drawn.items():
        path = out / f"{name}.csv"
        with replacing(path) as temporary:
            for_spreadsheets(one.data).to_csv(temporary, index=False)
        files.append(path)
    return files


def _run(source: Path, columns: int, mode: Mode) -> dict[str, Drawn]:
    record = read_json(source / "run.json", RUN_SCHEMA)
    found = _discovery(source, mode)
    if results := saved_transfers(source / "transfers", record["settings"]["targets"]):
        fingerprints = {r.provenance.model_fingerprint for r in results}
        if "heads" in found:
            scores = HeadScores.load(source / "scores.safetensors")
            fingerprints.add(scores.provenance.model_fingerprint)
        if len(fingerprints) > 1:
            raise InputError(
                f"The results in {source} come from models with different weights, so they do not "
                "belong in one figure: remove the old ones."
            )
        found |= _transfers(results, columns, mode)
        for result in results:
            if result.heads is not None:
                name = _free(f"drift-{result.target_language}-{result.strategy}", found)
                found[name] = Drawn(weight_drift(result, mode=mode), drift_frame(result))
    comparison = _comparison(source / "compare")
    if comparison is not None and comparison.cells:
        more = _transfers(comparison, columns, mode)
        found |= {f"compare-{name}": drawn for name, drawn in more.items()}
    return found


def _discovery(source: Path, mode: Mode) -> dict[str, Drawn]:
    """Scores, circuit and faithfulness, as far as they are there; a run would compute the rest."""
    found: dict[str, Drawn] = {}
    circuit = scores = None
    if (file := source / "circuit.json").is_file():
        circuit = Circuit.load(file)
    if (file := source / "scores.safetensors").is_file():
        scores = HeadScores.load(file)
        frame = scores.to_frame()
        found["heads"] = Drawn(head_heatmap(scores, circuit, mode=mode), frame)
        found["head-bars"] = Drawn(head_bars(scores, circuit=circuit, mode=mode), frame)
    if circuit:
        lines = circuit.edge_frame() if circuit.edges else circuit.to_frame()
        found["circuit"] = Drawn(circuit_graph(circuit, scores, mode=mode), lines)
    if (file := source / "roles.json").is_file():
        roles = HeadRoles.load(file)
        table = roles.to_frame()
        known = [role.head for role in roles.roles]
        strongest = known if scores is None else [h for h in scores.ranking() if h in known]
        for head in strongest[:_CARDS]:
            card = head_card(roles, head, circuit, mode=mode)
            found[f"head-{head}"] = Drawn(card, table[table["head"] == str(head)])
    if (file := source / "lens.safetensors").is_file():
        lens = MarginByLayer.load(file)
        found["lens"] = Drawn(margin_lens(lens, mode=mode), lens.to_frame())
    if (file := source / "faithfulness.safetensors").is_file():
        curve = FaithfulnessCurve.load(file)
        # As in the report: small circuits of large models would all sit at the left edge.
        scale = "log" if curve.n_heads > 100 else "linear"
        fig = faithfulness_curve(curve, circuit, scale=scale, mode=mode)
        found["faithfulness"] = Drawn(fig, curve.to_frame())
    return found


def _comparison(folder: Path) -> Comparison | None:
    tables = (folder / "comparison.json").is_file()
    if (folder / "grid.json").is_file() and ((folder / "cells").is_dir() or not tables):
        # The cells, since the tables are written at the end only. Nothing is asked of the
        # settings, so nothing is changed.
        return CellFolder.open(folder, {}, {}).comparison()
    return Comparison.load(folder) if tables else None


def _transfers(results: Results, columns: int, mode: Mode) -> dict[str, Drawn]:
    points = transfer_points(results)
    found: dict[str, Drawn] = {}
    has_source = bool(points["source_change"].notna().any())
    if has_source:
        fig = transfer_tradeoff(results, facets="all", columns=columns, mode=mode)
        found["tradeoff"] = Drawn(fig, points[points["source_change"].notna()])
    if any(cell.get("front") for cell in cells_of(results)):
        fig = transfer_fronts(results, columns=columns, mode=mode)
        found["fronts"] = Drawn(fig, front_frame(results))
    if any(cell.get("test_front") for cell in cells_of(results)):
        fig = transfer_fronts(results, split="test", columns=columns, mode=mode)
        found["fronts-test"] = Drawn(fig, front_frame(results, split="test"))
    tables = {"table-gain": "gain", "table-target": "target_after"}
    if has_source:
        tables |= {"table-source": "source_change"}
    for name, value in tables.items():
        keep = ["language", "strategy", value, f"{value}_sd", "n_seeds", "n_languages"]
        fig = strategy_table(results, value, mode=mode)
        found[name] = Drawn(fig, points[keep].dropna(subset=[value]))
    if isinstance(results, Comparison) and len(results.strategies) > 1:
        reference = results.reference
        if len(pairs := results.pairs(reference)):
            fig = paired_differences(results, reference, columns=columns, mode=mode)
            found["pairs"] = Drawn(fig, pairs)
    for language in dict.fromkeys(points.loc[points["language"] != MEAN, "language"]):
        some = _of_language(results, language)
        if len(frame := history_frame(some)):
            name = _free(f"training-{language}", found)
            found[name] = Drawn(training_curves(some, mode=mode), frame)
    return found


def _of_language(results: Results, language: str) -> Results:
    if isinstance(results, Comparison):
        chosen = (c for c in cells_of(results) if c["target_language"] == language)
        return Comparison(tuple(chosen))
    return [r for r in results if r.target_language == language]


def _free(name: str, taken: dict[str, Drawn]) -> str:
    """A name that a file may have, and that no other figure has."""
    plain = re.sub(r"[^\w.-]+", "_", name)
    number = 1
    free = plain
    while free in taken:
        number += 1
        free = f"{plain}-{number}"
    return free
