from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FAST, GRID, small
from typer.testing import CliRunner

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.adapt.options import TRANSFER
from circuitlens.cli import app
from circuitlens.experiments import cells, grid
from circuitlens.experiments.paired import bootstrap_difference
from circuitlens.run_folder import RunFolder
from circuitlens.run_settings import RunSettings
from circuitlens.tasks import toy
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_json

METRICS = {"accuracy", "macro_f1", "margin", "calibration_error"}


@pytest.fixture(scope="module")
def parts():
    return small()


def scores_of(model: cl.HookedModel) -> cl.HeadScores:
    g = model.geometry
    values = torch.randn(5, g.n_layers, g.n_heads, generator=torch.Generator().manual_seed(0))
    return cl.HeadScores(values, "random", "all", tuple("abcde"), Provenance("m", "f", "t", "d", 0))


@pytest.fixture(scope="module")
def whole(parts):
    """An uninterrupted comparison in memory."""
    return cl.compare(*parts, ["near"], **GRID, **FAST)


def numbers(comparison) -> pd.DataFrame:
    """The table without what a second run measures differently."""
    frame = comparison.to_frame()
    return frame[~frame["metric"].isin(["seconds", "peak_mib"])].reset_index(drop=True)


# -- hand-made cells -------------------------------------------------------------------------


def made(language, strategy, seed, right, source=(0.9, 0.8), **more):
    def evaluation(accuracy):
        return {
            "n": len(right),
            "accuracy": accuracy,
            "macro_f1": accuracy / 2,
            "margin": 3.0,
            "calibration_error": 0.1,
        }

    retained = [{"name": "t/src", "before": evaluation(source[0]), "after": evaluation(source[1])}]
    return {
        "strategy": strategy,
        "target_language": language,
        "source_language": "src",
        "seed": seed,
        "target_before": evaluation(0.25),
        "target_after": evaluation(float(np.mean(right))),
        "retained": retained,
        "n_trainable": 10,
        "seconds": 2.0 + seed,
        "peak_mib": 5.0,
        "target_right": [int(r) for r in right],
        **more,
    }


def draw(n, share, seed):
    rng = random.Random(seed)
    return [rng.random() < share for _ in range(n)]


@pytest.fixture(scope="module")
def handmade():
    return cl.Comparison(
        tuple(
            made(language, strategy, seed, draw(n, share, f"{language}{strategy}{seed}"))
            for language, n in (("x", 80), ("y", 50))
            for strategy, share in (("circuit", 0.8), ("full", 0.6))
            for seed in (0, 1, 2)
        )
    )


def test_the_tidy_table_has_every_number_once(handmade):
    frame = handmade.to_frame()
    assert list(frame.columns) == [
        "language", "strategy", "seed", "split", "phase", "metric", "value",
    ]  # fmt: skip
    # Two splits, two phases, four metrics; three costs, as these cells are from before 0.2.
    assert len(frame) == 12 * (2 * 2 * 4 + 3)
    assert not frame.duplicated(["language", "strategy", "seed", "split", "phase", "metric"]).any()
    at = frame.set_index(["language", "strategy", "seed", "split", "phase", "metric"])["value"]
    right = draw(50, 0.6, "yfull2")
    assert at["y", "full", 2, "target", "after", "accuracy"] == sum(right) / 50
    assert at["y", "full", 2, "t/src", "before", "macro_f1"] == 0.45
    assert at["y", "full", 2, "", "after", "seconds"] == 4.0
    assert set(frame[frame["split"] == ""]["metric"]) == {"n_trainable", "seconds", "peak_mib"}


