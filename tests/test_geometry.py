from __future__ import annotations

import pytest
import torch
from helpers import ALL, MASKED, batch_of, loaded, tiny
from peft import LoraConfig, get_peft_model

import circuitlens as cl
from circuitlens.models.geometry import HeadGeometry, norm_parameters, selection_masks
from circuitlens.nodes import Head


def pieces(model: cl.HookedModel, head: Head, kind: str) -> list[torch.Tensor]:
    parameters = dict(model.hf.named_parameters())
    found = [s.of(parameters[s.parameter]) for s in model.geometry.slices(head)]
    kinds = [s.projection for s in model.geometry.slices(head)]
    return [p for p, k in zip(found, kinds, strict=True) if k == kind]


def patterns(model: cl.HookedModel, batch) -> torch.Tensor:
    seen = {}
    with torch.no_grad():
        model.logits(batch, {"blocks.1.attn.hook_pattern": lambda x: seen.__setitem__(0, x)})
    return seen[0]


@pytest.mark.parametrize("name", ALL)
def test_columns_of_o_are_those_of_the_head(name):
    # Oracle: zeroing the head's columns of W_O is the same as zeroing its output z.
    model = cl.load(tiny(name))
    batch = batch_of(model, 8, 8)
    head = Head(1, 2)

    def zero(z):
        z = z.clone()
        z[:, :, head.index] = 0
        return z

    with torch.no_grad():
        ablated = model.logits(batch, {model.z_hook(1): zero})
        (columns,) = pieces(model, head, "o")
        columns.zero_()
        torch.testing.assert_close(model.hf_logits(batch), ablated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_rows_of_q_k_v_move_their_heads_only(name):
    model = cl.load(tiny(name))
    batch = batch_of(model, 8, 8)
    before_pattern, before_z = patterns(model, batch), model.head_outputs(batch)[1]
    head = Head(1, 2)
    g = model.geometry
    group = g.n_heads // g.n_kv_heads
    for kind in "qkv":
        with torch.no_grad():
            weights = [(piece, piece.clone()) for piece in pieces(model, head, kind)]
            for piece, _ in weights:
                piece.add_(torch.randn_like(piece))
            after_pattern, after_z = patterns(model, batch), model.head_outputs(batch)[1]
            for piece, old in weights:
                piece.copy_(old)
        own = [head.index] if kind == "q" else list(range(g.n_heads))
        if kind != "q":
            own = [h for h in own if h // group == head.index // group]
        moved = (after_z - before_z).abs().amax((0, 1, 3)) > 1e-6
        # A norm over the whole of q or k (OLMo 2) lets every head feel a change of one.
        if name == "olmo2" and kind in "qk":
            continue
        assert moved.nonzero()[:, 0].tolist() == own, kind
        shifted = (after_pattern - before_pattern).abs().amax((0, 2, 3)) > 1e-6
        assert shifted.nonzero()[:, 0].tolist() == ([] if kind == "v" else own), kind


@pytest.mark.parametrize("name", ALL)
def test_slices_cover_the_projections_once(name):
    model = loaded(name)
    g = model.geometry
    every = [s for h in g for s in g.slices(h)]
    masks = selection_masks(model.hf, every, [])
    assert all(bool(mask.all()) for mask in masks.values())
    distinct = set(every)
    parameters = dict(model.hf.named_parameters())
    assert sum(s.of(parameters[s.parameter]).numel() for s in distinct) == sum(
        m.numel() for m in masks.values()
    )


def test_grouped_heads_share_their_key_value_head():
    g = cl.load(tiny("qwen2")).geometry

    def kv(index):
        return {s for s in g.slices(Head(0, index)) if s.projection in "kv"}

    assert kv(0) == kv(1) != kv(2) == kv(3)


@pytest.mark.parametrize("name", ALL)
def test_norms_are_those_of_the_residual_stream(name):
    names = norm_parameters(tiny(name))
    parameters = dict(tiny(name).named_parameters())
    assert names
    # ELECTRA's embeddings have a width of their own.
    widths = {32, getattr(tiny(name).config, "embedding_size", 32)}
    assert {parameters[n].shape for n in names} <= {(width,) for width in widths}
    assert not [n for n in names if "q_norm" in n or "k_norm" in n]
    # The final norm and at least one norm a layer.
    assert len({n.rsplit(".", 1)[0] for n in names}) >= 4
    if name in MASKED:
        # Two norms a layer, and those of the embedding and of the head.
        # ModernBERT has none before its first layer, one behind the last, and no biases.
        assert len(names) == (8 if name == "modernbert" else 2 * (2 * 3 + 2))


def test_heads_the_model_does_not_have_are_refused():
    g = cl.load(tiny("gpt2")).geometry
    with pytest.raises(cl.InputError, match=r"no head a3\.h0: it has 3 layers of 4 heads"):
        g.slices(Head(3, 0))


@pytest.mark.parametrize("layer", ["Linear", "adapter"])
def test_a_projection_that_is_no_plain_map_is_named_by_its_path(layer):
    hf = tiny("qwen2")
    if layer == "adapter":
        get_peft_model(hf, LoraConfig(target_modules=["v_proj"], layers_to_transform=[1]))
        expected = r"v_proj of Qwen2ForCausalLM is a layer of a PEFT adapter.*merge_and_unload"
    else:
        # Called as the plain one is, like those of PEFT and of quantisation.
        kind = type("Linear", (torch.nn.Identity,), {})
        hf.model.layers[1].self_attn.v_proj = kind()
        expected = r"v_proj of Qwen2ForCausalLM is a test_geometry\.Linear, not.*quantisation"
    with pytest.raises(cl.UnsupportedModelError, match=rf"model\.layers\.1\.self_attn\.{expected}"):
        HeadGeometry(
            hf,
            [f"model.layers.{layer}.self_attn" for layer in range(3)],
            n_heads=4,
            n_kv_heads=2,
            d_head=8,
            d_model=32,
        )
