from __future__ import annotations

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import task_margin
from hypothesis import given
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.circuits.measure_faithfulness import DEFAULT_SHARES, default_sizes
from circuitlens.circuits.random_circuits import layer_matched_masks, random_masks
from circuitlens.utils.provenance import Provenance
from circuitlens.view import faithfulness_curve

KINDS = ("", "random_", "layer_matched_", "without_")


@pytest.fixture(scope="module")
def curve(toy_proxy, toy_task, toy_scores, toy_baseline):
    return cl.faithfulness(
        toy_proxy, toy_task, toy_scores, toy_baseline, sizes=[2, 0.25, 8], n_random=10
    )


def hand_made(sizes: tuple[int, ...], margin: list[float]) -> cl.FaithfulnessCurve:
    """A curve with these margins; accuracy is half, and probability a tenth of them."""
    values = np.array(margin)
    metrics = {"margin": values, "accuracy": values / 2, "probability": values / 10}
    found = {
        kind + metric: np.stack([column, column + 0.1])
        if kind in ("random_", "layer_matched_")
        else column.copy()
        for kind in KINDS
        for metric, column in metrics.items()
    }
    # Deviations of the examples from the mean that cancel.
    wobble = np.linspace(-1, 1, 4)
    return cl.FaithfulnessCurve(
        sizes=sizes,
        example_margin=values[:, None] + wobble,
        n_heads=sizes[-1],
        method="by hand",
        example_ids=tuple("abcd"),
        provenance=Provenance("model", "0", "task", "0", 0),
        **found,
    )


# -- measured on a model ---------------------------------------------------------------------


def test_none_and_all_heads_are_the_ends(curve, toy_proxy, toy_task):
    assert curve.sizes == (0, 2, 4, 8, 16)
    assert curve.shares.tolist() == [0, 0.125, 0.25, 0.5, 1]
    assert curve.faithfulness[[0, -1]].tolist() == [0.0, 1.0]
    # Without no heads the model is whole, without all of them empty.
    assert curve.completeness[[0, -1]].tolist() == [1.0, 0.0]
    assert (curve.random_faithfulness[:, [0, -1]] == [0, 1]).all()
    assert (curve.layer_matched_faithfulness[:, [0, -1]] == [0, 1]).all()
    whole = cl.evaluate(toy_proxy, toy_task, toy_task.held_out)
    assert curve.accuracy[-1] == pytest.approx(whole.accuracy)
    assert curve.margin[-1] == pytest.approx(whole.margin, rel=1e-4)


def test_the_top_heads_beat_random_ones(curve):
    middle = curve.at(4)
    assert middle["faithfulness"] > middle["random_faithfulness"] + 0.1
    assert middle["completeness"] < 1 - middle["random_faithfulness"]
    assert curve.random_margin.shape == curve.layer_matched_margin.shape == (10, 5)


@pytest.mark.parametrize("without", [False, True])
def test_one_circuit_by_hand(curve, toy_proxy, toy_task, toy_scores, toy_baseline, without):
    keep = set(toy_scores.top(4).complement() if without else toy_scores.top(4))
    hooks = {}
    for layer in range(2):

        def ablate(z, layer=layer):
            z = z.clone()
            for head in range(8):
                if cl.Head(layer, head) not in keep:
                    z[:, 1:, head] = toy_baseline.mean[layer, head]
            return z

        hooks[toy_proxy.z_hook(layer)] = ablate
    margins, right, probability = [], [], []
    encoded = toy_task.encode(toy_proxy, toy_task.held_out)
    for index in range(len(encoded)):
        batch = encoded.batch([index])
        with torch.no_grad():
            logits = toy_proxy.logits(batch, hooks)
        margins.append(float(task_margin(logits, batch)))
        labels = batch.readout.of_labels(logits)
        right.append(int(labels.argmax()) == encoded.gold[index])
        probability.append(float(labels.softmax(1)[0, encoded.gold[index]]))
    place = curve.sizes.index(4)
    kind = "without_" if without else ""
    assert getattr(curve, f"{kind}margin")[place] == pytest.approx(np.mean(margins), rel=1e-3)
    assert getattr(curve, f"{kind}accuracy")[place] == pytest.approx(np.mean(right), abs=0.006)
    assert getattr(curve, f"{kind}probability")[place] == pytest.approx(
        np.mean(probability), rel=1e-3
    )
    if not without:
        np.testing.assert_allclose(curve.example_margin[place], margins, rtol=1e-3, atol=1e-4)


