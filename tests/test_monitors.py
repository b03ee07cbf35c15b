"""Monitors: watched after every epoch, kept, drawn, and binding where they have a limit."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import shortened, small

import circuitlens as cl
from circuitlens.adapt.front import Front
from circuitlens.adapt.monitors import _measure, limits_of
from circuitlens.view.training import history_frame

OPTIONS = {"learning_rates": [3e-3, 1e-2], "epochs": 3, "quiet": True}


@pytest.fixture(scope="module")
def start():
    model, circuit, task = small()
    return model, circuit, shortened(task)


def moved(model: cl.HookedModel, first: cl.HookedModel) -> float:
    """Minus how far the weights are from where they began."""
    pairs = zip(model.hf.parameters(), first.hf.parameters(), strict=True)
    return -float(sum((a - b).square().sum() for a, b in pairs) ** 0.5)


def test_a_monitor_is_measured_before_and_after_every_epoch_and_kept(start, tmp_path):
    model, circuit, task = start
    calls = []

    def distance(now):
        assert not now.hf.training
        assert not torch.is_grad_enabled()
        calls.append(now)
        return moved(now, model)

    watched = {"distance": distance, "source": task}
    result = cl.transfer(
        model, circuit, task, strategy="full", source=task, monitor=watched, **OPTIONS
    )
    # The start, three epochs at two rates, and four α of each.
    assert len(calls) == 1 + 2 * (3 + 4)
    names = ["monitor: distance", "monitor: source"]
    assert all([n for n in entry if n.startswith("monitor")] == names for entry in result.history)
    assert all("within" not in entry for entry in result.history)
    # On the same validation split, so the second one is known.
    assert [e["monitor: source"] for e in result.history] == [e["accuracy"] for e in result.history]
    before, after = result.monitored["distance"]
    assert before == 0
    assert after == pytest.approx(moved(result.model, model), rel=1e-5)
    points = {p.alpha: p.watched[0] for p in result.front.points if p.learning_rate == 1e-2}
    assert points[0.5] == pytest.approx(points[1.0] / 2, rel=1e-4)
    assert list(result.front.to_frame())[-2:] == names
    assert result.to_frame()["monitor: distance"][0] == after
    result.save(tmp_path)
    again = cl.TransferResult.load(tmp_path)
    assert again.monitored == dict(result.monitored)
    assert again.history == result.history
    assert again.front == result.front
    assert Front.from_dict(result.front.to_dict()).monitors == ("distance", "source")


@pytest.mark.slow
def test_without_monitors_results_are_as_before(start):
    model, circuit, task = start
    result = cl.transfer(model, circuit, task, source=task, **OPTIONS)
    watched = cl.transfer(model, circuit, task, source=task, monitor=lambda m: 1.0, **OPTIONS)
    assert result.monitored == {}
    assert "monitors" not in result.front.to_dict()
    assert result.model.fingerprint() == watched.model.fingerprint()
    assert [p.target for p in result.front.points] == [p.target for p in watched.front.points]


@pytest.mark.parametrize("with_source", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_limit_binds_epoch_and_alpha(start, with_source):
    model, circuit, task = start
    options = {**OPTIONS, "source": task if with_source else None, "strategy": "full"}

    def distance(now):
        return moved(now, model)

    free = cl.transfer(model, circuit, task, monitor={"d": distance}, **options)
    far = -free.monitored["d"][1]
    bound = cl.transfer(
        model, circuit, task, monitor={"d": distance}, keep_monitor=far / 3, **options
    )
    assert -bound.monitored["d"][1] <= far / 3 + 1e-6
    assert moved(bound.model, model) == pytest.approx(bound.monitored["d"][1], rel=1e-4, abs=1e-6)
    # It is the best of those that are allowed.
    allowed = [p for p in bound.front.points if p.watched[0] >= -far / 3]
    assert bound.target_after is not None
    assert max(p.target for p in allowed) == max(bound.validation[0.0], *[
        p.target for p in allowed
        if (p.learning_rate, p.alpha) == (bound.learning_rate, bound.alpha)
    ] or [0])  # fmt: skip
    assert bound.provenance.settings["keep_monitor"] == {"d": far / 3}
    for entry in bound.history:
        assert entry["within"] == (entry["monitor: d"] >= -far / 3)
    best = history_frame(bound).query("best")
    if any(entry["within"] for entry in bound.history):
        assert best["monitor: d"].item() >= -far / 3


def test_where_nothing_keeps_it_the_model_stays(start, caplog):
    model, circuit, task = start
    result = cl.transfer(
        model, circuit, task, source=task, strategy="full",
        monitor={"distance": lambda now: moved(now, model)}, keep_monitor=0.0, **OPTIONS,
    )  # fmt: skip
    assert result.learning_rate == 0
    assert result.model.fingerprint() == model.fingerprint()
    assert "within the limit of distance" in caplog.text


def test_keep_source_and_keep_monitor_bind_together(start):
    model, circuit, task = start
    result = cl.transfer(
        model, circuit, task, source=task, strategy="full", keep_source=0.5,
        monitor={"d": lambda now: moved(now, model), "free": lambda now: 1.0},
        keep_monitor={"d": 0.4}, **OPTIONS,
    )  # fmt: skip
    assert result.front.limits == (0.4, None)
    assert -result.monitored["d"][1] <= 0.4
    chosen = result.front.choose(0.5)
    assert (chosen.learning_rate, chosen.alpha) == (result.learning_rate, result.alpha) or (
        result.learning_rate == 0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", None, torch.zeros(2)])
def test_what_is_no_number_is_refused_before_training(start, value):
    model, circuit, task = start
    with pytest.raises(cl.InputError, match="The monitor 'wer' gave"):
        cl.transfer(model, circuit, task, monitor={"wer": lambda now: value}, **OPTIONS)


def test_arguments_that_cannot_be(start):
    model, circuit, task = start
    for monitor, keep, says in (
        (None, 0.1, "pass monitor=…"),
        ({"x": len}, -1.0, "at least 0"),
        ({"x": len}, {"y": 0.1}, "names 'y'"),
    ):
        with pytest.raises(cl.InputError, match=says):
            cl.transfer(model, circuit, task, monitor=monitor, keep_monitor=keep, **OPTIONS)
    # What type checks of the tests would not let through.
    with pytest.raises(cl.InputError, match="The monitor 'x' is 3"):
        inspect.unwrap(_measure)(model, "x", 3)
    assert inspect.unwrap(limits_of)(np.float32(0.5), ["x"]) == {"x": 0.5}


def test_a_killed_training_resumes_with_its_monitors(start, tmp_path):
    model, circuit, task = start
    watched = {"distance": lambda now: moved(now, model)}
    options = {**OPTIONS, "strategy": "full", "learning_rates": [1e-2], "keep_monitor": 1.0}
    whole = cl.transfer(model, circuit, task, monitor=watched, **options)
    n = 0

    def breaking(now):
        nonlocal n
        n += 1
        if n == 4:
            raise KeyboardInterrupt
        return moved(now, model)

    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        cl.transfer(
            model, circuit, task, monitor={"distance": breaking}, checkpoints=folder, **options
        )
    again = cl.transfer(model, circuit, task, monitor=watched, checkpoints=folder, **options)
    assert again.history == whole.history
    assert again.model.fingerprint() == whole.model.fingerprint()
    with pytest.raises(cl.InputError, match="monitors"):
        cl.transfer(model, circuit, task, checkpoints=folder, **{**options, "keep_monitor": None})


def test_monitors_are_drawn_from_before_the_training(start):
    model, circuit, task = start
    result = cl.transfer(model, circuit, task, monitor={"sound & <b>": lambda now: 0.5}, **OPTIONS)
    fig = cl.view.training_curves(result)
    headings = [note.text for note in fig.layout.annotations]
    assert headings == ["accuracy, %", "margin, logits", "sound &amp; &lt;b&gt;"]
    frame = history_frame(result)
    assert frame["epoch"].tolist()[0] == 0
    assert frame["monitor: sound & <b>"].tolist() == [0.5] * len(frame)


def test_a_task_of_the_same_name_is_another_monitor(start, tmp_path):
    model, circuit, task = start
    other = replace(task, pools=replace(task.pools, validation=task["validation"][:30]))
    options = {**OPTIONS, "learning_rates": [1e-2], "checkpoints": tmp_path}
    cl.transfer(model, circuit, task, monitor={"x": task}, **options)
    with pytest.raises(cl.InputError, match="monitors"):
        cl.transfer(model, circuit, task, monitor={"x": other}, **options)


def test_what_a_monitor_does_to_the_model_is_undone(start):
    model, circuit, task = start

    def rough(now):
        now.hf.train()
        now.whole.requires_grad_(False)
        return np.float32(1.0)

    plain = cl.transfer(model, circuit, task, **OPTIONS)
    result = cl.transfer(model, circuit, task, monitor=rough, keep_monitor=0.1, **OPTIONS)
    assert result.monitored["rough"] == (1.0, 1.0)
    assert not result.model.hf.training
    assert result.history[0]["accuracy"] == plain.history[0]["accuracy"]


def test_an_error_in_a_monitor_says_where_it_came_from(start):
    model, circuit, task = start
    with pytest.raises(ZeroDivisionError) as caught:
        cl.transfer(model, circuit, task, monitor={"wer": lambda now: 1 / 0}, **OPTIONS)
    assert "monitor 'wer'" in caught.value.__notes__[0]
    with pytest.raises(cl.InputError, match=r"such as its \.accuracy"):
        cl.transfer(
            model,
            circuit,
            task,
            monitor=lambda m: cl.evaluate(m, task, "test", quiet=True),
            **OPTIONS,
        )
