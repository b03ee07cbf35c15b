"""Which hooks :func:`circuitlens.decompose` decomposes, and that it does so rightly."""

from __future__ import annotations

import pytest
import torch
from hand_frozen import put
from helpers import batch_of, loaded, node_means

import circuitlens as cl
from circuitlens.cdt.difference import _inside_attention
from circuitlens.models.hooks import recording, then


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["cdt", "ablation"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_every_hook_of_a_block_is_decomposed_rightly_or_refused_in_one_sentence(name, rules):
    """Two source sets, so that the block is below, at and above the lowest source."""
    model = loaded(name)
    batch = batch_of(model, 6)
    means = node_means(model)
    sets = [[(cl.Head(0, 1), 2)], [(cl.Head(1, 2), 3)]]
    names = [n for n in model.bridge.hook_dict if n.startswith("blocks.1.")]
    decomposed, refused = set(), {}
    for hook in names:
        try:
            found = cl.decompose(
                model,
                batch.input_ids,
                sets,
                means.heads.expand(-1, 6, -1, -1),
                rules,
                hooks=[hook],
            )
        except (cl.InputError, cl.UnsupportedModelError) as error:
            refused[hook.removeprefix("blocks.1.")] = str(error)
            continue
        decomposed.add(hook.removeprefix("blocks.1."))
        assert found.check() < 1e-5, hook
        if rules == "ablation":
            clean = activations(model, batch, hook, {})
            for k, [(head, position)] in enumerate(sets):
                where = torch.zeros(1, 6, dtype=torch.bool)
                where[:, position] = True
                edit = put(where, means.heads[head.layer, 0, head.index], head.index)
                moved = activations(model, batch, hook, {model.z_hook(head.layer): edit})
                torch.testing.assert_close(
                    found.activations_relevant[hook][k], clean - moved, rtol=1e-5, atol=1e-6
                )
    assert all(f"blocks.1.{hook}" in message for hook, message in refused.items())
    makes_patterns = {
        "attn.hook_pattern",
        "attn.hook_attn_scores",
        "attn.q.hook_out",
        "attn.k.hook_out",
        "attn.hook_q",
        "attn.hook_k",
    }
    assert makes_patterns <= (decomposed if rules == "ablation" else set(refused))
    assert {
        "attn.hook_in",
        "attn.hook_out",
        "attn.v.hook_out",
        "attn.hook_z",
        "hook_attn_out",
        "hook_out",
        "ln1.hook_scale",
        "mlp.hook_pre",
    } <= decomposed


def activations(model, batch, name, edits):
    """What passes a hook, under edits."""
    recorders, found = recording([name])
    hooks = dict(edits)
    then(hooks, name, recorders[name])
    with torch.no_grad():
        model.logits(batch, hooks)
    return found[name]


def test_what_does_not_run_where_z_is_given():
    inside = ("blocks.2.hook_attn_out", "blocks.2.attn.hook_pattern", "blocks.2.attn.q.hook_out")
    outside = (
        *("blocks.2.hook_mlp_out", "blocks.2.hook_in", "blocks.2.attn.o.hook_in"),
        *("blocks.2.attn.hook_z", "blocks.1.hook_attn_out", "blocks.3.attn.hook_pattern"),
    )
    assert all(_inside_attention(name, 2) for name in inside)
    assert not any(_inside_attention(name, 2) for name in outside)
