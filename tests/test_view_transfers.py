"""Figures of transfers: what is in the traces is what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import cell, evaluation, result

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.tasks.evaluation import Evaluation
from circuitlens.view.gallery import figures_of
from circuitlens.view.small_multiples import MEAN, shown, strategy_styles, transfer_points
from circuitlens.view.strategy_grids import paired_differences, strategy_table
from circuitlens.view.theme import look
from circuitlens.view.tradeoff import transfer_tradeoff
from circuitlens.view.training import drift_frame, history_frame, training_curves, weight_drift

EVIL = "<b>x</b> %{x} $a$"
SAFE = "&lt;b&gt;x&lt;/b&gt; %{x} &#36;a&#36;"
NAMES = [*STRATEGIES, "auto"]


@pytest.fixture
def comparison():
    """Two languages, two strategies, three seeds, and accuracies that are easy to reckon with."""
    after = {
        ("x", "circuit"): (0.6, 0.7, 0.8),
        ("x", "full"): (0.6, 0.6, 0.6),
        (EVIL, "circuit"): (0.5, 0.5, 0.8),
        (EVIL, "full"): (0.9, 0.8, 0.7),
    }
    kept = {"circuit": (0.9, 0.8, 0.7), "full": (0.5, 0.6, 0.4)}
    return cl.Comparison(
        tuple(
            cell(language, strategy, seed, values[seed], kept[strategy][seed])
            for (language, strategy), values in after.items()
            for seed in range(3)
        )
    )


def traces(fig, name):
    return [t for t in fig.data if t.name == name]


def texts(fig):
    """Everything that plotly would render as markup."""
    found = [a.text for a in fig.layout.annotations] + [t.name for t in fig.data]
    for trace in fig.data:
        found += np.asarray(trace.customdata, dtype=object).ravel().tolist()
    for axis in fig.select_xaxes():
        found += list(axis.ticktext or ())
    for axis in fig.select_yaxes():
        found += list(axis.ticktext or ())
    return [str(text) for text in found if text is not None]


# -- numbers ---------------------------------------------------------------------------------


def test_points_are_means_over_seeds_and_then_over_languages(comparison):
    points = transfer_points(comparison).set_index(["language", "strategy"])
    row = points.loc[("x", "circuit")]
    assert row["gain"] == pytest.approx(20)
    assert row["gain_sd"] == pytest.approx(10)
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((10, 30))
    assert row["source_change"] == pytest.approx(-10)
    assert row["source_change_sd"] == pytest.approx(10)
    assert row["source_after"] == pytest.approx(80)
    assert (row["n_seeds"], row["n_languages"]) == (3, 1)
    mean = points.loc[(MEAN, "circuit")]
    # Of each seed the mean over languages: 5, 10 and 30 points.
    assert mean["gain"] == pytest.approx(15)
    assert mean["gain_sd"] == pytest.approx(np.std([5, 10, 30], ddof=1))
    assert (mean["gain_low"], mean["gain_high"]) == pytest.approx((5, 30))
    assert (mean["n_seeds"], mean["n_languages"]) == (3, 2)


def test_the_mean_is_over_languages_that_have_every_strategy(comparison):
    half = cl.Comparison((*comparison.cells, cell("z", "full", 0, 1.0)))
    points = transfer_points(half)
    mean = points[points["language"] == MEAN].set_index("strategy")
    assert mean.loc["full", "gain"] == pytest.approx((10 + 30) / 2)
    assert mean.loc["full", "n_languages"] == 2
    # With a third strategy in one language only, nothing is left to compare.
    third = cl.Comparison((*comparison.cells, cell("x", "norms", 0, 1.0)))
    assert MEAN not in set(transfer_points(third)["language"])
    # Other seeds in either language: a mean, but no spread of it.
    apart = cl.Comparison((cell("x", "full", 0, 0.7), cell("y", "full", 1, 0.9)))
    mean = transfer_points(apart).set_index("language").loc[MEAN]
    assert mean["gain"] == pytest.approx(30)
    assert mean["n_seeds"] == 0
    assert np.isnan(mean["gain_sd"])
    with pytest.raises(cl.InputError, match="no finished transfer"):
        transfer_points(cl.Comparison(()))


def test_every_strategy_has_a_look_of_its_own():
    styles = strategy_styles(NAMES)
    assert len(set(styles.values())) == len({s.symbol for s in styles.values()}) == len(NAMES)
    assert strategy_styles(["full", "mine", "circuit"])["full"] == styles["full"]
    assert strategy_styles(["mine"])["mine"] not in styles.values()
    # A new strategy changes no other's look.
    assert {n: (s.colour, s.symbol) for n, s in STRATEGIES.items()} == {
        n: tuple(style) for n, style in styles.items() if n != "auto"
    }
    assert shown("a" * 40) == "a" * 23 + "…"


# -- trade-off -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_tradeoff_has_a_panel_for_every_language_and_the_mean(comparison, mode):
    fig = transfer_tradeoff(comparison, facets="all", mode=mode, columns=2)
    assert fig.layout.template.layout.paper_bgcolor == look(mode).paper
    assert [a.text for a in fig.layout.annotations] == ["x", SAFE, "<b>mean of 2 languages</b>"]
    circuit = traces(fig, "circuit")
    assert [t.xaxis for t in circuit] == ["x", "x2", "x3"]
    assert [t.showlegend for t in circuit] == [True, False, False]
    assert (circuit[0].x[0], circuit[0].y[0]) == pytest.approx((-10, 20))
    assert circuit[0].error_y.array[0] == pytest.approx(10)
    assert circuit[0].error_x.array[0] == pytest.approx(10)
    assert circuit[1].error_y.array[0] == pytest.approx(np.std([0, 0, 30], ddof=1))
    assert "standard deviation over 3 seeds" in fig.layout.legend.title.text
    assert {t.marker.color for t in circuit} == {strategy_styles(["circuit"])["circuit"].colour}
    assert {t.marker.symbol for t in circuit} == {"circle"}
    # The same axes everywhere, with room for the bars and for zero.
    ranges = {tuple(axis.range) for axis in fig.select_xaxes()}
    assert len(ranges) == 1
    low, high = ranges.pop()
    assert low < -50
    assert high > 0


def test_the_tradeoff_can_show_ranges_and_the_mean_alone(comparison):
    fig = transfer_tradeoff(comparison, intervals="range")
    bars = traces(fig, "full")[1].error_y
    assert (bars.array[0], bars.arrayminus[0]) == pytest.approx((10, 10))
    lopsided = traces(fig, "circuit")[1].error_y
    assert (lopsided.array[0], lopsided.arrayminus[0]) == pytest.approx((20, 10))
    assert "least to largest of 3 seeds" in fig.layout.legend.title.text
    assert len(fig.layout.annotations) == 2
    alone = transfer_tradeoff(comparison, facets="mean")
    assert len(alone.data) == 2
    assert traces(alone, "circuit")[0].y[0] == pytest.approx(15)
    one = cl.Comparison(tuple(c for c in comparison.cells if c["target_language"] == "x"))
    for call, pattern in (
        (lambda: transfer_tradeoff(one, facets="mean"), "at least two languages"),
        (lambda: transfer_tradeoff(one, facets="some"), "facets must be 'all'"),
        (lambda: transfer_tradeoff(one, intervals="iqr"), "'sd' or 'range', but are 'iqr'"),
        (lambda: transfer_tradeoff(one, columns=0), "columns must be positive"),
        (
            lambda: transfer_tradeoff([result(source_language=None, retained=())]),
            "None of these transfers measured a source",
        ),
    ):
        with pytest.raises(cl.InputError, match=pattern):
            call()


def test_single_results_have_no_bars_and_repeated_ones_are_seeds():
    fig = transfer_tradeoff([result(), result("full", source_language=None, retained=())])
    assert [t.name for t in fig.data] == ["circuit"]
    assert (fig.data[0].x[0], fig.data[0].y[0]) == pytest.approx((-10, 20))
    assert fig.data[0].error_y.array is None
    assert fig.layout.legend.title.text == "strategy"
    better = replace(result(seed=1), target_after=Evaluation(**evaluation(0.9)))
    fig = transfer_tradeoff([result(seed=0), better])
    assert fig.data[0].y[0] == pytest.approx(30)
    assert fig.data[0].error_y.array[0] == pytest.approx(np.std([20, 40], ddof=1))


def test_names_are_not_rendered(comparison):
    evil = cl.Comparison(tuple({**c, "strategy": EVIL} if c["strategy"] == "full" else c
                               for c in comparison.cells))  # fmt: skip
    figures = [
        transfer_tradeoff(evil),
        strategy_table(evil),
        paired_differences(evil),
        paired_differences(evil, EVIL),
        training_curves(evil),
    ]
    for fig in figures:
        assert any(SAFE in text for text in texts(fig))
        assert not any("<b>x</b>" in text for text in texts(fig))
        templates = [t.hovertemplate for t in fig.data]
        # %{x} of a name would be read as a placeholder there.
        assert not any("<b>x" in text or "a$" in text for text in templates)


# -- table and differences -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_table_writes_its_numbers_and_the_best_in_bold(comparison, mode):
    fig = strategy_table(comparison, mode=mode)
    heat = fig.data[0]
    # Two strategies, two languages: languages are the rows, and their mean the last.
    assert list(fig.layout.yaxis.ticktext) == ["x", SAFE, "<b>mean of 2</b>"]
    assert list(fig.layout.xaxis.ticktext) == ["circuit", "full"]
    np.testing.assert_allclose(heat.z, [[20, 10], [10, 30], [15, 20]])
    sd = np.std([0, 0, 30], ddof=1)
    assert heat.text[0].tolist() == ["<b>20.0</b><br>±10.0", "10.0<br>±0.0"]
    assert heat.text[1].tolist() == [f"10.0<br>±{sd:.1f}", "<b>30.0</b><br>±10.0"]
    assert heat.zmin == -heat.zmax
    assert heat.textfont.color == look(mode).ink
    assert "standard deviation over 3 seeds" in fig.layout.xaxis.title.text
    assert fig.layout.xaxis.title.text.endswith("bold: the best of a language")
    # One lucky seed is no rival of a mean.
    more = [*comparison.cells, cell("x", "auto", 0, after=0.99)]
    lucky = strategy_table(cl.Comparison(tuple(more)), mode=mode)
    texts = np.array(lucky.data[0].text)
    assert (texts == "49.0").sum() == 1
    assert "<b>20.0</b><br>±10.0" in texts
    assert "3 seeds; no ±: one seed" in lucky.layout.xaxis.title.text
    assert "among those with the most seeds" in lucky.layout.xaxis.title.text
    changes = strategy_table(comparison, "source_change", mode=mode).data[0]
    assert changes.text[0][1] == "−40.0<br>±10.0"
    after = strategy_table(comparison, "target_after", mode=mode).data[0]
    np.testing.assert_allclose(after.z[0], [70, 60])
    assert after.colorscale[0][1] == look(mode).sequential[0][1]
    with pytest.raises(cl.InputError, match=r"one of gain, target_after, .* but is 'loss'"):
        strategy_table(comparison, "loss")


def test_many_strategies_are_the_rows_and_what_is_missing_is_blank():
    cells = [cell("x", name, 0, 0.5 + 0.01 * i) for i, name in enumerate(NAMES)]
    cells += [cell("y", "circuit", 0, 0.49996)]
    fig = strategy_table(cl.Comparison(tuple(cells)))
    assert list(fig.layout.yaxis.ticktext) == NAMES
    assert list(fig.layout.xaxis.ticktext) == ["x", "y"]
    heat = fig.data[0]
    assert heat.text[-1].tolist() == [f"<b>{len(NAMES) - 1}.0</b>", ""]
    # Neither -0.0 nor a deviation of one seed.
    assert heat.text[0].tolist() == ["0.0", "<b>0.0</b>"]
    assert np.isnan(heat.z[-1][1])
    assert "one seed" in fig.layout.xaxis.title.text
    none = cell("x", "full", 0, 0.5, source_language=None, retained=[])
    with pytest.raises(cl.InputError, match="None of these transfers measured a source"):
        strategy_table(cl.Comparison((none,)), "source_after")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_differences_are_those_of_the_pairs(comparison, mode):
    fig = paired_differences(comparison, mode=mode)
    pairs = comparison.pairs("circuit")
    assert [a.text for a in fig.layout.annotations][:3] == ["x", SAFE, "<b>all languages</b>"]
    assert "circuit minus the other" in fig.layout.annotations[3].text
    assert len(fig.data) == len(pairs) == 3
    for trace, row in zip(fig.data, pairs.to_dict("records"), strict=True):
        assert trace.x[0] == pytest.approx(100 * row["difference"])
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(100 * row["high"])
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(100 * row["low"])
        sure = row["low"] > 0 or row["high"] < 0
        assert (trace.marker.color == look(mode).paper) == (not sure)
    assert all(axis.zeroline for axis in fig.select_xaxes())
    one = cl.Comparison(tuple(c for c in comparison.cells if c["target_language"] == "x"))
    assert len(paired_differences(one).data) == 1
    with pytest.raises(cl.InputError, match="no finished cell of the strategy 'norms'"):
        paired_differences(comparison, "norms")
    lonely = cl.Comparison((cell("x", "circuit", 0, 1.0),))
    with pytest.raises(cl.InputError, match="no other strategy to compare circuit with"):
        paired_differences(lonely)


# -- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_training_curves_mark_the_epoch_that_was_kept(mode):
    fig = training_curves(result(), mode=mode)
    accuracy, best, margin, best_margin = fig.data
    assert accuracy.x.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(accuracy.y, [50, 70, 70, 60])
    np.testing.assert_allclose(margin.y, [1, 2, 3, 9])
    # Of two with the same accuracy the one with the larger margin.
    assert (best.x.tolist(), best.y.tolist()) == ([3], [pytest.approx(70)])
    assert best_margin.y.tolist() == [3]
    assert best.marker.line.color == look(mode).ink
    assert [a.text for a in fig.layout.annotations] == ["accuracy, %", "margin, logits"]
    # Accuracy and margin have scales of their own.
    assert fig.layout.yaxis.range != fig.layout.yaxis2.range
    assert fig.layout.yaxis2.matches is None
    with pytest.raises(cl.InputError, match="history"):
        training_curves(result(history=()))


def test_training_curves_have_a_row_a_language_and_a_line_a_seed(comparison):
    fig = training_curves(comparison)
    lines = [t for t in traces(fig, "circuit") if t.mode == "lines+markers"]
    assert len(lines) == 2 * 2 * 3
    assert sum(t.showlegend for t in fig.data) == 2
    assert {t.yaxis for t in lines} == {"y", "y2", "y3", "y4"}
    assert (fig.layout.yaxis3.matches, fig.layout.yaxis4.matches) == ("y", "y2")
    assert [a.text for a in fig.layout.annotations][2:] == [
        f"{SAFE}:<br>accuracy, %",
        f"{SAFE}:<br>margin, logits",
    ]
    frame = history_frame(comparison)
    assert len(frame) == 12 * 4
    assert frame["best"].sum() == 12


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_drift_is_drawn_from_zero_with_the_trained_heads_outlined(mode):
    fig = weight_drift(result(), mode=mode)
    heat = fig.data[0]
    np.testing.assert_allclose(heat.z, [[0, 2], [0.5, 0]])
    assert (heat.zmin, heat.zmax) == (0, 2)
    assert heat.colorscale[0][1] == look(mode).sequential[0][1]
    outlined = {((s.y0 + s.y1) / 2, (s.x0 + s.x1) / 2) for s in fig.layout.shapes}
    assert outlined == {(0, 1), (1, 0)}
    assert list(heat.customdata[0][1]) == ["a0.h1", "<br>chosen for training"]
    assert list(heat.customdata[0][0]) == ["a0.h0", ""]
    # Without any change there is a scale all the same, and without heads no outline.
    still = weight_drift(result(drift=((0.0, 0.0),), heads=None), mode=mode)
    assert still.data[0].zmax == 1
    assert not still.layout.shapes
    frame = drift_frame(result())
    assert frame.loc[frame["trained"], "head"].tolist() == ["a0.h1", "a1.h0"]
    assert frame["drift"].tolist() == [0, 2, 0.5, 0]
    with pytest.raises(cl.InputError, match="no drift"):
        weight_drift(result(drift=()))


# -- folders ---------------------------------------------------------------------------------


def test_a_comparison_folder_has_its_figures_and_their_data(comparison, tmp_path):
    comparison.save(tmp_path)
    found = figures_of(tmp_path, columns=2, mode="dark")
    assert list(found) == [
        "tradeoff", "table-gain", "table-target", "table-source", "pairs",
        "training-x", "training-_b_x_b_x_a_",
    ]  # fmt: skip
    assert {f.figure.layout.template.layout.paper_bgcolor for f in found.values()} == {
        look("dark").paper
    }
    pd.testing.assert_frame_equal(found["pairs"].data, comparison.pairs())
    pd.testing.assert_frame_equal(found["tradeoff"].data, transfer_points(comparison))
    assert set(found["training-x"].data["language"]) == {"x"}
    for path, pattern in (
        (tmp_path / "nothing", "neither a circuitlens run nor a comparison"),
        (tmp_path / "empty", "no results yet"),
    ):
        cl.Comparison(()).save(tmp_path / "empty")
        with pytest.raises(cl.InputError, match=pattern):
            figures_of(path)
