"""What heads do and are called: cards, the margin by layer, names, graphs of other tools."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from helpers import ALL, loaded
from hypothesis import given
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.graphs import _edges, heads_of_graph, write_graph
from circuitlens.models.hooks import recording


def test_the_margin_by_layer_is_that_of_a_shorter_model(toy_proxy, toy_task):
    """Oracle: the same weights without the layers above."""
    examples = toy_task["validation"][:20]
    found = cl.margin_by_layer(toy_proxy, toy_task, examples=examples, batch_size=7, quiet=True)
    assert found.stages == ("embeddings", "layer 0", "layer 1")
    frame = found.to_frame()
    for n in (0, 1, 2):
        hf = deepcopy(toy_proxy.hf)
        hf.model.layers = hf.model.layers[:n]
        hf.config.num_hidden_layers = n
        encoded = toy_task.encode(toy_proxy, examples)
        tokens = encoded.readout.tokens
        for i in range(len(examples)):
            with torch.no_grad():
                logits = hf(torch.tensor([encoded.tokens[i]])).logits[0, -1, list(tokens)]
            right = logits[encoded.gold[i]]
            expected = right - (logits.sum() - right) / 2
            assert float(found.per_example[i, n]) == pytest.approx(float(expected), abs=1e-4)
            assert bool(found.right[i, n]) == (int(logits.argmax()) == encoded.gold[i])
        assert frame["accuracy"][n] == pytest.approx(float(found.right[:, n].double().mean()))
    whole = cl.evaluate(toy_proxy, toy_task, examples, quiet=True)
    assert frame["margin"].iloc[-1] == pytest.approx(whole.margin, abs=1e-4)
    assert (frame["low"] <= frame["margin"]).all()
    assert "margin positive" in frame


def test_it_is_saved_drawn_and_refused(toy_proxy, toy_task, tmp_path):
    found = cl.margin_by_layer(toy_proxy, toy_task, quiet=True)
    found.save(tmp_path / "m.safetensors")
    again = cl.MarginByLayer.load(tmp_path / "m.safetensors")
    assert again.to_frame().equals(found.to_frame())
    fig = cl.view.margin_lens(again, mode="dark")
    line = next(t for t in fig.data if t.name == "all examples")
    assert list(line.y) == list(found.to_frame()["margin"])
    assert len(cl.view.margin_lens(again, by_label=False).data) == 3
    with pytest.raises(cl.InputError, match="no examples to look at"):
        cl.margin_by_layer(toy_proxy, toy_task, examples=[])


@pytest.mark.parametrize("name", ALL)
def test_every_family_can_be_read_from_its_last_layer(name):
    """With the residual of the whole model behind the last layer, the answer is the model's."""
    model = loaded(name)
    n = model.geometry.n_layers
    tokens = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    batch = model.unlabelled(tokens)
    hook = f"blocks.{n - 1}.hook_out"
    hooks, seen = recording([hook])
    with torch.no_grad():
        clean = model.logits(batch, hooks)
        assert torch.equal(model.logits(batch, {hook: lambda _: seen[hook]}), clean)
        assert not torch.allclose(model.logits(batch, {hook: lambda x: x.flip(-1)}), clean)


@pytest.fixture(scope="module")
def roles(toy_proxy, toy_task, toy_scores, toy_baseline):
    return cl.head_roles(
        toy_proxy, toy_task, toy_scores.top(2), toy_baseline, max_examples=30, quiet=True
    )


def test_a_card_shows_what_the_role_says(roles, toy_scores):
    head = roles.roles[0].head
    circuit = toy_scores.top(2).named({head: "<i>mine</i> $x$"})
    fig = cl.view.head_card(roles, str(head), circuit)
    assert "&lt;i&gt;mine&lt;/i&gt; &#36;x&#36;" in fig.layout.title.text
    places, tokens, raised = fig.data
    role = roles.roles[0]
    assert list(places.x) == [role.first, role.previous, role.itself, role.copies]
    assert list(tokens.x) == [share for _, share in role.looked_at]
    assert [t.replace("·", " ") for t in tokens.y] == [token for token, _ in role.looked_at]
    assert raised.z.tolist() == [list(row.values()) for row in role.raises.values()]
    other = cl.Circuit.of([head], 2, 8).complement().heads
    outside = next(h for h in other if h not in {r.head for r in roles.roles})
    with pytest.raises(cl.InputError, match=f"Head {outside} is none of"):
        cl.view.head_card(roles, outside)


