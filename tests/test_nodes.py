"""Other nodes than heads: heads with MLPs, heads at positions, neurons."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALL,
    FLOAT32_ONLY,
    answers,
    batch_of,
    loaded,
    prompts,
    quick_or_slow,
    row,
    tiny,
)
from hypothesis import given
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.adapt.neuron_entries import neuron_masks
from circuitlens.adapt.strategies import STRATEGIES, Choice
from circuitlens.cdt import RULES
from circuitlens.cdt.ablation import ablated_label_logits
from circuitlens.cdt.gradient import LinearisedRun
from circuitlens.models.geometry import norm_parameters
from circuitlens.neurons import neuron_hook, neuron_means
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import parse_node

PLAIN = [name for name in ALL if name not in ("mixtral", "qwen3_moe")]
GRIDS = {
    "heads": cl.NodeGrid("heads", 3, 4, 4),
    "heads+mlps": cl.NodeGrid("heads+mlps", 3, 5, 4),
    "heads@positions": cl.NodeGrid("heads@positions", 3, 8 * 4, 4),
    "neurons": cl.NodeGrid("neurons", 3, 48, 4),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_nodes_have_names_and_places(kind, tmp_path):
    grid = GRIDS[kind]
    nodes = list(grid)
    assert len(nodes) == len(grid) == len(set(map(str, nodes)))
    assert [parse_node(str(node)) for node in nodes] == nodes
    places = [(layer, column) for layer in range(3) for column in range(grid.width)]
    assert [(node.layer, grid.column(node)) for node in nodes] == places
    some = nodes[1::3]
    circuit = cl.NodeCircuit.of([*map(str, reversed(some)), some[0]], grid)
    assert list(circuit) == some
    assert str(some[1]) in circuit
    assert str(nodes[0]) not in circuit
    assert int(grid.mask(some).sum()) == len(some)
    circuit.save(tmp_path / "c.json")
    assert cl.NodeCircuit.load(tmp_path / "c.json") == circuit
    foreign = {"heads": "m1", "heads+mlps": "m1.n2", "heads@positions": "a1.h2", "neurons": "m1"}
    outside = {"heads": "a1.h4", "heads+mlps": "m3", "heads@positions": "a1.h2@-9"}
    for name in (foreign[kind], outside.get(kind, "m2.n48")):
        with pytest.raises(cl.InputError, match=f"There is no node {name} among the {kind}".replace("+", r"\+")):  # fmt: skip  # noqa: E501
            cl.NodeCircuit.of([name], grid)


def test_the_column_of_the_mlp_is_no_head():
    with pytest.raises(cl.InputError, match=r"There is no node a1\.h4 among the heads\+mlps"):
        cl.NodeCircuit.of(["a1.h4"], GRIDS["heads+mlps"])


@given(st.text("amhn.@-0123456789", max_size=12))
def test_only_names_of_nodes_are_read(text):
    try:
        node = parse_node(text)
    except cl.InputError:
        return
    assert parse_node(str(node)) == node


def means_of(model, width: int) -> NodeMeans:
    g = model.geometry
    torch.manual_seed(2)
    return NodeMeans(
        torch.randn(g.n_layers, 1, g.n_heads, g.d_head, dtype=model.dtype),
        torch.randn(g.n_layers, 1, g.d_model, dtype=model.dtype),
        torch.randn(g.n_layers, width, dtype=model.dtype),
    )


def width_of(model) -> int:
    batch = batch_of(model, 3)
    run = LinearisedRun(model, batch, RULES["cdt-linear"], nodes=[neuron_hook(model, 0)])
    return int(run.outputs[neuron_hook(model, 0)].shape[-1])


@pytest.mark.parametrize("kind", ["heads+mlps", "heads@positions", "neurons"])
@pytest.mark.parametrize("name", [quick_or_slow(name) for name in PLAIN])
def test_ablation_of_many_circuits_is_that_of_one_prompt_alone(name, kind):
    model = loaded(name)
    neurons = width_of(model)
    means, batch = means_of(model, neurons), prompts(7, 4, n_prefix=1)
    width = {"heads+mlps": 5, "heads@positions": 7 * 4, "neurons": neurons}[kind]
    torch.manual_seed(1)
    keeps = torch.rand(4, 3, width) < 0.6
    keeps[0] = True
    keeps[1, 0] = True
    found = ablated_label_logits(model, batch, keeps, means, "all", rows=3, kind=kind)
    expected = torch.stack(
        [
            torch.cat([by_hand(model, row(batch, n), keep, means, kind) for n in range(2)])
            for keep in keeps
        ]
    )
    tolerance = 5e-5 if name in FLOAT32_ONLY else 1e-9
    torch.testing.assert_close(found.to(expected), expected, rtol=tolerance, atol=tolerance)
    assert len(found.flatten(1).unique(dim=0)) == 4


def by_hand(model, alone, keep, means, kind):
    """One circuit on one unpadded prompt, node by node and position by position."""
    n = alone.input_ids.shape[1]
    hooks = {}
    for layer in range(3):

        def heads(z, layer=layer):
            z = z.clone()
            for position in range(1, n):
                for head in range(4):
                    column = head if kind != "heads@positions" else (7 - n + position) * 4 + head
                    if not keep[layer, column]:
                        z[:, position, head] = means.heads[layer, 0, head]
            return z

        def mlp(out, layer=layer):
            out = out.clone()
            if not keep[layer, 4]:
                out[:, 1:] = means.mlps[layer, 0]
            return out

        def neurons(activation, layer=layer):
            activation = activation.clone()
            away = ~keep[layer]
            activation[:, 1:, away] = means.neurons[layer, away]
            return activation

        if kind == "neurons":
            hooks[neuron_hook(model, layer)] = neurons
        else:
            hooks[model.z_hook(layer)] = heads
        if kind == "heads+mlps":
            hooks[model.mlp_hook(layer)] = mlp
    with torch.no_grad():
        return answers(model.logits(alone, hooks), alone)


@pytest.mark.parametrize("name", PLAIN)
def test_neurons_add_up_to_their_mlp(name):
    model = loaded(name)
    batch, layers = batch_of(model, 7, 5), range(3)
    hooks = [neuron_hook(model, n) for n in layers] + [model.mlp_hook(n) for n in layers]
    run = LinearisedRun(model, batch, RULES["cdt-linear"], nodes=hooks)
    slopes = run.gradients(run.labels[:, 0].sum())
    tokens = batch.attention_mask.bool()
    for layer in layers:
        at, out = neuron_hook(model, layer), model.mlp_hook(layer)
        last = getattr(model.bridge.blocks[layer].mlp, "out")  # noqa: B009
        bias = getattr(last.original_component, "bias", None)
        mlp = run.outputs[out] - (0 if bias is None else bias)
        of_neurons = (run.outputs[at] * slopes[at]).sum(-1)[tokens]
        of_mlp = (mlp * slopes[out]).sum(-1)[tokens]
        close = 1e-4 if name in FLOAT32_ONLY else 1e-8
        torch.testing.assert_close(of_neurons, of_mlp, rtol=close, atol=close)
        assert of_mlp.abs().max() > 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_without_its_entries_a_neuron_says_nothing(name):
    model, batch = loaded(name), batch_of(loaded(name), 6, 6)
    chosen = [cl.Neuron(0, 3), cl.Neuron(2, 1), cl.Neuron(2, 5)]
    masks = neuron_masks(model, chosen)
    emptied = cl.load(tiny(name))
    with torch.no_grad():
        for parameter_name, parameter in emptied.hf.named_parameters():
            if parameter_name in masks:
                parameter[masks[parameter_name]] = 0.0

        def silent(indices):
            return lambda x: x.index_fill(-1, torch.tensor(indices), 0.0)

        hooks = {neuron_hook(model, 0): silent([3]), neuron_hook(model, 2): silent([1, 5])}
        found, expected = emptied.label_logits(batch), model.label_logits(batch, hooks)
        close = 1e-5 if name in FLOAT32_ONLY else 1e-9
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        assert not torch.allclose(found, model.label_logits(batch))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_has_no_row_of_neurons(name):
    with pytest.raises(cl.UnsupportedModelError, match="no single row of neurons in layer 0"):
        neuron_hook(loaded(name), 0)


@pytest.fixture(scope="module")
def few(toy_proxy, toy_task):
    """A baseline of so many examples as these tests can afford."""
    return cl.label_balanced_mean(
        toy_proxy, toy_task, examples=toy_task["pool_a"][:150], quiet=True
    )


@pytest.fixture(scope="module")
def every(toy_proxy, toy_task, few):
    given = {"max_examples": 30, "quiet": True}
    scores = cl.relevance(toy_proxy, toy_task, few, mlps=True, by_position=True, **given)
    return {
        "heads+mlps": cl.NodeScores.with_mlps(scores),
        "heads@positions": cl.NodeScores.at_positions(scores),
        "neurons": cl.neuron_relevance(toy_proxy, toy_task, few, **given),
        "": scores,
    }


def test_scores_of_neurons_are_those_of_the_verbs(every, toy_proxy, toy_task, few):
    neurons, scores = every["neurons"], every[""]
    torch.testing.assert_close(neurons.per_example.sum(-1), scores.mlps, rtol=1e-3, atol=1e-4)
    small = cl.neuron_relevance(toy_proxy, toy_task, few, max_examples=30, batch_size=3, quiet=True)
    torch.testing.assert_close(small.per_example, neurons.per_example, rtol=1e-3, atol=1e-5)
    frame = neurons.to_frame(5)
    assert frame["node"].tolist() == [str(node) for node in neurons.ranking()[:5]]
    assert (frame["low"] <= frame["relevance"]).all()
    # Balanced over labels, as the means of heads are.
    means = neuron_means(toy_proxy, toy_task, few)
    last = [toy_proxy.hf.model.layers[n].mlp.down_proj.weight for n in range(2)]
    of_mlps = torch.stack([w.detach() @ m for w, m in zip(last, means, strict=True)])
    torch.testing.assert_close(of_mlps, few.mlp_mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["heads+mlps", "heads@positions", "neurons"])
def test_circuits_of_nodes_are_measured(kind, every, toy_proxy, toy_task, few, tmp_path):
    scores = every[kind]
    shortest = sorted(toy_task.held_out, key=lambda e: len(e.fields["text"].split()))[:24]
    options = {"examples": shortest, "n_random": 3, "quiet": True}
    given = (toy_proxy, toy_task)
    size = len(scores.grid) // 3
    curve = cl.faithfulness(*given, scores, few, sizes=[size], **options)
    assert (curve.nodes, curve.n_heads) == (kind, len(scores.grid))
    assert curve.faithfulness[[0, -1]].tolist() == [0, 1]
    assert curve.at(size)["faithfulness"] > curve.random_faithfulness[:, 1].mean()
    circuit = scores.top(size)
    alone = cl.faithfulness(*given, circuit, few, **options)
    assert alone.at(size)["margin"] == pytest.approx(curve.at(size)["margin"])
    curve.save(tmp_path / "curve.safetensors")
    again = cl.FaithfulnessCurve.load(tmp_path / "curve.safetensors")
    assert again.nodes == kind
    fig = cl.view.faithfulness_curve(again)
    named = {"heads+mlps": "heads and MLPs", "heads@positions": "heads at positions"}
    expected = f"{named.get(kind, kind)} kept, of {len(scores.grid):,}"
    assert fig.layout.xaxis2.title.text == expected
    scores.save(tmp_path / "scores.safetensors")
    loaded_again = cl.NodeScores.load(tmp_path / "scores.safetensors")
    assert loaded_again.top(size) == circuit
    assert str(len(scores.grid)) in repr(loaded_again)


def test_heads_at_all_positions_are_heads(every, toy_proxy, toy_task, few):
    scores = every["heads@positions"]
    grid, heads = scores.grid, every[""].top(4)
    shortest = sorted(toy_task.held_out, key=lambda e: len(e.fields["text"].split()))[:16]
    nodes = [n for n in grid if cl.Head(n.layer, n.index) in heads]
    wide = cl.NodeCircuit.of(nodes, grid)
    assert wide.heads() == heads
    found, plain = (
        cl.faithfulness(toy_proxy, toy_task, c, few, examples=shortest, n_random=0, quiet=True)
        for c in (wide, heads)
    )
    assert found.margin == pytest.approx(plain.margin, rel=1e-5)


def test_what_cannot_be_measured_is_refused(every, toy_proxy, toy_task, few):
    scores, given = every["heads@positions"], (toy_proxy, toy_task)
    narrow = cl.NodeGrid("heads@positions", 2, 3 * 8, 8)
    with pytest.raises(cl.InputError, match="told apart at 3 positions from the end, but"):
        cl.faithfulness(*given, cl.NodeCircuit.of(["a0.h0@-1"], narrow), few)
    with pytest.raises(cl.InputError, match="A circuit has its own size"):
        cl.faithfulness(*given, scores.top(2), few, sizes=[1])
    other = cl.NodeCircuit.of(["a0.h0"], GRIDS["heads+mlps"])
    with pytest.raises(cl.InputError, match="3 × 4 model, but toy-0 has 2 layers of 8"):
        cl.faithfulness(*given, other, few)
    plain = cl.relevance(*given, few, max_examples=4, quiet=True)
    with pytest.raises(cl.InputError, match="mlps=True"):
        cl.NodeScores.with_mlps(plain)
    with pytest.raises(cl.InputError, match="by_position=True"):
        cl.NodeScores.at_positions(plain)
    with pytest.raises(cl.InputError, match="rules of gradients, not 'cdt'"):
        cl.neuron_relevance(*given, few, rules="cdt")
    with pytest.raises(cl.InputError, match="strategy='neurons'"):
        every["neurons"].top(3).heads()


@pytest.mark.slow
def test_neurons_are_trained_and_nothing_else(toy_proxy, toy_task, toy_scores):
    circuit = toy_scores.top(3)
    choice = Choice(circuit, toy_scores, source=toy_task)
    trainable = STRATEGIES["neurons"].make(toy_proxy, choice, None)
    norms = set(norm_parameters(toy_proxy.hf))
    slices = STRATEGIES["circuit"].make(toy_proxy, choice, circuit)
    each = 3 * toy_proxy.geometry.d_model
    budget = slices.n_entries - sum(dict(toy_proxy.hf.named_parameters())[n].numel() for n in norms)
    chosen = {n: m for n, m in trainable.masks.items() if n not in norms}
    assert sum(int(m.sum()) for m in chosen.values()) == budget // each * each
    assert all(".mlp." in name for name in chosen)
    baseline = cl.label_balanced_mean(toy_proxy, toy_task, quiet=True)
    scores = cl.neuron_relevance(toy_proxy, toy_task, baseline, max_examples=256, quiet=True)
    top = scores.top(budget // each)
    for name, mask in neuron_masks(toy_proxy, top).items():
        assert torch.equal(mask, chosen[name]), name
    with pytest.raises(cl.InputError, match="looks at the source's data"):
        STRATEGIES["neurons"].make(toy_proxy, Choice(circuit, toy_scores), None)