def test_the_interval_resamples_circuit_and_ends_together(curve):
    rng = np.random.default_rng(1)
    n = len(curve.example_ids)
    drawn = []
    for _ in range(400):
        chosen = rng.integers(n, size=n)
        m = curve.example_margin[:, chosen].mean(1)
        drawn.append((m - m[0]) / (m[-1] - m[0]))
    expected = np.quantile(drawn, [0.05, 0.95], axis=0)
    found = curve.interval(0.9)
    width = np.ptp(expected, axis=0).max()
    np.testing.assert_allclose(found, expected, atol=0.25 * width)
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == 1).all()
    assert (found[0] <= curve.faithfulness).all()
    assert (curve.faithfulness <= found[1]).all()
    with pytest.raises(cl.InputError, match="between 0 and 1, but is 95"):
        curve.interval(95.0)


def test_examples_that_discovery_saw_are_refused(toy_proxy, toy_task, toy_scores, toy_baseline):
    with pytest.raises(cl.InputError, match="was used for discovery"):
        cl.faithfulness(
            toy_proxy, toy_task, toy_scores, toy_baseline, examples=toy_task["pool_a"][:300]
        )


def test_impossible_arguments_are_refused(toy_proxy, toy_task, toy_scores, toy_baseline):
    for sizes, words in (([17], "17 heads .* model has 16"), ([1.5], "between 0 and 1, but 1.5")):
        with pytest.raises(cl.InputError, match=words):
            cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, sizes=sizes)
    with pytest.raises(cl.InputError, match="n_random cannot be negative, but is -1"):
        cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, n_random=-1)


def test_random_circuits_can_be_left_out(toy_proxy, toy_task, toy_scores, toy_baseline):
    options = {"sizes": [4], "examples": toy_task.held_out[:20]}
    curve = cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, n_random=0, **options)
    frame = curve.to_frame()
    assert frame["random_accuracy"].isna().all()
    assert not frame["completeness"].isna().any()
    assert "4" in curve._repr_html_()
    cl.view.faithfulness_curve(curve).to_json()
    other = replace(toy_scores, per_example=toy_scores.per_example[:, :, :4])
    with pytest.raises(cl.InputError, match=r"scores are of a 2 × 4 model, .* cl\.relevance"):
        cl.faithfulness(toy_proxy, toy_task, other, toy_baseline)


def test_scores_of_another_model_are_refused(toy_proxy, toy_task, toy_scores, toy_baseline):
    origin = replace(toy_scores.provenance, model_fingerprint="another")
    other = replace(toy_scores, provenance=origin)
    with pytest.raises(cl.InputError, match=r"scores are of other weights .* call cl\.relevance"):
        cl.faithfulness(toy_proxy, toy_task, other, toy_baseline)
    with pytest.raises(cl.InputError, match="no examples to measure on: give some"):
        cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, examples=[])


def test_saving_and_loading(tmp_path, curve):
    curve.save(tmp_path / "f.safetensors")
    again = cl.FaithfulnessCurve.load(tmp_path / "f.safetensors")
    assert again.to_frame().equals(curve.to_frame())
    assert again.provenance == curve.provenance
    np.testing.assert_array_equal(again.example_margin, curve.example_margin)
    assert again != curve  # an answer, though none about the arrays
    assert repr(again).startswith("FaithfulnessCurve(cdt-linear on toy/source: 5 sizes up to 16")
    assert len(repr(again)) < 200
    assert "10 random circuits" in again._repr_html_()
    with pytest.raises(cl.InputError, match=r"no size 5; it has \[0, 2, 4, 8, 16\]"):
        again.at(5)


# -- sizes and random circuits ---------------------------------------------------------------


@given(st.integers(1, 5000))
def test_default_sizes_are_distinct_counts_from_none_to_all(n_heads):
    sizes = default_sizes(n_heads)
    assert sizes[0] == 0
    assert sizes[1] >= 1
    assert sizes[-1] == n_heads
    assert sizes == sorted(set(sizes))
    if n_heads >= 1000:
        shares = np.array(sizes[1:]) / n_heads
        np.testing.assert_allclose(shares, DEFAULT_SHARES, atol=0.5 / n_heads)


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 6))