def test_the_summary_is_over_seeds(handmade):
    row = handmade.summary().set_index(["language", "strategy"]).loc[("x", "circuit")]
    accuracies = [sum(draw(80, 0.8, f"xcircuit{s}")) / 80 for s in range(3)]
    mean = sum(accuracies) / 3
    spread = (sum((a - mean) ** 2 for a in accuracies) / 2) ** 0.5
    assert row["n_seeds"] == 3
    assert row["target_before"] == 0.25
    assert row["target_after"] == pytest.approx(mean)
    assert row["target_after_sd"] == pytest.approx(spread)
    assert row["gain"] == pytest.approx(mean - 0.25)
    assert (row["source_before"], row["source_after"]) == pytest.approx((0.9, 0.8))
    assert row["source_after_sd"] == pytest.approx(0)
    assert row["seconds"] == 3.0
    lonely = cl.Comparison((made("x", "full", 0, [1, 0], source_language=None, retained=[]),))
    row = lonely.summary().iloc[0]
    assert row["target_after"] == 0.5
    assert np.isnan(row["target_after_sd"])
    assert np.isnan(row["source_before"])
    assert len(cl.Comparison(()).summary()) == len(cl.Comparison(()).to_frame()) == 0


def plain_bootstrap(comparison, a, b, languages, draws):
    """The same, example by example, in plain Python."""
    by = {
        (c["target_language"], c["strategy"], c["seed"]): c["target_right"]
        for c in comparison.cells
    }
    rng = random.Random(1)
    means = []
    for _ in range(draws):
        each = []
        for language in languages:
            n = len(by[language, a, 0])
            chosen = [rng.randrange(n) for _ in range(n)]
            accuracy = {
                s: sum(by[language, s, seed][i] for seed in (0, 1, 2) for i in chosen) / (3 * n)
                for s in (a, b)
            }
            each.append(accuracy[a] - accuracy[b])
        means.append(sum(each) / len(each))
    return sorted(means)


@pytest.mark.parametrize("language", ["x", "y", None])
def test_the_paired_interval_agrees_with_a_plain_bootstrap(handmade, language):
    found = handmade.paired("circuit", "full", language, level=0.9, draws=4000)
    languages = ["x", "y"] if language is None else [language]
    frame = handmade.summary().set_index(["language", "strategy"])["target_after"]
    expected = np.mean([frame[n, "circuit"] - frame[n, "full"] for n in languages])
    assert found.difference == pytest.approx(expected)
    means = plain_bootstrap(handmade, "circuit", "full", languages, 2000)
    assert found.low == pytest.approx(means[100], abs=0.012)
    assert found.high == pytest.approx(means[1900], abs=0.012)
    assert found.n_examples == {"x": 80, "y": 50, None: 130}[language]
    assert (found.n_seeds, found.n_languages) == (3, len(languages))
    back = handmade.paired("full", "circuit", language, level=0.9, draws=4000)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )
    assert back.p == found.p


def test_p_is_the_share_of_draws_beyond_zero_doubled():
    # One example decides: the mean of a draw is 0 or less whenever it is drawn too rarely.
    values = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    _, _, _, p = bootstrap_difference([values], 0.95, 20_000)
    rng = random.Random(0)
    sums = [sum(rng.choice(values) for _ in range(6)) for _ in range(20_000)]
    assert p == pytest.approx(2 * sum(s <= 0 for s in sums) / 20_000, abs=0.02)
    with pytest.raises(cl.InputError, match="draws must be positive, but is 0"):
        bootstrap_difference([values], 0.95, 0)


def test_sentences_of_parallel_languages_are_drawn_together():
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 0.0, 1.0], 120)
    names = [f"s{n}" for n in range(120)]
    order = rng.permutation(120)
    moved, moved_names = values[order], [names[n] for n in order]
    alone = bootstrap_difference([values], 0.95, 4000, [names])
    # The same differences in two languages, in whatever order: one language's worth of evidence.
    both = bootstrap_difference([values, moved], 0.95, 4000, [names, moved_names])
    assert both == pytest.approx(alone)
    apart = bootstrap_difference([values, moved], 0.95, 4000, [names, [f"t{n}" for n in names]])
    unknown = bootstrap_difference([values, moved], 0.95, 4000)
    width = {k: v[2] - v[1] for k, v in (("both", both), ("apart", apart), ("unknown", unknown))}
    assert width["apart"] == pytest.approx(width["unknown"], rel=0.1)
    assert width["both"] / width["apart"] == pytest.approx(np.sqrt(2), rel=0.1)


