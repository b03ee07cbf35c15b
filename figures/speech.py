"""A speech model adapted with text alone: what it gains in a new domain, what it keeps of the old.

    python -m figures.speech             computes figures/speech/ (three seeds)
    python -m figures.speech --draw      draws it again, without a model

Every seed makes and trains a speech model of its own (:mod:`figures.speech_world`). Baseline,
relevance and circuit come of source text; every strategy trains on about 120 lines of target text
and never hears the target. Rate, epoch and α are chosen on validation, once by text alone and once
among those that lose at most two points of word accuracy on source *speech*, which a monitor
measures after every epoch. What stands in the table is on test.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import circuitlens as cl
from circuitlens.experiments.simple_rivals import simple_rival
from circuitlens.view.small_multiples import below, panels, strategy_styles
from figures.speech_world import speech_task, text_task, train_from_scratch

HERE = Path(__file__).parent
FOLDER = HERE / "speech"
IMAGES = HERE.parent / "docs" / "images"
STRATEGIES = ("circuit", "near-zero", "random", "norms", "lora-norms", "full")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
EPOCHS = 8
SHARE = 0.25
KEEP = 0.02
ON_SPEECH = "full, on target speech"


def accuracy(model: cl.HookedModel, task: cl.Task) -> float:
    """On the test split."""
    return cl.evaluate(model, task, "test", quiet=True).accuracy


def of_seed(seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one seed."""
    model = train_from_scratch(seed)
    text = {d: text_task("source", seed).to(d) for d in ("source", "target")}
    speech = {d: speech_task("source", seed).to(d) for d in ("source", "target")}
    baseline = cl.label_balanced_mean(model, text["source"], quiet=True)
    scores = cl.relevance(model, text["source"], baseline, quiet=True)
    circuit = scores.top(SHARE)
    on_speech = cl.label_balanced_mean(model, speech["source"], quiet=True)
    faithful = {
        "on text": cl.faithfulness(
            model, text["source"], scores, baseline, sizes=[len(circuit)], quiet=True
        ),
        "on speech": cl.faithfulness(
            model, speech["source"], scores, on_speech, sizes=[len(circuit)], quiet=True
        ),
    }

    def row(strategy: str, limit: float | None, now: cl.HookedModel) -> dict[str, Any]:
        found = {"seed": seed, "strategy": strategy, "keep_monitor": limit}
        for domain in ("target", "source"):
            found[f"{domain} speech"] = accuracy(now, speech[domain])
            found[f"{domain} text"] = accuracy(now, text[domain])
        return found

    yield row("before", None, model) | {
        f"faithfulness {where}": curve.at(len(circuit))["faithfulness"]
        for where, curve in faithful.items()
    }
    shared: dict[str, Any] = {
        "scores": scores,
        "learning_rates": RATES,
        "epochs": EPOCHS,
        "seed": seed,
        "monitor": {"source speech": speech["source"]},
        "quiet": True,
    }
    for limit in (None, KEEP):
        for strategy in STRATEGIES:
            result = cl.transfer(
                model, circuit, text["target"], strategy=strategy, keep_monitor=limit, **shared
            )
            assert result.model is not None
            if seed == SEEDS[0] and limit is None and strategy in ("circuit", "lora-norms", "full"):
                keep_numbers(result, FOLDER / "unbound" / strategy)
            yield row(strategy, limit, result.model) | {
                "n_trainable": result.n_trainable,
                "learning_rate": result.learning_rate,
                "alpha": result.alpha,
                "source speech on validation": result.monitored["source speech"][1],
            }
    # What sound of the target would give, under the same limit.
    heard = cl.transfer(
        model, circuit, speech["target"], strategy="full", keep_monitor=KEEP, **shared
    )
    assert heard.model is not None
    yield row(ON_SPEECH, KEEP, heard.model) | {
        "n_trainable": heard.n_trainable,
        "learning_rate": heard.learning_rate,
        "alpha": heard.alpha,
    }
    # They see the words before, and no sound.
    for name in ("majority", "n-grams"):
        rival = simple_rival(speech["target"], name)
        yield {"seed": seed, "strategy": name, "target speech": rival.result.accuracy}


def keep_numbers(result: cl.TransferResult, folder: Path) -> None:
    """Save a result without its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        result.save(scratch)
        shutil.copyfile(Path(scratch) / "result.json", folder / "result.json")


def draw(table: pd.DataFrame) -> go.Figure:
    """Word accuracy on the speech of both domains, with and without the limit; a dot per seed."""
    measures = ("target speech", "source speech")
    fig = panels(
        [f"{measure}: word accuracy, %" for measure in measures],
        columns=2,
        panel=44 * len(STRATEGIES),
        legend=2,
        bottom=0,
    )
    styles = strategy_styles(STRATEGIES)
    for column, measure in enumerate(measures, start=1):
        before = 100 * table.loc[table["strategy"] == "before", measure].mean()
        fig.add_scatter(
            x=[before, before],
            y=[-0.6, len(STRATEGIES) - 0.4],
            mode="lines",
            line={"dash": "dash", "width": 1, "color": "#555"},
            showlegend=False,
            row=1,
            col=column,
        )
        for strategy in STRATEGIES:
            own = table[table["strategy"] == strategy]
            colour, symbol = styles[strategy]
            for bound, shift in ((False, 0.16), (True, -0.16)):
                values = 100 * own.loc[own["keep_monitor"].notna() == bound, measure]
                place = STRATEGIES[::-1].index(strategy) + shift
                style = {"color": colour, "symbol": symbol if bound else f"{symbol}-open"}
                about = {"showlegend": False, "mode": "markers", "hoverinfo": "x"}
                fig.add_scatter(
                    x=values,
                    y=[place] * len(values),
                    marker={**style, "size": 5, "opacity": 0.6},
                    **about,
                    row=1,
                    col=column,
                )
                fig.add_scatter(
                    x=[values.mean()], y=[place], marker={**style, "size": 11}, **about, row=1,
                    col=column,
                )  # fmt: skip
    for name, symbol in (("chosen by text alone", "circle-open"), ("source speech kept", "circle")):
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": "#555"},
        )
    fig.update_xaxes(range=[0, 104])
    fig.update_yaxes(
        range=[-0.6, len(STRATEGIES) - 0.4],
        tickvals=list(range(len(STRATEGIES))),
        ticktext=STRATEGIES[::-1],
    )
    fig.update_layout(legend=below("large: mean of three seeds; dashed: before"))
    return fig


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over seeds, in percent."""
    columns = ["target speech", "source speech", "target text", "source text"]
    shown = table.assign(**{name: 100 * table[name] for name in columns})
    groups = shown.groupby(["keep_monitor", "strategy"], dropna=False, sort=False)
    found = groups[columns].agg(["mean", "std"]).round(1)
    found["n_trainable"] = groups["n_trainable"].mean()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        FOLDER.mkdir(exist_ok=True)
        rows: list[dict[str, Any]] = []
        for seed in SEEDS:
            for found in of_seed(seed):
                rows.append(found)
                print(json.dumps(found), flush=True)
        pd.DataFrame(rows).to_csv(FOLDER / "table.csv", index=False)
    table = pd.read_csv(FOLDER / "table.csv")
    print(summary(table).to_string())
    cl.view.export(draw(table), IMAGES / "speech.svg", width="page")
    results = [cl.TransferResult.load(path) for path in sorted((FOLDER / "unbound").iterdir())]
    curves = cl.view.training_curves(results)
    cl.view.export(curves, IMAGES / "speech-training.svg", width="page")


if __name__ == "__main__":
    main()