@given(GRIDS, st.integers(0, 99), st.data())
def test_random_circuits_have_the_size_and_grow(grid, seed, data):
    total = grid[0] * grid[1]
    sizes = sorted(data.draw(st.sets(st.integers(0, total), min_size=1)))
    masks = random_masks(sizes, *grid, 3, torch.Generator().manual_seed(seed))
    assert masks.shape == (3, len(sizes), *grid)
    assert (masks.sum((-1, -2)) == torch.tensor(sizes)).all()
    assert (masks[:, 1:] >= masks[:, :-1]).all()


@given(GRIDS, st.integers(0, 99), st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=4))
def test_layer_matched_circuits_have_as_many_heads_in_every_layer(grid, seed, bits):
    total = grid[0] * grid[1]
    kept = torch.tensor([[bool(b >> i & 1) for i in range(total)] for b in bits])
    kept = kept.view(len(bits), *grid)
    masks = layer_matched_masks(kept, 5, torch.Generator().manual_seed(seed))
    assert masks.shape == (5, *kept.shape)
    assert (masks.sum(-1) == kept.sum(-1)).all()


def test_random_circuits_are_uniform():
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(1, 2, 4, dtype=torch.bool)
    kept[0, 1, 0] = True
    often = random_masks([2], 2, 4, 4000, generator).float().mean((0, 1))
    assert (often - 2 / 8).abs().max() < 0.03
    matched = layer_matched_masks(kept, 4000, generator).float().mean((0, 1))
    assert (matched[1] - 1 / 4).abs().max() < 0.03
    assert not matched[0].any()


# -- summaries of curves made by hand --------------------------------------------------------


def test_areas_by_hand():
    # f = 0, 0.5, 1.5, 1 at the shares 0, 0.01, 0.1, 1.
    curve = hand_made((0, 1, 10, 100), [2.0, 3.0, 5.0, 4.0])
    linear = 0.01 * 0.25 + 0.09 * 1.0 + 0.9 * 1.25
    assert curve.area() == curve.cpr == pytest.approx(linear)
    assert curve.cmd == pytest.approx(0.01 * 0.75 + 0.09 * 0.5 + 0.9 * 0.25)
    # Over one decade each: the mean of two trapezoids.
    assert curve.area(scale="log") == pytest.approx((1.0 + 1.25) / 2)
    assert curve.area("accuracy", "log") == pytest.approx((2.0 + 2.25) / 2)
    assert curve.area("probability") == pytest.approx(0.01 * 0.25 + 0.09 * 0.4 + 0.9 * 0.45)
    with pytest.raises(cl.InputError, match="metric='f1' is unknown"):
        curve.area("f1")
    with pytest.raises(cl.InputError, match="scale='square' is unknown: choose one of linear, log"):
        curve.area(scale="square")
    only_ends = hand_made((0, 3), [0.0, 2.0])
    assert only_ends.area(scale="log") == 1.0
    assert only_ends.area() == 0.5


CURVES = st.lists(st.integers(1, 400), min_size=1, max_size=8, unique=True).flatmap(
    lambda sizes: st.tuples(
        st.just((0, *sorted(sizes))),
        st.lists(st.floats(-3, 3), min_size=len(sizes) + 1, max_size=len(sizes) + 1),
    )
)


@given(CURVES, st.floats(0.5, 4), st.floats(-5, 5))
def test_areas_are_averages_that_no_change_of_unit_moves(sizes_and_margin, scale, shift):
    sizes, margin = sizes_and_margin
    margin[-1] = margin[0] + 5.0
    curve = hand_made(sizes, margin)
    moved = hand_made(sizes, [scale * m + shift for m in margin])
    for kind in ("linear", "log"):
        y = curve.faithfulness if kind == "linear" else curve.faithfulness[1:]
        assert y.min() - 1e-9 <= curve.area(scale=kind) <= y.max() + 1e-9
        assert moved.area(scale=kind) == pytest.approx(curve.area(scale=kind), abs=1e-9)
    assert curve.cmd >= abs(1 - curve.cpr) - 1e-9


def test_a_point_on_the_line_between_its_neighbours_changes_no_area():
    some = hand_made((0, 4, 64), [0.0, 1.0, 4.0])
    more = hand_made((0, 4, 16, 64), [0.0, 1.0, 2.5, 4.0])
    assert more.area(scale="log") == pytest.approx(some.area(scale="log"))
    more = hand_made((0, 4, 34, 64), [0.0, 1.0, 2.5, 4.0])
    assert more.area() == pytest.approx(some.area())