def test_drawing_together_agrees_with_drawing_ids_by_hand():
    rng = np.random.default_rng(1)
    ids = [[str(n) for n in range(30)], [str(n) for n in range(10, 50)]]
    values = [rng.normal(0.2, 1, 30), rng.normal(0.1, 1, 40)]
    _, low, high, _ = bootstrap_difference(values, 0.9, 20_000, ids)
    tables = [dict(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
    blocks = [list(map(str, r)) for r in (range(10), range(10, 30), range(30, 50))]
    means = []
    for _ in range(20_000):
        drawn = [rng.choice(block, len(block)) for block in blocks]
        chosen = [n for block in drawn for n in block]
        means.append(np.mean([np.mean([t[n] for n in chosen if n in t]) for t in tables]))
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.01)


def test_equal_strategies_differ_by_exactly_nothing_and_opposite_ones_by_one():
    right = [draw(30, 0.7, s) for s in range(3)]
    cells = [made("x", name, s, right[s]) for name in ("circuit", "same") for s in range(3)]
    cells += [made("x", "opposite", s, [not r for r in right[s]]) for s in range(3)]
    cells += [made("x", name, 0, [name == "all"] * 30) for name in ("all", "none")]
    comparison = cl.Comparison(tuple(cells))
    same = comparison.paired("circuit", "same")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    best = comparison.paired("all", "none")
    assert (best.difference, best.low, best.high, best.p) == (1, 1, 1, 0)
    assert best.n_seeds == 1
    # The seeds that both have, and no others.
    other = comparison.paired("circuit", "none")
    assert other.n_seeds == 1
    assert other.difference == pytest.approx(sum(right[0]) / 30)


def test_regret_is_the_distance_to_the_best_other_strategy_over_common_seeds():
    cells = [
        made("x", "auto", 0, [1, 1, 0, 0]),
        made("x", "a", 0, [1, 1, 1, 0]),
        # Over both seeds b would be the best; auto has the first only.
        made("x", "b", 0, [1, 0, 0, 0]),
        made("x", "b", 1, [1, 1, 1, 1]),
        made("y", "auto", 0, [1, 1]),
        made("y", "b", 0, [1, 0]),
        made("z", "auto", 0, [1, 1]),
    ]
    rows = cl.Comparison(tuple(cells)).regret().to_dict("records")
    assert [(r["language"], r["best"], r["regret"], r["n_seeds"]) for r in rows] == [
        ("x", "a", 0.25, 1),
        ("y", "b", -0.5, 1),
    ]
    assert (rows[0]["accuracy"], rows[0]["best_accuracy"]) == (0.5, 0.75)
    with pytest.raises(cl.InputError, match="no finished cell of the strategy 'auto'"):
        cl.Comparison((cells[1],)).regret()


def test_pairs_compare_the_reference_with_all_others(handmade):
    more = (*handmade.cells, made("y", "norms", 0, draw(50, 0.5, "n")))
    frame = cl.Comparison(more).pairs()
    assert list(zip(frame["language"], frame["b"], strict=True)) == [
        ("x", "full"), ("y", "full"), ("y", "norms"),
        ("all languages", "full"), ("all languages", "norms"),
    ]  # fmt: skip
    assert set(frame["a"]) == {"circuit"}
    assert frame["difference"].tolist()[3] == handmade.paired("circuit", "full").difference
    assert frame["n_examples"].tolist() == [80, 50, 50, 130, 50]
    for call, pattern in (
        (lambda: handmade.pairs("magic"), "strategy 'magic'; it has circuit, full"),
        (lambda: handmade.paired("circuit", "lora"), "strategy 'lora'; it has circuit, full"),
        (lambda: handmade.paired("circuit", "full", "z"), "language 'z'; it has x, y"),
        (lambda: handmade.paired("circuit", "full", level=1.5), "between 0 and 1"),
    ):
        with pytest.raises(cl.InputError, match=pattern):
            call()
    apart = cl.Comparison((made("x", "a", 0, [1]), made("x", "b", 1, [1])))
    with pytest.raises(cl.InputError, match="a and b have no seed in common in x"):
        apart.paired("a", "b", "x")
    assert apart.pairs("a").empty


def test_it_saves_and_loads(handmade, tmp_path):
    error = {"language": "x", "strategy": "lora", "seed": 0, "type": "E", "message": "a < b"}
    comparison = cl.Comparison(handmade.cells, (error,))
    comparison.save(tmp_path)
    assert cl.Comparison.load(tmp_path) == comparison
    # A line for each cell, not for each number.
    text = (tmp_path / "comparison.json").read_text()
    assert len(text.splitlines()) < len(comparison.cells) + 10
    assert len(repr(comparison)) < 200
    table = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(table, comparison.to_frame(), check_dtype=False)
    summary = pd.read_csv(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(summary, comparison.summary(), check_dtype=False)
    shown = comparison._repr_html_()
    assert "target_after_sd" in shown
    assert "x, lora, seed 0: E: a &lt; b" in shown
    with pytest.raises(cl.InputError, match="no file"):
        cl.Comparison.load(tmp_path / "nothing")


# -- the grid --------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """Transfers that take no time; returns the list of those that were begun."""
    begun: list[tuple[str, str, int]] = []

    def transfer(model, circuit, task, *, strategy, training, **options):
        seed = training.seed
        begun.append((task.language, strategy, seed))
        cell = made(task.language, strategy, 7, draw(20, 0.5, f"{strategy}{seed}"))
        return SimpleNamespace(to_dict=lambda: cell)

    monkeypatch.setattr(cells, "transfer", transfer)
    return begun


def test_cells_are_the_transfers_themselves(parts, whole):
    model, circuit, task = parts
    transfer_options = {k: v for k, v in FAST.items() if k != "simple"}
    alone = cl.transfer(
        model, circuit, task.to("near"), strategy="random", seed=1, **transfer_options
    ).to_dict()
    cell = next(c for c in whole.cells if (c["strategy"], c["seed"]) == ("random", 1))
    assert cell["peak_mib"] >= 0
    assert set(cell) == {*alone, "seed", "peak_mib"}
    for name in set(alone) - {"seconds"}:
        assert cell[name] == alone[name], name
    frame = whole.to_frame()
    assert set(frame["split"]) == {"target", "toy/source", ""}
    assert set(frame[frame["split"] == "target"]["metric"]) == METRICS
    assert len(whole.summary()) == 2
    assert not whole.errors


def test_finished_cells_are_kept_and_the_grid_grows(parts, fake, tmp_path):
    out = tmp_path / "grid"
    first = cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    assert len(fake) == 4
    assert (out / "cells" / "near" / "random" / "seed-1.json").is_file()
    assert cl.Comparison.load(out) == first
    again = cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    assert again == first
    assert len(fake) == 4
    grown = cl.compare(*parts, ["far", "near"], strategies=["norms"], seeds=[2, 0], out=out, **FAST)
    assert fake[4:] == [("far", "norms", 2), ("far", "norms", 0), ("near", "norms", 2)]
    # What was asked for is returned; the folder holds all.
    keys = [(c["target_language"], c["strategy"], c["seed"]) for c in grown.cells]
    assert keys == [(n, "norms", s) for n in ("far", "near") for s in (2, 0)]
    saved = cl.Comparison.load(out)
    assert len(saved.cells) == 7
    assert saved.languages == ("near", "far")
    assert len(pd.read_csv(out / "table.csv")) == len(saved.to_frame())


def test_other_settings_are_refused(parts, fake, tmp_path):
    model, circuit, task = parts
    out = tmp_path / "grid"
    cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    other = toy.toy_model(n_layers=1, seed=5)
    cases = {
        r"epochs was 1, now 2": {"epochs": 2},
        r"learning_rates was \[0\.001\], now \[0\.01\]": {"learning_rates": [1e-2]},
        r"kv_policy was 'shared', now 'frozen'": {"kv_policy": "frozen"},
        r"retain was \[\], now \['toy/far ": {"retain": [task.to("far")]},
        r"model was '\w+', now '\w+'": {"model": other},
        r"circuit was \['a0.h1', 'a0.h2'\], now \[": {"circuit": circuit.complement()},
        r"task was 'toy/source ": {"task": cl.load_task("toy", seed=3)},
    }
    for pattern, change in cases.items():
        options = {"model": model, "circuit": circuit, "task": task, **FAST, **change}
        with pytest.raises(cl.InputError, match=pattern) as caught:
            cl.compare(languages=["near"], **GRID, out=out, **options)
        assert "choose another out" in str(caught.value)
    assert len(fake) == 4
    # Scores may come later, but not change then.
    scores = scores_of(model)
    grow = {**FAST, "strategies": ["near-zero"], "seeds": [0], "out": out}
    cl.compare(*parts, ["near"], scores=scores, **grow)
    changed = replace(scores, per_example=scores.per_example + 1)
    with pytest.raises(cl.InputError, match=r"scores was '\w+', now '\w+'"):
        cl.compare(*parts, ["near"], scores=changed, **grow)
    cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    assert len(fake) == 5


def test_mistakes_are_found_before_any_work(parts, fake, tmp_path):
    model, circuit, task = parts
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    out = tmp_path / "new"
    cases = {
        "Give at least one language": {"languages": []},
        "Give at least one seed": {"seeds": []},
        "Give at least one learning rate": {"learning_rates": []},
        "no language 'mars'": {"languages": ["near", "mars"]},
        "no strategy 'magic'": {"strategies": ["norms", "magic"]},
        "'near-zero' chooses by the heads' scores": {"strategies": ["norms", "near-zero"]},
        "epochs must be a whole number of at least 1, but is 0": {"epochs": 0},
        "replay is a number": {"replay": -1.0},
        "is of a 3 × 4 model": {"circuit": cl.Circuit.of(["a0.h0"], 3, 4)},
        "Retention of toy/source was asked for twice": {"retain": [task]},
        "Retention of toy/far was asked for twice": {"retain": ["far", task.to("far")]},
        r"languages is a list: give \['near'\]": {"languages": "near"},
        r"seeds is a list: give \[0\]": {"seeds": 0},
        "seed must be a whole number of at least 0, but is -1": {"seeds": [0, -1]},
        "There is no kv_policy 'gruop'": {"kv_policy": "gruop"},
        "scores are of a model with 1 × 4 heads": {
            "scores": replace(scores_of(model), per_example=scores_of(model).per_example[:, :, :4])
        },
        "contains no comparison": {"out": tmp_path / "used"},
    }
    for pattern, change in cases.items():
        options = {"circuit": circuit, "languages": ["near"], "out": out, **GRID, **FAST, **change}
        with pytest.raises(cl.InputError, match=pattern):
            # Without the type checks of the tests.
            inspect.unwrap(cl.compare)(model, task=task, **options)
        assert not out.exists(), pattern
    assert not fake


def test_numpy_numbers_are_numbers(parts, fake, tmp_path):
    options = {**FAST, "learning_rates": np.array([1e-3]), "strategies": ["norms"]}
    compare = inspect.unwrap(cl.compare)  # without the type checks of the tests
    found = compare(*parts, ["near"], **options, seeds=np.arange(2), out=tmp_path / "grid")
    assert [cell["seed"] for cell in found.cells] == [0, 1]
    again = compare(*parts, ["near"], **options, seeds=[0, 1], out=tmp_path / "grid")
    assert (again, len(fake)) == (found, 2)


def test_another_process_may_add_languages_meanwhile(parts, fake, tmp_path, monkeypatch):
    out, works = tmp_path / "grid", cells.transfer
    options = {**FAST, "strategies": ["norms"], "seeds": [0], "out": out}

    def beside(*arguments, **settings):
        monkeypatch.setattr(cells, "transfer", works)
        cl.compare(*parts, ["far"], **options)
        return works(*arguments, **settings)

    monkeypatch.setattr(cells, "transfer", beside)
    found = cl.compare(*parts, ["near"], **options)
    assert [cell["target_language"] for cell in found.cells] == ["near"]
    assert cl.Comparison.load(out).languages == ("near", "far")


def test_a_failure_is_recorded_and_tried_again(parts, fake, tmp_path, monkeypatch):
    out = tmp_path / "grid"
    works = cells.transfer

    def fails(*arguments, strategy, training, **options):
        if (strategy, training.seed) == ("norms", 0):
            raise RuntimeError("no memory left")
        return works(*arguments, strategy=strategy, training=training, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "transfer", fails)
        partial = cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    error = {
        "language": "near", "strategy": "norms", "seed": 0,
        "type": "RuntimeError", "message": "no memory left",
    }  # fmt: skip
    assert partial.errors == (error,)
    assert len(partial.cells) == 3
    assert cl.Comparison.load(out) == partial
    file = out / "cells" / "near" / "norms" / "seed-0.error.json"
    assert read_json(file, "circuitlens.cell-error/1") == error
    fake.clear()
    full = cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    assert fake == [("near", "norms", 0)]
    assert not full.errors
    assert len(full.cells) == 4
    assert not file.exists()


def test_a_strategy_that_breaks_leaves_the_others(parts, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("broken")

    monkeypatch.setitem(STRATEGIES, "full", replace(STRATEGIES["full"], make=broken))
    found = cl.compare(*parts, ["near"], strategies=["full", "norms"], seeds=[0], **FAST)
    assert [e["type"] for e in found.errors] == ["ZeroDivisionError"]
    assert found.strategies == ("norms",)


def test_numbers_that_are_not_finite_are_a_failure(parts, monkeypatch, tmp_path):
    cell = made("near", "norms", 0, [1, 0], seconds=float("nan"))
    monkeypatch.setattr(cells, "transfer", lambda *_, **__: SimpleNamespace(to_dict=lambda: cell))
    options = {"strategies": ["norms"], "seeds": [0], **FAST}
    for out in (None, tmp_path / "grid"):
        found = cl.compare(*parts, ["near"], out=out, **options)
        assert [e["type"] for e in found.errors] == ["ValueError"]
        assert not found.cells


def test_an_interrupt_is_no_failure(parts, fake, tmp_path, monkeypatch):
    out = tmp_path / "grid"
    works = cells.transfer

    def interrupted(*arguments, **options):
        if len(fake) == 2:
            raise KeyboardInterrupt
        return works(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "transfer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    files = sorted(p.name for p in out.rglob("*") if p.is_file() and p.suffix != ".lock")
    assert files == ["grid.json", "seed-0.json", "seed-1.json"]
    cl.compare(*parts, ["near"], **GRID, out=out, **FAST)
    assert len(fake) == 4


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import circuitlens as cl
from circuitlens.adapt.options import TRANSFER
from helpers import FAST, GRID, small

replace, written = os.replace, []
def kill_at_the_third_cell(source, to):
    if str(to).rsplit(os.sep)[-1].startswith("seed-"):
        written.append(to)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)
os.replace = kill_at_the_third_cell
cl.compare(*small(), ["near"], **GRID, **FAST, out=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_grid_goes_on_to_the_same_numbers(parts, whole, tmp_path, monkeypatch):
    out = tmp_path / "grid"
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = sorted((out / "cells").glob("*/*/*.json"))
    assert [p.name for p in written] == ["seed-0.json", "seed-1.json"]
    for path in written:
        assert json.loads(path.read_text())["strategy"] == "random"
    begun = []
    works = cells.transfer

    def counted(*arguments, **options):
        begun.append((options["strategy"], options["training"].seed))
        return works(*arguments, **options)

    monkeypatch.setattr(cells, "transfer", counted)
    found = cl.compare(*parts, ["near"], **GRID, **FAST, out=out)
    assert begun == [("norms", 0), ("norms", 1)]
    pd.testing.assert_frame_equal(numbers(found), numbers(whole))
    right = [[c["target_right"] for c in comparison.cells] for comparison in (found, whole)]
    assert right[0] == right[1]


# -- other processes ---------------------------------------------------------------------------


def spawned(n: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.slow
def test_cells_run_by_other_processes_are_the_same_to_the_bit(parts, tmp_path):
    options = {"strategies": ["circuit", "random"], "seeds": [1], **FAST, "epochs": 2}
    here = cl.compare(*parts, ["near"], **options, out=tmp_path / "here")
    with spawned(2) as executor:
        there = cl.compare(*parts, ["near"], **options, out=tmp_path / "there", executor=executor)
    assert not there.errors
    kept = [[{**c, "seconds": 0, "peak_mib": 0} for c in found.cells] for found in (here, there)]
    assert kept[0] == kept[1]
    assert cl.Comparison.load(tmp_path / "there") == there
    # The model was there for the processes only.
    names = {p.name for p in (tmp_path / "there").iterdir()}
    assert not [name for name in names if name.startswith(".model")]


class Here(Executor):
    """Runs what is submitted at once, with a copy as a process would have it."""

    def __init__(self):
        self.specs = []

    def submit(self, function, /, *arguments, **options):
        future: Future = Future()
        self.specs.append(pickle.loads(pickle.dumps(arguments[0])))
        try:
            future.set_result(function(*self.specs[-1:], **options))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_a_cell_is_a_small_specification(parts, fake):
    executor = Here()
    found = cl.compare(*parts, ["near", "far"], **GRID, **FAST, executor=executor)
    assert len(found.cells) == len(fake) == len(executor.specs) == 8
    weights = sum(p.numel() * p.element_size() for p in parts[0].hf.parameters())
    spec = executor.specs[0]
    assert isinstance(spec.model, cells.ModelReference)
    assert spec.model.fingerprint == parts[0].fingerprint()
    task = len(pickle.dumps(spec.task))
    assert len(pickle.dumps(spec)) - task < min(20_000, weights)


def test_a_model_that_is_another_one_in_its_folder_is_refused(parts, tmp_path):
    reference = cells.ModelReference.save(parts[0], tmp_path / "m")
    assert reference.open().fingerprint() == parts[0].fingerprint()
    assert reference.open() is reference.open()
    other = replace(reference, fingerprint="other")
    with pytest.raises(cl.InputError, match=r"is another model .*compare without an executor"):
        other.open()


def test_a_failure_in_another_process_is_recorded(parts, fake, monkeypatch):
    works = cells.transfer

    def fails(*arguments, strategy, **options):
        if strategy == "norms":
            raise RuntimeError("no luck")
        return works(*arguments, strategy=strategy, **options)

    monkeypatch.setattr(cells, "transfer", fails)
    found = cl.compare(*parts, ["near"], **GRID, **FAST, executor=Here())
    assert len(found.cells) == 2
    assert {e["message"] for e in found.errors} == {"no luck"}


@pytest.mark.parametrize("by", [None, "executor"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_that_failed_ends_the_grid(parts, fake, monkeypatch, tmp_path, error, by):
    works = cells.transfer

    def fails(*arguments, **options):
        if len(fake) == 1:
            raise error("device gone")
        return works(*arguments, **options)

    monkeypatch.setattr(cells, "transfer", fails)
    out = tmp_path / "grid"
    with pytest.raises(error, match="device gone"):
        cl.compare(*parts, ["near"], **GRID, **FAST, out=out, executor=by and Here())
    assert len(list(out.rglob("seed-*.error.json"))) == 1
    if by is None:
        assert len(fake) == 1


def test_without_scores_the_default_leaves_out_what_needs_them(parts, fake, caplog):
    caplog.set_level("INFO", logger="circuitlens")
    found = cl.compare(*parts, ["near"], seeds=[0], **FAST)
    assert found.strategies == ("circuit", "random", "norms", "lora", "full")
    assert "Without scores=… the comparison leaves out near-zero" in caplog.text
    found = cl.compare(*parts, ["near"], seeds=[0], scores=scores_of(parts[0]), **FAST)
    assert found.strategies == ("circuit", "near-zero", "random", "norms", "lora", "full")


def test_threads_and_other_things_are_no_executors(parts, fake):
    with pytest.raises(cl.InputError, match="not safe in threads"):
        cl.compare(*parts, ["near"], **GRID, executor=ThreadPoolExecutor(1))
    with pytest.raises(cl.InputError, match=r"executor is .* but got 'two'"):
        inspect.unwrap(grid.check_executor)("two", torch.device("cpu"))
    assert not fake


def test_a_cell_that_is_being_run_elsewhere_is_waited_for(parts, fake, tmp_path):
    out = tmp_path / "grid"
    options = {"strategies": ["norms"], "seeds": [0], **FAST, "out": out}
    cl.compare(*parts, ["near"], **options)
    folder, key = cells.CellFolder(out), cells.Key("near", "norms", 0)
    finished = folder.read(key)
    (out / "cells" / "near" / "norms" / "seed-0.json").unlink()
    fake.clear()
    lock = folder.lock(key)
    lock.acquire()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(cl.compare, *parts, ["near"], **options)
        try:
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            # The other process finishes it.
            folder.write(key, finished)
        finally:
            lock.release()
    assert not waiting.result(timeout=60).errors
    assert not fake


# -- the command line ------------------------------------------------------------------------


QUICK = ("-q", "--no-simple")


def test_the_command_compares_on_a_run(tmp_path, fake):
    settings = RunSettings(
        model="toy",
        task="toy",
        targets=("near",),
        competence="never",
        learning_rates=(1e-3,),
        training=TRANSFER.updated({"epochs": 1}),
        strategies=("circuit", "norms"),
    )
    run = tmp_path / "run"
    scores = scores_of(RunFolder.create(run, settings, quiet=True).model)
    scores.save(run / "scores.safetensors")
    scores.top(4).save(run / "circuit.json")
    done = CliRunner().invoke(
        app,
        ["compare", str(run), *QUICK, "--target", "far", "--seed", "0", "--seed", "4"],
    )
    assert done.exit_code == 0, done.output
    assert fake == [("far", s, seed) for s in ("circuit", "norms") for seed in (0, 4)]
    assert "circuit minus that of others" in done.output
    assert "all languages" not in done.output
    assert " ± " in done.output
    assert cl.Comparison.load(run / "compare").languages == ("far",)
    done = CliRunner().invoke(app, ["compare", str(run), *QUICK, "--strategy", "full"])
    assert done.exit_code == 0, done.output
    assert fake[4:] == [("near", "full", seed) for seed in (0, 1, 2)]
    done = CliRunner().invoke(app, ["compare", str(run), "-q", "--strategy", "magic"])
    assert done.exit_code == 2
    assert "'magic' is not one of" in " ".join(done.output.split())


def test_the_command_says_what_failed(tmp_path, parts, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no memory left")

    model, circuit, task = parts
    monkeypatch.setattr(cells, "transfer", fails)
    run = SimpleNamespace(
        model=model,
        circuit=circuit,
        task=task,
        scores=None,
        outdate=lambda: None,
        settings=RunSettings(model="toy", task="toy", targets=("near",), strategies=("norms",)),
    )
    monkeypatch.setattr(RunFolder, "open", lambda *_, **__: run)
    (tmp_path / "run.json").touch()
    done = CliRunner().invoke(app, ["compare", str(tmp_path), "--seed", "0"])
    assert done.exit_code == 1
    assert "1 failed; the same command tries them again" in done.output
