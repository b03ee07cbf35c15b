from __future__ import annotations

import logging

import pytest
import torch
from helpers import ALL, FLOAT32_ONLY, answers, loaded, prompts

import circuitlens as cl
from circuitlens.cdt.ablation import (
    PrefixCache,
    ablated_label_logits,
    circuit_label_logits,
    head_mask,
)
from circuitlens.node_means import NodeMeans
from circuitlens.utils.row_budget import RowBudget


def circuits(n_layers: int = 3, n_heads: int = 4) -> torch.Tensor:
    """All, none, random ones, and such that ablate nothing below the second or third layer."""
    generator = torch.Generator().manual_seed(5)
    keeps = torch.rand(8, n_layers, n_heads, generator=generator) < 0.5
    keeps[0], keeps[1] = True, False
    keeps[2:4, :1] = True
    keeps[4:6, :2] = True
    return keeps


def means_of(model: cl.HookedModel, width: int = 0) -> NodeMeans:
    g = model.geometry
    generator = torch.Generator().manual_seed(9)
    return NodeMeans(
        torch.randn(g.n_layers, 1 + width, g.n_heads, g.d_head, generator=generator).to(model.dtype)
    )


def one_by_one(model, batch, keeps, means, positions):
    """A full forward pass for every circuit and every prompt, unpadded, head by head."""
    found = []
    for keep in keeps:
        rows = []
        for row in range(len(batch)):
            length = int(batch.attention_mask[row].sum())
            alone = batch.take(torch.tensor([row])).last(length)
            hooks = {}
            for layer in range(model.geometry.n_layers):

                def ablate(z, layer=layer, keep=keep):
                    z = z.clone()
                    start = 1 if positions == "all" else z.shape[1] - 1
                    for head in range(z.shape[2]):
                        if not keep[layer, head]:
                            for pos in range(start, z.shape[1]):
                                # Index 0 is the mean over positions, the last that of the last.
                                n = means.heads.shape[1]
                                at = max(0, n - z.shape[1] + pos)
                                z[:, pos, head] = means.heads[layer, at, head]
                    return z

                hooks[model.z_hook(layer)] = ablate
            with torch.no_grad():
                rows.append(answers(model.logits(alone, hooks), batch)[0])
        found.append(torch.stack(rows))
    return torch.stack(found)


@pytest.mark.parametrize("name", ALL)
def test_many_circuits_at_once_equal_one_full_run_each(name):
    model = loaded(name)
    batch, keeps, means = prompts(7, 4, n_prefix=1), circuits(), means_of(model)
    found = ablated_label_logits(model, batch, keeps, means, "all", rows=5)
    expected = one_by_one(model, batch, keeps, means, "all")
    # Some families take norms or softmax in float32 whatever the dtype.
    tolerance = 3e-5 if name in FLOAT32_ONLY else 1e-9
    torch.testing.assert_close(found.to(expected), expected, rtol=tolerance, atol=tolerance)
    # The circuits differ, so that nothing was compared with itself.
    assert len(found.flatten(1).unique(dim=0)) == len(keeps)