@pytest.mark.parametrize(
    ("margins", "says"),
    [
        ([2.0, 1.5, 1.0], r"heads hurt .*margin 1\.000 with all heads, 2\.000 with all at"),
        ([1.0, 2.0, 1.0], "heads do not carry the task"),
        ([-1.0, -1.5, -3.0], "heads hurt"),
    ],
)
def test_where_the_heads_hurt_f_says_so(margins, says, tmp_path):
    curve = hand_made((0, 2, 4), margins)
    assert re.search(says, curve.caveat)
    for values in (
        curve.faithfulness,
        curve.random_faithfulness,
        curve.completeness,
        curve.interval(),
        np.array([curve.cpr, curve.cmd, curve.area(scale="log")]),
    ):
        assert np.isnan(values).all()
    assert html.escape(curve.caveat) in curve._repr_html_()
    assert curve.to_frame()["accuracy"].tolist() == (np.array(margins) / 2).tolist()
    figure = cl.view.faithfulness_curve(curve)
    assert any("no meaning" in a.text for a in figure.layout.annotations)
    curve.save(tmp_path / "curve.safetensors")
    assert cl.FaithfulnessCurve.load(tmp_path / "curve.safetensors").caveat == curve.caveat


def test_where_the_heads_help_there_is_no_caveat():
    curve = hand_made((0, 2, 4), [-1.0, 1.0, 3.0])
    assert curve.caveat is None
    assert curve.faithfulness.tolist() == [0, 0.5, 1]
    assert not np.isnan(curve.interval()).any()


def test_an_interval_without_bounds_says_so():
    curve = hand_made((0, 2, 4), [0.0, 0.2, 0.4])
    # On every other example the heads hurt, so in some draws they do.
    curve.example_margin[-1] += np.array([3.0, -3.0, 3.0, -3.0])
    assert re.search(r"In \d+ of 1000 bootstrap draws the whole model is no better", curve.caveat)
    assert np.isnan(curve.interval()).all()
    assert curve.faithfulness.tolist() == pytest.approx([0, 0.5, 1])
    assert "bootstrap draws" in curve._repr_html_()


def test_what_at_returns_is_the_row_of_the_frame():
    curve = hand_made((0, 2, 4), [0.0, 3.0, 4.0])
    at = curve.at(2)
    assert at["share"] == 0.5
    assert at["faithfulness"] == at["completeness"] == 0.75
    assert at["accuracy"] == 1.5
    assert at["random_accuracy"] == pytest.approx(1.55)
    assert at["random_accuracy_max"] == pytest.approx(1.6)
    assert at["layer_matched_probability"] == pytest.approx(0.35)
    assert set(at) == set(curve.to_frame()) - {"heads"}


# -- figure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_figure_shows_the_numbers_of_the_curve(scale):
    curve = hand_made((0, 1, 10, 100), [0.0, 1.0, 3.0, 4.0])
    fig = faithfulness_curve(curve, cl.Circuit.of(["a0.h0"], 10, 10), scale=scale)
    shown = slice(1 if scale == "log" else 0, None)
    lines = {(t.name, t.xaxis): t for t in fig.data}
    top = lines["top heads (by hand)", "x"]
    assert tuple(top.x) == curve.sizes[shown]
    assert tuple(top.y) == tuple(curve.faithfulness[shown])
    without = lines["the model without them", "x2"]
    assert tuple(without.y) == tuple(curve.without_accuracy[shown])
    matched = next(t for (name, _), t in lines.items() if "layer by layer" in name)
    np.testing.assert_allclose(
        matched.y, np.median(curve.layer_matched_faithfulness, axis=0)[shown]
    )
    # Zero cannot be shown on a logarithmic axis, and too many ticks cannot be read.
    assert all(x > 0 for t in fig.data for x in t.x) == (scale == "log")
    expected = ["1<br>1 %" if scale == "log" else "0<br>0 %", "10<br>10 %", "100<br>100 %"]
    assert list(fig.layout.xaxis.ticktext) == expected
    with pytest.raises(cl.InputError, match="'linear' or 'log'"):
        faithfulness_curve(curve, scale="square")
