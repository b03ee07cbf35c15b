"""Retention on text: the loss of the next token, and where it stands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny
from torch.nn import functional as F  # noqa: N812

import circuitlens as cl
from circuitlens.adapt.text_loss import text_loss
from circuitlens.tasks import Example


def test_the_loss_is_that_of_one_text_at_a_time(toy_proxy, toy_task):
    total, count = 0.0, 0
    tokenizer = toy_proxy.tokenizer
    for example in toy_task["test"][:100]:
        ids = tokenizer(" ".join(example.fields.values()))["input_ids"]
        ids = ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]
        ids = torch.tensor([ids])
        with torch.no_grad():
            logits = toy_proxy.hf(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert text_loss(toy_proxy, toy_task) == pytest.approx(total / count, rel=1e-5)


def test_long_texts_are_cut_and_short_ones_left_out(toy_proxy, toy_task):
    assert text_loss(toy_proxy, replace(toy_task, max_text_tokens=2)) > 0
    name = next(iter(toy_task["test"][0].fields))
    test = tuple(
        Example(e.id, {**e.fields, name: e.fields[name] * (1 + i)}, e.label)
        for i, e in enumerate(toy_task["test"][:9])
    )
    task = replace(toy_task, pools=replace(toy_task.pools, test=test))
    assert np.isfinite(text_loss(toy_proxy, task))


def test_encoders_predict_no_next_token(toy_task):
    assert text_loss(cl.load(tiny("bert")), toy_task) is None


def test_a_transfer_says_what_became_of_the_text(toy_proxy, toy_task, toy_scores, tmp_path):
    near = toy_task.to("near")
    options = {"learning_rates": [3e-3], "epochs": 6, "quiet": True}
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, strategy="full", **options)
    before, after = result.retained[0].text_loss
    assert before == pytest.approx(text_loss(toy_proxy, toy_task))
    assert after == pytest.approx(text_loss(result.model, toy_task))
    assert result.text_loss_change == after - before != 0
    assert result.to_frame()["text_loss_change"][0] == after - before
    result.save(tmp_path)
    assert cl.TransferResult.load(tmp_path).retained == result.retained
    cell = {**result.to_dict(), "seed": 0, "peak_mib": 0.0}
    grid = cl.Comparison((cell,))
    frame = grid.to_frame()
    losses = frame[frame["metric"] == "text_loss"]
    assert list(losses["value"]) == [before, after]
    assert grid.summary()["text_loss_change"][0] == after - before
    # Of results from before there is none.
    del cell["retained"][0]["text_loss"]
    assert np.isnan(cl.Comparison((cell,)).summary()["text_loss_change"][0])
