"""Fronts: points between two sets of weights, what they are worth, and what is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cell
from hypothesis import given
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.adapt import Front
from circuitlens.adapt.front import FrontPoint
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.experiments.front_bootstrap import front_value, sentence_weights
from circuitlens.view.fronts import front_frame

STEPS = st.integers(0, 20)


def front_of(pairs: list[tuple[int, int]]) -> Front:
    """Accuracies in twentieths: target, source."""
    points = [FrontPoint(1e-3, 0.0, 1.0, t / 20, 0.0, (s / 20,)) for t, s in pairs]
    return Front(("t/src",), (replace(points[0], learning_rate=0.0, alpha=0.0), *points[1:]))


@given(st.lists(st.tuples(STEPS, STEPS), min_size=1, max_size=9))
def test_a_front_is_what_no_point_beats(pairs):
    front = front_of(pairs)
    found = front.non_dominated()
    for point in front.points:
        beaten = any(
            other.target >= point.target
            and front.lost(other) <= front.lost(point)
            and (other.target, front.lost(other)) != (point.target, front.lost(point))
            for other in front.points
        )
        same = [(p.target, front.lost(p)) for p in found]
        assert ((point.target, front.lost(point)) in same) != beaten
    assert list(found) == sorted(found, key=front.lost)


@given(st.lists(st.tuples(STEPS, STEPS), min_size=1, max_size=9), st.integers(0, 10))
def test_the_hypervolume_is_the_area_of_the_squares_that_are_covered(pairs, most):
    (t0, s0), *_ = pairs
    corner = s0 - most
    covered = {(i, j) for t, s in pairs for i in range(t0, max(t0, t)) for j in range(corner, s)}
    assert front_of(pairs).hypervolume(most / 20) == pytest.approx(len(covered) / 400)


@given(st.lists(st.tuples(STEPS, STEPS), min_size=1, max_size=9), st.integers(0, 10))
def test_the_choice_is_the_best_that_keeps_within_the_loss(pairs, most):
    front = front_of(pairs)
    # The same numbers as accuracies of thirds and the like: rounding must not lose a point.
    chosen = front.choose(most / 20)
    allowed = [t for t, s in pairs if pairs[0][1] - s <= most]
    assert round(20 * chosen.target) == max(allowed)
    if max(allowed) == pairs[0][0]:
        assert chosen is front.start


def test_every_task_that_is_to_be_kept_counts():
    start = FrontPoint(0.0, 0.0, 0.0, 0.5, 0.0, (0.9, 0.8))
    point = FrontPoint(1e-3, 0.0, 1.0, 0.7, 0.0, (0.95, 0.7))
    front = Front(("a", "b"), (start, point))
    assert front.lost(point) == pytest.approx(0.1)
    assert front.choose(0.09) is start
    assert front.choose(0.1) is point
    frame = front.to_frame()
    assert list(frame["kept: b"]) == [0.8, 0.7]
    assert list(frame["on_front"]) == [True, True]
    assert Front.from_dict(front.to_dict()) == front


@pytest.mark.parametrize("strategy", ["circuit", "lora", "lora-norms", "head", "full"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.75, 1.0])
def test_points_between_are_of_the_weights_themselves(
    toy_proxy, toy_task, toy_scores, strategy, alpha
):
    torch.manual_seed(0)
    readout = toy_task.encode(toy_proxy, toy_task["validation"][:2]).readout
    choice = Choice(toy_scores.top(3), toy_scores, 0, readout=readout)

    def made():
        return strategy_of(strategy).make(toy_proxy, choice, choice.circuit)

    trainable = made()
    start = trainable.state()
    end = {name: value + 0.05 * torch.randn_like(value) for name, value in start.items()}

    def weights(entries):
        other = made()
        other.load(entries)
        return {n: p.detach() for n, p in other.merged().hf.named_parameters()}

    w0, w1 = weights(start), weights(end)
    assert any(not torch.equal(w0[name], w1[name]) for name in w0)
    for name, found in weights(trainable.between(start, end, alpha)).items():
        torch.testing.assert_close(found, torch.lerp(w0[name], w1[name], alpha), msg=name)


@pytest.fixture(scope="module")
def near(toy_task):
    return toy_task.to("near")


OPTIONS = {"learning_rates": [1e-3, 3e-3], "epochs": 3, "quiet": True}


@pytest.mark.parametrize("strategy", ["circuit", "lora", "full"])
def test_the_chosen_point_is_the_model_that_comes_back(
    toy_proxy, toy_task, toy_scores, near, strategy, tmp_path
):
    circuit, far = toy_scores.top(3), toy_task.to("far")
    result = cl.transfer(
        toy_proxy, circuit, near, strategy=strategy, keep_source=0.0, retain=[far], **OPTIONS
    )
    front = result.front
    assert front.tasks == ("toy/source", "toy/far")
    rates = [point.learning_rate for point in front.points]
    assert rates == [0.0, *4 * [1e-3], *4 * [3e-3]]
    chosen = front.choose(0.0)
    assert (result.learning_rate, result.alpha) == (chosen.learning_rate, chosen.alpha or 1.0)
    # Oracle: the model that comes back, evaluated from without.
    for task, accuracy in zip((near, toy_task, far), (chosen.target, *chosen.kept), strict=True):
        assert cl.evaluate(result.model, task, task["validation"], quiet=True).accuracy == accuracy
    start = (front.start.target, *front.start.kept)
    for task, accuracy in zip((near, toy_task, far), start, strict=True):
        assert cl.evaluate(toy_proxy, task, task["validation"], quiet=True).accuracy == accuracy
    assert all(before <= after for before, after in zip(front.start.kept, chosen.kept, strict=True))
    assert result.target_after == cl.evaluate(result.model, near, near["test"], quiet=True)
    assert result.test_front is None
    result.save(tmp_path)
    again = cl.TransferResult.load(tmp_path, toy_proxy)
    assert again == result
    assert again.front == front
    assert again.model.fingerprint() == result.model.fingerprint()


def test_without_keep_source_the_rate_alone_is_chosen(toy_proxy, toy_scores, near):
    free = cl.transfer(toy_proxy, toy_scores.top(3), near, **OPTIONS)
    loose = cl.transfer(toy_proxy, toy_scores.top(3), near, keep_source=0.99, **OPTIONS)
    assert free.front == loose.front
    ends = [point for point in free.front.points if point.alpha in (0.0, 1.0)]
    best = max(ends, key=lambda point: point.rank)
    assert (free.learning_rate, free.alpha) == (best.learning_rate, 1.0)
    assert free.validation[best.learning_rate] == best.target
    assert loose.front.choose(0.99).rank >= best.rank
    assert "keep_source" not in free.provenance.settings
    assert loose.provenance.settings["keep_source"] == 0.99


def test_if_nothing_keeps_the_source_the_model_stays(toy_proxy, toy_scores, near, caplog):
    # A rate at which everything is forgotten.
    options = {**OPTIONS, "learning_rates": [0.3], "epochs": 1}
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, keep_source=0.0, **options)
    assert (result.learning_rate, result.alpha) == (0.0, 1.0)
    assert result.model.fingerprint() == toy_proxy.fingerprint()
    assert result.source_change == 0
    assert "nothing that loses at most 0 of accuracy elsewhere did better" in caplog.text


@pytest.mark.slow
def test_replay_is_chosen_as_the_rate_is(toy_proxy, toy_scores, near, tmp_path):
    options = {**OPTIONS, "learning_rates": [3e-3], "epochs": 2}
    circuit = toy_scores.top(3)
    both = cl.transfer(
        toy_proxy, circuit, near, replay=[0.0, 0.5], keep_source=0.05, checkpoints=tmp_path,
        **options,
    )  # fmt: skip
    one = [cl.transfer(toy_proxy, circuit, near, replay=r, **options) for r in (0.0, 0.5)]
    assert both.front.points == (*one[0].front.points, *one[1].front.points[1:])
    chosen = both.front.choose(0.05)
    assert both.provenance.settings["replay"] == chosen.replay
    assert both.provenance.settings["replays"] == [0.0, 0.5]
    # A repeated call reads what was trained, and chooses the same.
    again = cl.transfer(
        toy_proxy, circuit, near, replay=[0.0, 0.5], keep_source=0.05, checkpoints=tmp_path,
        **options,
    )  # fmt: skip
    assert again.model.fingerprint() == both.model.fingerprint()


def test_a_task_alone_has_no_front(toy_proxy, toy_scores):
    alone = cl.load_task("toy", "near")
    options = {**OPTIONS, "learning_rates": [1e-3], "epochs": 1}
    assert cl.transfer(toy_proxy, toy_scores.top(2), alone, **options).front is None
    with pytest.raises(cl.InputError, match="keep_source needs a task that is to be kept"):
        cl.transfer(toy_proxy, toy_scores.top(2), alone, keep_source=0.01, **options)


@pytest.mark.parametrize("value", [-0.01, 1.0, 1.5, math.nan])
def test_what_is_no_share_is_refused(toy_proxy, toy_task, toy_scores, near, value):
    with pytest.raises(cl.InputError, match="keep_source is the source accuracy that may be lost"):
        cl.transfer(toy_proxy, toy_scores.top(2), near, keep_source=value)
    with pytest.raises(cl.InputError, match="keep_source is the source accuracy that may be lost"):
        cl.compare(toy_proxy, toy_scores.top(2), toy_task, ["near"], keep_source=value)


@pytest.mark.parametrize(
    ("replay", "message"), [([], "empty list"), ([0.0, -1.0], "not -1.0"), ([math.inf], "not inf")]
)
def test_replays_that_cannot_be_are_refused(toy_proxy, toy_scores, near, replay, message):
    with pytest.raises(cl.InputError, match=message):
        cl.transfer(toy_proxy, toy_scores.top(2), near, replay=replay)


def test_a_comparison_has_the_fronts_of_its_cells(toy_proxy, toy_task, toy_scores, tmp_path):
    options = {
        "strategies": ["circuit", "norms"],
        "seeds": [0],
        "keep_source": 0.02,
        "learning_rates": [3e-3],
        "epochs": 1,
        "quiet": True,
        "out": tmp_path,
    }
    grid = cl.compare(toy_proxy, toy_scores.top(2), toy_task, ["near"], **options)
    frame = grid.fronts()
    assert list(frame["strategy"]) == ["circuit", "norms"]
    front = Front.from_dict(grid.cells[0]["front"])
    assert frame["hypervolume"][0] == front.hypervolume()
    assert frame["target at 2"][0] == front.choose(0.02).target
    values = frame[["start", "target at 0", "target at 1", "target at 2", "target at 5"]]
    assert bool((values.diff(axis=1).iloc[:, 1:] >= 0).all().all())
    assert cl.Comparison.load(tmp_path).fronts().equals(frame)
    with pytest.raises(cl.InputError, match="keep_source"):
        cl.compare(
            toy_proxy, toy_scores.top(2), toy_task, ["near"], **{**options, "keep_source": 0.05}
        )
    # Cells from before have none.
    assert cl.Comparison((cell("x", "circuit", 0, 0.7),)).fronts().empty


def with_front(language, strategy, seed, pairs):
    return cell(language, strategy, seed, 0.7, front=front_of(pairs).to_dict())


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_figure_shows_the_best_within_every_loss(mode):
    # In twentieths of the target and the source: the start, and what trainings offer.
    grid = cl.Comparison(
        (
            with_front("<b>x", "circuit", 0, [(10, 18), (12, 18), (16, 17)]),
            with_front("<b>x", "circuit", 1, [(10, 18), (14, 18), (15, 10)]),
            with_front("<b>x", "full", 0, [(10, 18), (18, 16)]),
            with_front("y", "full", 0, [(10, 18), (9, 19)]),
            cell("z", "full", 0, 0.7),
            cell("y", "n-grams", 0, 0.7, validation=[[1.0, 0.6], [10.0, 0.8]]),
            cell("z", "n-grams", 0, 0.7, validation=[[1.0, 0.6]]),
        )
    )
    frame = front_frame(grid, most_lost=0.1).set_index(["language", "strategy"])
    circuit = frame.loc[("<b>x", "circuit")].set_index("lost")
    at = circuit.iloc[0]
    assert (at["gain"], at["low"], at["high"], at["n_seeds"]) == (
        pytest.approx(15), pytest.approx(15), pytest.approx(15), 2,
    )  # fmt: skip
    assert circuit.iloc[-1]["gain"] == pytest.approx((30 + 20) / 2)
    full = frame.loc[("<b>x", "full")].set_index("lost")["gain"]
    assert list(full.iloc[[0, 24, 49]]) == [0, 0, 0]
    assert full.iloc[-1] == pytest.approx(40)
    assert (frame.loc[("y", "full")]["gain"] == 0).all()
    # Half of what is asked for was right before, and n-grams have nothing to lose.
    assert frame.loc[("y", "n-grams")]["gain"].to_numpy() == pytest.approx(30)
    assert ("z", "n-grams") not in frame.index
    fig = cl.view.transfer_fronts(grid, most_lost=0.1, mode=mode)
    (flat,) = [trace for trace in fig.data if trace.mode == "lines"]
    assert (flat.name, flat.line.dash) == ("n-grams", "dash")
    lines = [trace for trace in fig.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines if trace.showlegend] == ["circuit", "full"]
    low, high = fig.layout.yaxis.range
    assert low < 0
    assert high > frame["high"].max()
    # One band: the strategy with two seeds.
    # The line of n-grams, and no band where sentences are not known.
    assert len(fig.data) == len(lines) + 1
    assert "<b>x" not in fig.to_json()
    with pytest.raises(cl.InputError, match="has a front"):
        cl.view.transfer_fronts(cl.Comparison((cell("z", "full", 0, 0.7),)))
    with pytest.raises(cl.InputError, match="share between 0 and 1"):
        cl.view.transfer_fronts(grid, most_lost=5.0)


def test_a_folder_of_a_comparison_draws_its_fronts(tmp_path):
    cl.Comparison((with_front("x", "circuit", 0, [(10, 18), (12, 18)]),)).save(tmp_path)
    drawn = cl.view.figures_of(tmp_path)["fronts"]
    assert len(drawn.data) == 51
    cl.Comparison((cell("x", "circuit", 0, 0.7),)).save(tmp_path)
    assert "fronts" not in cl.view.figures_of(tmp_path)


# -- fronts compared sentence by sentence ------------------------------------------------------


def test_weights_draw_parallel_sentences_together():
    a, b = ["x", "y", "z"], ["z", "w", "x", "y"]
    first, second = sentence_weights([a, b], 50)
    assert np.allclose(first.sum(1), 1)
    assert np.allclose(second.sum(1), 1)
    assert np.allclose(first[0], 1 / 3)
    for k, name in enumerate(a):
        assert np.allclose(3 * first[:, k], 4 * second[:, b.index(name)])
    assert not np.allclose(first[1], first[2])


@given(st.lists(st.tuples(STEPS, STEPS), min_size=1, max_size=7), st.integers(0, 10))
def test_the_rule_in_a_draw_is_that_of_the_front(pairs, most):
    front = front_of(pairs)
    target = np.array([[p.target for p in front.points]])
    lost = np.array([[front.lost(p) for p in front.points]])
    value = front_value(target, lost, most / 20)
    assert value[0] == pytest.approx(front.choose(most / 20).target)
    area = front_value(target, lost, None, most / 20)
    assert area[0] == pytest.approx(front.hypervolume(most / 20))


def answered(strategy, language, marks, seed=0):
    """A cell with a front: for every point, which of the target's and source's are right."""
    points = [
        FrontPoint(
            1e-3 * n, 0.0, 1.0 if n else 0.0, t.count("1") / len(t), 0.0,
            (s.count("1") / len(s),), (t, s),
        )
        for n, (t, s) in enumerate(marks)
    ]  # fmt: skip
    (t, s) = marks[0]
    ids = tuple(tuple(f"{kind}{i}" for i in range(len(x))) for kind, x in (("t", t), ("s", s)))
    front = Front(("t/src",), tuple(points), ids)
    return cell(language, strategy, seed, 0.5, front=front.to_dict())


def test_fronts_are_compared_on_the_same_sentences():
    start = ("0" * 20 + "1" * 20, "1" * 40)
    better = ("1" * 30 + "0" * 10, "1" * 39 + "0")
    worse = ("1" * 26 + "0" * 14, "1" * 39 + "0")
    costly = ("1" * 40, "0" * 10 + "1" * 30)
    grid = cl.Comparison(
        (
            answered("a", "x", [start, better, costly]),
            answered("b", "x", [start, worse, costly]),
            answered("a", "y", [start, better]),
            answered("b", "y", [start, worse]),
        )
    )
    pair = grid.paired_fronts("a", "b", keep_source=0.05)
    assert pair.difference == pytest.approx(4 / 40)
    assert 0 <= pair.low <= pair.difference <= pair.high
    assert (pair.n_languages, pair.n_shared, pair.n_seeds) == (2, 40, 1)
    # Sentences of both languages are drawn together, so they are no two samples.
    one = grid.paired_fronts("a", "b", "y", keep_source=0.05)
    assert (pair.high - pair.low) >= 0.9 * (one.high - one.low)
    assert grid.paired_fronts("a", "a").difference == 0
    assert grid.paired_fronts("a", "b", keep_source=0.5, language="x").difference == 0
    volume = grid.paired_fronts("a", "b", "y", keep_source=None)
    fronts = [Front.from_dict(grid.cells[n]["front"]).hypervolume() for n in (2, 3)]
    assert volume.difference == pytest.approx(fronts[0] - fronts[1])
    with pytest.raises(cl.InputError, match="no front of a common seed"):
        grid.paired_fronts("a", "c")
    old = dict(grid.cells[0]["front"], ids=[])
    with pytest.raises(cl.InputError, match="compare again"):
        cl.Comparison((dict(grid.cells[0], front=old),)).paired_fronts("a", "a")


def test_a_transfer_says_which_sentences_its_points_answer(toy_proxy, toy_scores, near):
    options = {**OPTIONS, "learning_rates": [3e-3], "epochs": 1}
    front = cl.transfer(toy_proxy, toy_scores.top(2), near, **options).front
    assert front.ids[0] == tuple(e.id for e in near["validation"])
    for point in front.points:
        shares = [marks.count("1") / len(marks) for marks in point.right]
        assert shares == pytest.approx([point.target, *point.kept])


def test_the_front_is_measured_on_test_without_choosing_anything(toy_proxy, toy_scores, near):
    given = (toy_proxy, toy_scores.top(3), near)
    result = cl.transfer(*given, keep_source=0.05, test_front=True, **OPTIONS)
    without = cl.transfer(*given, keep_source=0.05, **OPTIONS)
    assert replace(result, test_front=None, passes=0.0, seconds=0.0) == replace(
        without, passes=0.0, seconds=0.0
    )
    assert result.passes > without.passes
    found, front = result.test_front, result.front
    assert found.tasks == front.tasks
    assert found.ids[0] == tuple(e.id for e in near["test"])
    where = [(p.learning_rate, p.alpha) for p in found.points]
    beyond = [p for p in front.non_dominated() if p is not front.start]
    assert where == [(0.0, 0.0), *((p.learning_rate, p.alpha) for p in beyond)]
    # Oracles: what the untouched and the adapted model are evaluated at from without.
    assert found.start.target == result.target_before.accuracy
    at = dict(zip(where, found.points, strict=True))
    if (result.learning_rate, result.alpha) in at:
        chosen = at[result.learning_rate, result.alpha]
        assert chosen.target == result.target_after.accuracy
        assert chosen.kept == (result.source_after.accuracy,)
    frame = front_frame([result], split="test")
    assert list(frame["allowed"]) == [0, 1, 2, 5]
    offered = [100 * (p.target - found.start.target) for p in found.points]
    assert all(min(abs(gain - x) for x in offered) < 1e-9 for gain in frame["gain"])


def test_passes_are_those_of_training_and_validation(toy_proxy, toy_scores, near):
    sizes = {"epochs": 2, "learning_rates": [1e-3], "quiet": True}
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, **sizes)
    trained, held = len(near["pool_b"]), len(near["validation"])
    source = len(near.origin["validation"])
    # Two epochs there and back; after each, and at the start and four points, validation; the
    # source at the last five.
    forward = 2 * trained + 2 * held + 5 * (held + source)
    assert result.passes == pytest.approx((forward + 2 * 2 * trained) / 3)


def test_a_band_is_where_sentences_may_fall(toy_proxy, toy_scores, near):
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, **OPTIONS)
    frame = front_frame([result])
    plain = [100 * (result.front.choose(x / 100).target - result.front.start.target)
             for x in frame["allowed"]]  # fmt: skip
    assert frame["gain"].tolist() == pytest.approx(plain)
    assert (frame["low"] <= frame["gain"] + 1e-9).all()
    assert (frame["high"] > frame["low"]).any()
    # Without the sentences there is no interval, and the line is the same.
    bare = replace(result.front, ids=(), points=tuple(
        replace(p, right=()) for p in result.front.points
    ))  # fmt: skip
    old = front_frame([replace(result, front=bare)])
    assert (old["low"] == old["high"]).all()
    assert old["gain"].tolist() == pytest.approx(plain)