@pytest.mark.parametrize("positions", ["all", "decision"])
@pytest.mark.parametrize("width", [0, 5])
def test_positions_and_means_by_position(positions, width):
    model = loaded("gpt2")
    batch, keeps, means = prompts(3, 7, 6, n_prefix=1), circuits(), means_of(model, width)
    found = ablated_label_logits(model, batch, keeps, means, positions)
    expected = one_by_one(model, batch, keeps, means, positions)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_all_heads_are_the_clean_model_and_a_prefix_can_be_used_again():
    model = loaded("qwen2")
    batch, keeps, means = prompts(6, 5, n_prefix=1), circuits(), means_of(model)
    prefix = PrefixCache.capture(model, batch)
    with torch.no_grad():
        assert torch.equal(prefix.labels, model.label_logits(batch))
    first = ablated_label_logits(model, batch, keeps, means, "all", prefix=prefix)
    again = ablated_label_logits(model, batch, keeps.flip(0), means, "all", prefix=prefix)
    torch.testing.assert_close(first, again.flip(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(first[0], prefix.labels)


def test_layers_below_the_lowest_ablated_one_are_not_computed():
    model = loaded("qwen2")
    batch, means = prompts(6, 5, n_prefix=1), means_of(model)
    prefix = PrefixCache.capture(model, batch)
    ran = []
    handles = [
        block.attn.o.original_component.register_forward_hook(
            lambda *_, layer=layer: ran.append(layer)
        )
        for layer, block in enumerate(model.bridge.blocks)
    ]
    some = circuits()[4:6]
    # Once before, because the first start at a layer tries the model out.
    ablated_label_logits(model, batch, some, means, "all", prefix=prefix)
    ran.clear()
    ablated_label_logits(model, batch, some, means, "all", prefix=prefix)
    for handle in handles:
        handle.remove()
    assert ran == [2]


def test_equal_circuits_run_once_and_come_back_in_order(toy_proxy, toy_task, toy_baseline):
    encoded = toy_task.encode(toy_proxy, toy_task["test"][:10])
    generator = torch.Generator().manual_seed(3)
    keeps = torch.rand(6, 2, 8, generator=generator) < 0.5
    keeps[4] = keeps[1]
    found = circuit_label_logits(toy_proxy, encoded, keeps, toy_baseline, batch_size=4)
    assert torch.equal(found[4], found[1])
    means = toy_baseline.means()
    for row in range(10):
        batch = encoded.batch([row])
        expected = ablated_label_logits(toy_proxy, batch, keeps, means, "all")[:, 0]
        torch.testing.assert_close(found[:, row].float(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_mask_is_true_at_its_heads():
    mask = head_mask([cl.Head(1, 2), cl.Head(0, 0)], 2, 3)
    assert mask.tolist() == [[True, False, False], [False, False, True]]


# -- memory --------------------------------------------------------------------------------


def out_of_memory_above(limit: int):
    """Work that runs out of memory with more than ``limit`` items, and what it was given."""
    given = []

    def run(chunk: range) -> list[int]:
        given.append(len(chunk))
        if len(chunk) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return list(chunk)

    return run, given


def test_chunks_halve_until_they_fit_and_stay_so(caplog):
    run, given = out_of_memory_above(3)
    budget = RowBudget(16)
    with caplog.at_level(logging.WARNING):
        pieces = budget.chunked(10, run)
    assert [i for piece in pieces for i in piece] == list(range(10))
    assert given == [10, 5, 2, 2, 2, 2, 2]
    assert [r.getMessage() for r in caplog.records] == [
        "Out of memory; continuing with 5 rows at once.",
        "Out of memory; continuing with 2 rows at once.",
    ]
    given.clear()
    budget.chunked(3, run)
    assert given == [2, 1]


@pytest.mark.parametrize(("rows", "expected"), [(7, [2, 2, 1]), (2, [1] * 5), (100, [5])])
def test_items_of_several_rows(rows, expected):
    assert list(map(len, RowBudget(rows).chunked(5, lambda c: c, rows_per_item=3))) == expected


def test_items_of_several_rows_halve_too():
    run, given = out_of_memory_above(1)
    RowBudget(12).chunked(4, run, rows_per_item=3)
    assert given == [4, 2, 1, 1, 1, 1]


def test_what_cannot_be_halved_is_raised():
    run, given = out_of_memory_above(0)
    with pytest.raises(torch.OutOfMemoryError):
        RowBudget(4).chunked(4, run)
    assert given == [4, 2, 1]

    def fail(chunk):
        raise RuntimeError("some other error")

    with pytest.raises(RuntimeError, match="some other error"):
        RowBudget(4).chunked(4, fail)
    with pytest.raises(cl.InputError, match="must be positive, but is 0"):
        RowBudget(0)


def test_ablation_survives_a_lack_of_memory(monkeypatch):
    model = loaded("qwen2")
    batch, keeps, means = prompts(6, 5, 4, n_prefix=1), circuits(), means_of(model)
    expected = ablated_label_logits(model, batch, keeps, means, "all")
    label_logits = model.label_logits

    def scarce(batch, hooks=None):
        result = label_logits(batch, hooks)
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    monkeypatch.setattr(model, "label_logits", scarce)
    found = ablated_label_logits(model, batch, keeps, means, "all")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
