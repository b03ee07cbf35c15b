"""Strategies against references: what each trains, chooses and leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import shortened, tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)

import circuitlens as cl
from circuitlens.adapt import changed_edges, select_heads
from circuitlens.adapt.changed_edges import edge_changed_layers
from circuitlens.adapt.headslice import HeadSliceConfig, geometry_of
from circuitlens.adapt.rivals import column_importance, trained_first
from circuitlens.adapt.selections import by_layer, head_pull, lost_relevance
from circuitlens.adapt.strategies import STRATEGIES, Choice, strategy_of
from circuitlens.errors import InputError, UnsupportedModelError
from circuitlens.models.geometry import norm_parameters

FAST = {"learning_rates": [3e-3], "epochs": 2, "quiet": True}
# Their W_O has none, so vectors stay beside the weights.
WITHOUT_BIAS = ("qwen2", "phi3", "llama")
FAMILIES = ("qwen2", "gpt2", "phi3", "llama", "bloom", "gpt_neox", "bert")


@pytest.fixture(scope="module")
def near(toy_task):
    return shortened(toy_task.to("near"))


@pytest.fixture(scope="module")
def choice(toy_proxy, toy_task, toy_scores, near):
    data = near.encode(toy_proxy, near["pool_b"])
    training = cl.adapt.options.TrainingOptions(3e-3, epochs=2)
    return Choice(
        toy_scores.top(3), toy_scores, 0, readout=data.readout, data=data, source=toy_task,
        training=training,
    )  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))


# -- outputs of heads ----------------------------------------------------------------------


def outputs_adapter(name, outputs, heads=("a0.h1", "a2.h0", "a2.h3")):
    config = HeadSliceConfig(heads=heads, projections=(), outputs=outputs, norms="none")
    model = get_peft_model(tiny(name), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in (p for p in model.parameters() if p.requires_grad):
            leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
    return model


def by_hand(name, model, outputs, heads=("a0.h1", "a2.h0", "a2.h3")):
    """Logits of the plain model whose maps W_O read heads times a factor, plus a vector."""
    plain = tiny(name)
    geometry = geometry_of(plain)
    named = dict(model.named_parameters())
    by_layer: dict[int, list[cl.Head]] = {}
    for head in map(cl.Head.parse, heads):
        by_layer.setdefault(head.layer, []).append(head)
    handles = []
    for found in by_layer.values():
        pieces = [next(s for s in geometry.slices(h) if s.projection == "o") for h in found]
        path = pieces[0].parameter.rpartition(".")[0]
        leaves = {
            kind: named.get(f"base_model.model.{path}.headslice_{kind}.default")
            for kind in ("weight", "bias")
        }

        def change(module, inputs, pieces=pieces, leaves=leaves):
            x = inputs[0].clone()
            for n, piece in enumerate(pieces):
                z = x[..., piece.start : piece.stop]
                if leaves["weight"] is not None:
                    z = z * (1 + leaves["weight"][n])
                if leaves["bias"] is not None:
                    width = piece.stop - piece.start
                    z = z + leaves["bias"][n * width : (n + 1) * width]
                x[..., piece.start : piece.stop] = z
            return (x, *inputs[1:])

        handles.append(plain.get_submodule(path).register_forward_pre_hook(change))
    with torch.no_grad():
        return plain(input_ids=tokens()).logits


@pytest.mark.parametrize("outputs", [("scale",), ("offset",), ("scale", "offset")])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_of_heads_are_scaled_and_moved(name, outputs):
    model = outputs_adapter(name, outputs)
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
        plain = tiny(name)(input_ids=tokens()).logits
    assert not torch.allclose(found, plain, atol=1e-3)
    torch.testing.assert_close(found, by_hand(name, model, outputs), atol=1e-5, rtol=1e-4)
    if "offset" in outputs and name in WITHOUT_BIAS:
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(InputError, match="no bias"):
            model.merge_and_unload()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        return
    with torch.no_grad():
        merged = model.merge_and_unload()(input_ids=tokens()).logits
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-4)


def test_a_factor_a_head_is_trained_and_nothing_else(toy_proxy, choice):
    trainable = STRATEGIES["head-scale"].make(toy_proxy, choice, None)
    assert trainable.n_entries == len(toy_proxy.geometry)
    heads = choice.circuit
    trainable = STRATEGIES["head-bias"].make(toy_proxy, choice, heads)
    assert trainable.n_entries == len(heads) * toy_proxy.geometry.d_head


@pytest.mark.parametrize("strategy", ["head-scale", "head-bias"])
def test_outputs_of_heads_come_back_from_a_file(toy_proxy, near, toy_scores, strategy, tmp_path):
    options = {**FAST, "learning_rates": [0.1], "epochs": 6}
    result = cl.transfer(
        toy_proxy, toy_scores.top(3), near, strategy=strategy, scores=toy_scores, **options
    )
    assert result.learning_rate > 0
    result.save(tmp_path)
    again = cl.TransferResult.load(tmp_path, toy_proxy).model
    data = near.encode(toy_proxy, "validation")
    logits = cl.tasks.evaluation.label_scores
    assert torch.equal(logits(again, data), logits(result.model, data))
    peft = PeftModel.from_pretrained(toy_proxy.clone().hf, str(tmp_path))
    batch = data.batch([0, 1])
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for m in (result.model.hf, peft)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_outputs_and_columns_are_not_trained_together():
    with pytest.raises(InputError, match="cannot be trained together"):
        HeadSliceConfig(heads=["a0.h0"], outputs=["scale"])
    with pytest.raises(InputError, match="no output 'factor'"):
        HeadSliceConfig(heads=["a0.h0"], projections=(), outputs=["factor"])
    model = outputs_adapter("qwen2", ("scale",))
    with pytest.raises(UnsupportedModelError, match="other parts of these heads"):
        model.add_adapter("other", HeadSliceConfig(heads=["a0.h1"]))


# -- single entries --------------------------------------------------------------------------


def test_shield_freezes_the_half_of_the_columns_that_matters_most(toy_proxy, choice, toy_task):
    trainable = STRATEGIES["shield"].make(toy_proxy, choice, None)
    data = toy_task.encode(toy_proxy, toy_task["pool_a"])
    read: dict[str, torch.Tensor] = {}
    path = toy_proxy.geometry.slices(cl.Head(1, 0))[-1].parameter
    module = toy_proxy.hf.get_submodule(path.rpartition(".")[0])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:500]
    total = 0.0
    for i in order.tolist():
        handle = module.register_forward_pre_hook(lambda m, x: read.update(x=x[0].detach()))
        batch = data.batch([i])
        with torch.no_grad():
            batch.readout.losses(toy_proxy, batch, toy_proxy.hf)
        handle.remove()
        total = total + read["x"].square().sum((0, 1))
    expected = module.weight.detach().norm(dim=0) * total.sqrt()
    found = column_importance(toy_proxy, data)[path]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    mask = trainable.masks[path]
    frozen = ~mask.any(0)
    assert frozen.sum() == mask.shape[1] // 2
    assert bool((mask.all(0) | frozen).all())
    assert found[frozen].min() >= found[~frozen].max()
    embedding = "model.embed_tokens.weight"
    assert bool(trainable.masks[embedding].all())


def test_what_is_shielded_stays_to_the_bit(toy_proxy, near, toy_scores, choice):
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, strategy="shield", **FAST)
    masks = STRATEGIES["shield"].make(toy_proxy, choice, None).masks
    before = dict(toy_proxy.hf.named_parameters())
    moved = 0
    for name, parameter in result.model.hf.named_parameters():
        assert torch.equal(parameter[~masks[name]], before[name][~masks[name]])
        moved += int((parameter != before[name]).sum())
    assert moved > 0


def test_the_lottery_trains_what_full_training_moved_most(toy_proxy, choice):
    trainable = STRATEGIES["lottery"].make(toy_proxy, choice, None)
    full = STRATEGIES["full"].make(toy_proxy, choice, None)
    from circuitlens.adapt.training import train

    train(full.model, choice.data, None, choice.training, trainable=full, quiet=True)
    before = dict(toy_proxy.hf.named_parameters())
    norms = set(norm_parameters(toy_proxy.hf))
    moved = {n: (p - before[n]).abs() for n, p in full.model.hf.named_parameters()}
    chosen = torch.cat([moved[n][m] for n, m in trainable.masks.items() if n not in norms])
    left = torch.cat(
        [
            moved[n][~trainable.masks[n]] if n in trainable.masks else moved[n].flatten()
            for n in moved
            if n not in norms
        ]
    )
    slices = STRATEGIES["circuit"].make(toy_proxy, choice, choice.circuit)
    # The circuit's biases and slices; and all norms in both.
    n_norms = sum(before[n].numel() for n in norms)
    assert len(chosen) == slices.n_entries - n_norms
    assert chosen.min() >= left.max()
    assert trainable.n_entries == slices.n_entries


@pytest.mark.slow
def test_layers_whose_edges_change_most_get_the_highest_rank(
    toy_proxy, toy_task, choice, monkeypatch
):
    found = edge_changed_layers(toy_proxy, choice)
    # By hand: the edges of both models, found by the public verb.
    models = [toy_proxy, trained_first(toy_proxy, choice).model]
    share = len(choice.circuit) / len(toy_proxy.geometry)
    edges = []
    for model in models:
        baseline = cl.label_balanced_mean(model, toy_task, allow_chance=True, quiet=True)
        given = {"share": share, "max_examples": 256, "seed": choice.seed, "quiet": True}
        edges.append(cl.discover(model, toy_task, baseline, **given).edge_frame())
    table = edges[0].merge(edges[1], on=["source", "target"], how="outer").fillna(0.0)
    change = (table["score_x"] - table["score_y"]).abs()
    for layer in (0, 1):
        ends = sum(table[end].str.startswith(f"a{layer}.") * change for end in ("source", "target"))
        assert found[layer] == pytest.approx(ends.sum(), rel=1e-4)
    assert found[0] > 0
    trainable = STRATEGIES["circuit-lora-edges"].make(toy_proxy, choice, None)
    assert trainable.adapter is not None
    with pytest.raises(cl.InputError, match="looks at the source's data"):
        edge_changed_layers(toy_proxy, replace(choice, source=None))
    ruined = toy_proxy.clone()
    with torch.no_grad():
        ruined.hf.model.norm.weight.zero_()
    monkeypatch.setattr(changed_edges, "trained_first", lambda *_: SimpleNamespace(model=ruined))
    with pytest.raises(cl.InputError, match="Give lower learning rates"):
        edge_changed_layers(toy_proxy, choice)


# -- heads that the target pulls at ----------------------------------------------------------


@pytest.mark.parametrize("by", ["fisher", "weight-gradient"])
def test_the_pull_is_that_of_gradients_of_single_examples(toy_proxy, choice, by):
    data = choice.data.take(range(12))
    found = head_pull(toy_proxy, data, by)
    g, model = toy_proxy.geometry, toy_proxy.clone()
    named = dict(model.hf.named_parameters())
    squares = {n: torch.zeros_like(p) for n, p in named.items()}
    for p in named.values():
        p.requires_grad_(True)
    for i in range(len(data)):
        model.hf.zero_grad()
        batch = data.batch([i])
        batch.readout.losses(model, batch, model.hf).sum().backward()
        for n, p in named.items():
            if p.grad is not None:
                squares[n] += p.grad.square() if by == "fisher" else p.grad
    if by != "fisher":
        squares = {n: (s * named[n]).abs() for n, s in squares.items()}
    for head in g:
        expected = sum(
            float(s.of(squares[s.parameter].detach()).sum()) for s in g.slices(head)
        ) / len(data)
        assert float(found[head.layer, head.index]) == pytest.approx(expected, rel=1e-3)


@given(st.lists(st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=1, max_size=5))
def test_layers_are_filled_one_after_the_other(rows):
    values = torch.tensor(rows)
    ranked = by_layer(values)
    sums = values.sum(1)
    for a in range(len(rows)):
        for b in range(len(rows)):
            if sums[a] > sums[b]:
                assert ranked[a].min() > ranked[b].max()
        best = ranked[a].argmax()
        assert values[a, best] == values[a].max()


def test_nothing_is_lost_on_the_source_itself(toy_proxy, toy_task, toy_scores):
    ids = set(toy_scores.example_ids)
    examples = [e for e in toy_task["pool_a"] if e.id in ids]
    data = toy_task.encode(toy_proxy, examples)
    lost = lost_relevance(toy_proxy, data, toy_task, toy_scores, max_examples=len(data))
    torch.testing.assert_close(lost, torch.zeros_like(lost), atol=1e-3, rtol=0)


@pytest.mark.parametrize("by", ["fisher", "weight-gradient", "lost-relevance"])
@pytest.mark.parametrize("layers", [False, True])
def test_a_selection_is_a_circuit_for_any_strategy(
    toy_proxy, near, toy_scores, by, layers
):  # fmt: skip
    circuit = select_heads(toy_proxy, near, 5, by, layers=layers, scores=toy_scores)
    assert len(circuit) == 5
    assert by in circuit.selection
    result = cl.transfer(toy_proxy, circuit, near, strategy="head-bias", **FAST)
    assert result.heads == circuit
    name = by + "-layers" * layers
    same = cl.transfer(toy_proxy, circuit, near, strategy=name, scores=toy_scores, **FAST)
    assert same.heads == circuit


def test_selections_that_cannot_be_are_refused(toy_proxy, near, toy_task):
    with pytest.raises(InputError, match="scores"):
        select_heads(toy_proxy, near, 3, "lost-relevance")
    with pytest.raises(InputError, match="16 heads"):
        select_heads(toy_proxy, near, 99)
    alone = cl.Task(**{**vars(near), "origin": None})
    with pytest.raises(InputError, match="source"):
        cl.transfer(toy_proxy, cl.Circuit.of(["a0.h0"], 2, 8), alone, strategy="shield", **FAST)


# -- any method of PEFT ------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj"]
LINES = {
    "shira": ShiraConfig(r=2, target_modules=TARGETS),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, alpha=2, target_modules=TARGETS),
    "vera": VeraConfig(r=8, target_modules=TARGETS),
    "lora": LoraConfig(r=2, target_modules=TARGETS),
}
TURNS = {
    "oft": OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "lora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
}


@pytest.mark.parametrize("name", LINES)
def test_methods_of_peft_are_scaled_along_a_line(toy_proxy, near, toy_scores, name, tmp_path):
    result = cl.transfer(
        toy_proxy, toy_scores.top(3), near, strategy=LINES[name], keep_source=0.5, **FAST
    )
    assert result.strategy.startswith(f"peft-{name}-")
    assert [p.alpha for p in result.front.points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    result.save(tmp_path)
    data = near.encode(toy_proxy, "validation")
    logits = cl.tasks.evaluation.label_scores
    again = cl.TransferResult.load(tmp_path, toy_proxy).model
    torch.testing.assert_close(logits(again, data), logits(result.model, data))

    made = strategy_of(LINES[name]).make(
        toy_proxy, Choice(toy_scores.top(3), readout=data.readout), None
    )
    start = made.state()
    torch.manual_seed(0)
    end = {n: v + 0.05 * torch.randn_like(v) for n, v in start.items()}
    assert made.is_line(start, end)

    def weights(entries):
        other = strategy_of(LINES[name]).make(
            toy_proxy, Choice(toy_scores.top(3), readout=data.readout), None
        )
        other.load(entries)
        return dict(other.merged().hf.named_parameters())

    w0, w1 = weights(start), weights(end)
    for key, found in weights(made.between(start, end, 0.25)).items():
        torch.testing.assert_close(found, w0[key].lerp(w1[key], 0.25), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TURNS)
def test_what_is_no_line_is_tried_at_its_end_only(toy_proxy, near, toy_scores, name):
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, strategy=TURNS[name], **FAST)
    assert [p.alpha for p in result.front.points] == [0.0, 1.0]


def test_a_configuration_comes_from_a_file(toy_proxy, near, toy_scores, tmp_path):
    LINES["shira"].save_pretrained(str(tmp_path))
    given = f"peft:{tmp_path / 'adapter_config.json'}"
    assert strategy_of(given).name == strategy_of(LINES["shira"]).name
    (tmp_path / "own.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": TARGETS})
    )
    result = cl.transfer(
        toy_proxy, toy_scores.top(3), near, strategy=f"peft:{tmp_path / 'own.json'}", **FAST
    )
    attention = toy_proxy.hf.model.layers[0].self_attn
    shapes = [getattr(attention, name).weight.shape for name in TARGETS]
    assert result.n_trainable == 2 * 2 * sum(map(sum, shapes))
    for content in ("{", '{"peft_type": "NONE"}', '{"peft_type": "LORA", "rank": 3}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match="not a PEFT configuration"):
            strategy_of(f"peft:{tmp_path / 'bad.json'}")


def test_two_configurations_have_two_names():
    a, b = (strategy_of(LoraConfig(r=r, target_modules=TARGETS)).name for r in (2, 4))
    assert a != b
    assert strategy_of(LoraConfig(r=2, target_modules=TARGETS[::-1])).name == a


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "before the prompt"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "changes the weights"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights=False), "starts from weights"),
        (LoraConfig(target_modules=["nothing"]), "does not fit"),
        (3, "name or a configuration"),
    ],
)
def test_configurations_that_would_mislead_are_refused(
    toy_proxy, near, toy_scores, config, message
):
    before = toy_proxy.fingerprint()
    with pytest.raises(InputError, match=message):
        cl.transfer(toy_proxy, toy_scores.top(3), near, strategy=config, **FAST)
    assert toy_proxy.fingerprint() == before


# -- merging -----------------------------------------------------------------------------------


def test_a_refused_merge_leaves_every_layer_as_it_was():
    model = get_peft_model(tiny("qwen2"), HeadSliceConfig(heads=["a0.h1", "a2.h0"]))
    leaves = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for leaf in leaves:
            leaf.fill_(0.1)
        leaves[-1].fill_(float("inf"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="infinities"):
            merge(safe_merge=True)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(before[n], p) for n, p in after.items())


@pytest.mark.parametrize("name", ["v1.0", ""])
def test_names_of_adapters_with_dots_are_refused_before_anything_changes(name):
    hf = tiny("qwen2")
    before = dict(hf.named_parameters())
    with pytest.raises(InputError, match="cannot be named"):
        get_peft_model(hf, HeadSliceConfig(heads=["a0.h1"]), adapter_name=name)
    assert dict(hf.named_parameters()).keys() == before.keys()
    model = get_peft_model(hf, HeadSliceConfig(heads=["a0.h1"]))
    with pytest.raises(InputError, match="cannot be named"):
        model.add_adapter("v.2", HeadSliceConfig(heads=["a0.h1"]))
    assert list(model.peft_config) == ["default"]