def test_names_travel(toy_scores, tmp_path):
    circuit = toy_scores.top(4)
    first, second = circuit.heads[:2]
    named = circuit.named({first: "  negation\n head ", str(second): "copy"})
    assert named == circuit
    assert named.label(first) == f"{first} (negation head)"
    assert named.label(circuit.heads[3]) == str(circuit.heads[3])
    named.save(tmp_path / "c.json")
    again = cl.Circuit.load(tmp_path / "c.json")
    assert again.names == named.names == {first: "negation head", second: "copy"}
    assert (again | circuit.complement()).names == again.names
    assert (again - {first}).names == {second: "copy"}
    assert again.named({first: ""}).names == {second: "copy"}
    assert list(again.to_frame()["name"])[:2] == ["negation head", "copy"]
    bars = cl.view.head_bars(toy_scores, n=16, circuit=again)
    assert f"{first} (negation head)" in bars.data[0].y
    with pytest.raises(cl.InputError, match="is not in the circuit, so it cannot be named"):
        circuit.named({circuit.complement().heads[0]: "x"})


@pytest.mark.parametrize("parallel", [False, True])
def test_graphs_have_the_edges_of_a_residual_stream(parallel):
    edges = list(_edges(2, 3, parallel))
    assert len(edges) == len(set(edges))
    # What is written before can be read: by a head in three ways.
    sources = {"a0.h0": 1, "m0": 1 + 3 * (not parallel), "a1.h0": 5, "m1": 5 + 3 * (not parallel)}
    for target, n in sources.items():
        times = 3 if target.startswith("a") else 1
        assert sum(t == target for _, t, _ in edges) == times * n, target
    assert sum(t == "logits" for _, t, _ in edges) == 1 + 2 * 4


def test_a_circuit_is_written_and_read_as_a_graph(toy_proxy, toy_scores, tmp_path):
    circuit, path = toy_scores.top(5), tmp_path / "graph.json"
    circuit.save_graph(path, toy_proxy, toy_scores.mean)
    content = json.loads(path.read_text())
    assert content["cfg"] == {
        "n_layers": 2, "n_heads": 8, "d_model": 64, "parallel_attn_mlp": False
    }  # fmt: skip
    assert content["nodes"]["input"] == {"in_graph": True}
    head = circuit.heads[0]
    score = float(toy_scores.mean[head.layer, head.index])
    assert content["nodes"][str(head)] == {"in_graph": True, "score": score}
    out = circuit.complement().heads[0]
    assert content["edges"][f"input->{head}<q>"]["in_graph"]
    assert not content["edges"][f"{out}->logits"]["in_graph"]
    assert cl.Circuit.load_graph(path) == circuit
    with pytest.raises(cl.InputError, match="The circuit is of a 2 × 8 model"):
        circuit.save_graph(path, loaded("qwen2"))


@given(st.one_of(st.text(max_size=20), st.recursive(
    st.none() | st.booleans() | st.text(max_size=4) | st.integers(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["cfg", "nodes", "edges", "a0.h0", "in_graph", "n_heads"]),
                      inner, max_size=4),
    max_leaves=9,
).map(json.dumps)))  # fmt: skip
def test_what_is_no_graph_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("g") / "graph.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(cl.InputError, match="is not a graph of EAP-IG or MIB"):
        heads_of_graph(path)


def test_older_graphs_and_missing_ones(tmp_path):
    path = tmp_path / "g.json"
    nodes = {"input": True, "a0.h1": True, "a1.h0": False, "m0": True, "logits": True}
    path.write_text(json.dumps({"cfg": {"n_layers": 2, "n_heads": 2}, "nodes": nodes}))
    assert list(cl.Circuit.load_graph(path)) == [cl.Head(0, 1)]
    with pytest.raises(cl.InputError, match="There is no file"):
        cl.Circuit.load_graph(tmp_path / "none.json")
    write_graph(path, [], n_layers=1, n_heads=1, d_model=2, parallel=False, scores=None)
    assert heads_of_graph(path) == ([], 1, 1)
