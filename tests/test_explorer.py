"""The explorer without a browser: what a click computes, messages, refusals, export."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALL, answers, loaded, prompts, task_margin

import circuitlens as cl
from circuitlens.baseline import MeanBaseline
from circuitlens.explorer.opening import explore
from circuitlens.explorer.probing import Probe, _DirectPath
from circuitlens.models.batch import margin
from circuitlens.scoring.scorers import Request, scorer
from circuitlens.tasks import toy
from circuitlens.utils.provenance import Provenance

pytest.importorskip("anywidget", reason="anywidget is not installed")

N = 25
HEADS = [cl.Head(0, 1), cl.Head(1, 0), cl.Head(1, 3)]


def baseline_of(model: cl.HookedModel, task: str = "toy/source") -> MeanBaseline:
    """Means by hand, so that no training is needed: nothing here depends on competence."""
    g = model.geometry
    generator = torch.Generator().manual_seed(3)
    dtype = torch.promote_types(model.dtype, torch.float32)
    mean = 0.2 * torch.randn(g.n_layers, g.n_heads, g.d_head, generator=generator, dtype=dtype)
    mlps = 0.2 * torch.randn(g.n_layers, g.d_model, generator=generator, dtype=dtype)
    data = cl.load_task("toy").fingerprint()
    origin = Provenance(model.name, model.fingerprint(), task, data, 0)
    return MeanBaseline(mean, mlps, "all", (), {"positive": 1}, 1.0, origin)


@pytest.fixture(scope="module")
def task() -> cl.Task:
    return cl.load_task("toy")


@pytest.fixture(scope="module")
def model() -> cl.HookedModel:
    model = toy.toy_model(n_layers=2, n_heads=4, d_model=32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            # Larger weights than at the start of training, so that heads matter.
            parameter.mul_(8 if parameter.ndim > 1 else 1)
        # The other way round the heads of this random model hurt, and f has no meaning.
        model.hf.model.norm.weight.neg_()
    return model


@pytest.fixture(scope="module")
def baseline(model) -> MeanBaseline:
    return baseline_of(model)


@pytest.fixture(scope="module")
def scores(model, baseline) -> cl.HeadScores:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20, 2, 4, generator=generator)
    ids = tuple(f"seen:{i}" for i in range(20))
    return cl.HeadScores(values, "cdt-linear", "all", ids, baseline.provenance)


@pytest.fixture(scope="module")
def probe(model, task, baseline) -> Probe:
    return Probe(model, task, baseline, n_examples=N)


@pytest.fixture
def explorer(model, task, baseline, scores, probe):
    made = explore(model, task, baseline, scores, scores.top(3), n_examples=N)
    # One sample serves all tests.
    made._probe = probe
    return made


def tell(explorer, **content):
    """Send a message as the browser does and return what is sent back."""
    sent = []
    explorer.send = lambda message, buffers=None: sent.append((message, buffers))
    explorer._handle_custom_msg({"id": "v:1", **content}, [])
    (answer,) = sent
    json.dumps(answer[0], allow_nan=False)
    return answer


# -- what a click computes -------------------------------------------------------------------------


def test_attention_is_that_of_hugging_face(probe, model):
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    for example in (0, 7):
        tokens = torch.tensor([probe.sample("source").encoded.tokens[example]])
        with torch.no_grad():
            expected = hf(tokens, output_attentions=True).attentions
        for head in HEADS:
            found = probe.attention("source", example, head)
            torch.testing.assert_close(found, expected[head.layer][0, head.index])
        assert "".join(probe.tokens("source", example)) == model.tokenizer.decode(tokens[0])


def test_direct_attribution_by_hand(probe, model, baseline):
    batch = probe.sample("source").encoded.batch([4])
    seen = {}
    with torch.no_grad():
        model.logits(batch, {"ln_final.hook_scale": lambda s: seen.__setitem__(0, s)})
        z = model.head_outputs(batch)[:, 0, -1]
        for head in HEADS:
            deviation = z[head.layer, head.index] - baseline.mean[head.layer, head.index]
            out = deviation @ model.geometry.output_weight(model.hf, head)
            normed = out / seen[0].flatten()[-1] * model.hf.model.norm.weight
            expected = model.hf.get_output_embeddings().weight @ normed
            found = probe.added_logits("source", 4, head)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            said = probe.attribution("source", 4, head, k=5)
            best = expected.argsort(descending=True)
            assert [v for _, v in said.promoted] == pytest.approx(expected[best[:5]].tolist(), 1e-3)
            worst = expected[best.flip(0)[:5]].tolist()
            assert [v for _, v in said.suppressed] == pytest.approx(worst, 1e-3)
            word = model.tokenizer.decode([int(best[0])])
            assert said.promoted[0][0] == word or "\ufffd" in word
            by_label = dict(zip(probe.task.labels, answers(expected, batch).tolist(), strict=True))
            assert said.labels == pytest.approx(by_label, rel=1e-3, abs=1e-6)


def test_tokens_are_shown_as_text(model):
    vocabulary = model.tokenizer.get_vocab()
    ids = [vocabulary[token] for token in ("ba", "Ġpositive", "â", "<s>", "Ġ")]
    assert model.tokens(ids) == ["ba", " positive", "<E2>", "<s>", " "]


@pytest.mark.parametrize("name", ALL)
def test_direct_attribution_is_the_scorers_in_every_family(name):
    model = loaded(name)
    suffix = 0 if model.family.causal else 1
    batch = prompts(7, n_suffix=suffix)
    baseline = baseline_of(model)
    expected = scorer("dla").batch(model, batch, baseline.means(), Request()).heads[0]
    path = _DirectPath(model, batch, baseline)
    for head in (cl.Head(0, 1), cl.Head(2, 3)):
        found = margin(answers(path.of(head)[None], batch), batch.gold)[0]
        torch.testing.assert_close(
            found.float(), expected[head.layer, head.index].float(), rtol=1e-3, atol=1e-5
        )


def by_hand(model, baseline, sample, ablated):
    """Margin and right answers of every example alone, by hooks written here."""
    margins, right = [], []
    for number in range(len(sample.examples)):
        batch = sample.encoded.batch([number])

        def at(layer):
            def hook(z):
                z = z.clone()
                for head in ablated:
                    if head.layer == layer:
                        # <s> keeps its own.
                        z[:, 1:, head.index] = baseline.mean[layer, head.index]
                return z

            return hook

        with torch.no_grad():
            hooks = {model.z_hook(layer): at(layer) for layer in range(2)}
            logits = model.logits(batch, hooks)
        margins.append(float(task_margin(logits, batch)))
        right.append(bool(answers(logits, batch)[0].argmax() == batch.gold[0]))
    return np.array(margins), np.mean(right)


@pytest.mark.parametrize("head", HEADS)
def test_the_effect_of_a_head_by_hand(probe, model, baseline, head):
    sample = probe.sample("source")
    clean, accuracy = by_hand(model, baseline, sample, ())
    ablated, left = by_hand(model, baseline, sample, [head])
    found = probe.effect("source", head)
    assert found.n == N
    assert (found.accuracy, found.ablated_accuracy) == pytest.approx((accuracy, left))
    assert (found.margin, found.ablated_margin) == pytest.approx(
        (clean.mean(), ablated.mean()), abs=1e-4
    )
    change = ablated - clean
    error = 1.96 * change.std() / N**0.5
    assert found.interval[0] <= change.mean() <= found.interval[1]
    assert np.ptp(found.interval) == pytest.approx(2 * error, rel=0.2)


def test_faithfulness_is_that_of_the_package(probe, model, task, baseline, scores):
    examples = probe.sample("source").examples
    curve = cl.faithfulness(
        model, task, scores, baseline, sizes=[2, 5], n_random=0, examples=examples, quiet=True
    )
    for size in (0, 2, 5, 8):
        found = probe.faithfulness("source", scores.top(size))
        at = curve.sizes.index(size)
        assert found.f == pytest.approx(curve.faithfulness[at], abs=1e-4)
        assert found.accuracy == curve.accuracy[at]
        interval = curve.interval()[:, at]
        if np.isnan(interval).any():
            assert found.interval is None
        else:
            assert found.interval == pytest.approx(tuple(interval), abs=1e-3)
    assert (found.full_accuracy, found.empty_accuracy) == (curve.accuracy[-1], curve.accuracy[0])


def test_where_the_heads_hurt_the_explorer_says_so(model, task, scores):
    worse = model.clone()
    with torch.no_grad():
        worse.hf.model.norm.weight.neg_()
    mean = baseline_of(worse)
    probe = Probe(worse, task, mean, n_examples=N)
    with pytest.raises(cl.InputError, match="The heads hurt on these examples"):
        probe.faithfulness("source", HEADS)
    mine = replace(scores, provenance=mean.provenance)
    examples = probe.sample("source").examples
    options = {"sizes": [3], "n_random": 1, "examples": examples, "quiet": True}
    curve = cl.faithfulness(worse, task, mine, mean, **options)
    explorer = explore(scores={"mine": mine}, curve=curve)
    assert explorer.facts["curve"] is None
    assert curve.caveat in explorer.facts["notes"]
    json.dumps(explorer.facts, allow_nan=False)


def test_a_sample_that_is_too_large_to_keep_gives_the_same(
    probe, model, task, baseline, monkeypatch
):
    monkeypatch.setattr("circuitlens.explorer.sampling._PREFIX_BYTES", 0)
    again = Probe(model, task, baseline, n_examples=N)
    assert again.faithfulness("source", HEADS) == probe.faithfulness("source", HEADS)
    assert not again.sample("source")._prefixes


def test_samples_hold_the_same_held_out_sentences_in_every_language(probe, task):
    source, near = probe.sample("source"), probe.sample("near")
    assert [e.id for e in source.examples] == [e.id for e in near.examples]
    assert all(example in task.held_out for example in source.examples)
    assert source.examples != near.examples
    assert set(probe.languages) == set(task.source.languages)
    assert source.n_held_out == len(task.held_out)


def test_what_was_seen_or_does_not_exist_is_refused(probe, model, task, baseline):
    seen = [e.id for e in task.held_out]
    with pytest.raises(cl.InputError, match="was used for discovery"):
        Probe(model, task, baseline, n_examples=3, seen=seen).sample("source")
    with pytest.raises(cl.InputError, match="no language 'elvish'"):
        probe.sample("elvish")
    with pytest.raises(cl.InputError, match="there is no number 99"):
        probe.attention("source", 99, HEADS[0])
    with pytest.raises(cl.InputError, match=r"no head a9\.h0"):
        probe.effect("source", cl.Head(9, 0))
    with pytest.raises(cl.InputError, match="computes only cdt-linear"):
        probe.scores("greedy")


def test_cheap_scores_are_those_of_relevance(model, task, baseline):
    ids = tuple(e.id for e in task["pool_a"][:12])
    baseline = replace(baseline, example_ids=ids)
    probe = Probe(model, task, baseline, n_examples=3, max_score_examples=8)
    found = probe.scores("attribution")
    expected = cl.relevance(model, task, baseline, method="attribution", max_examples=8, quiet=True)
    assert found.example_ids == expected.example_ids
    torch.testing.assert_close(found.per_example, expected.per_example)
    # Asked for by the browser, they are among the explorer's from then on.
    explorer = explore(model, task, baseline, n_examples=3)
    assert (explorer.method, explorer.grids) == ("cdt-linear", {})
    message, _ = tell(explorer, kind="scores", method="dla")
    assert message["ok"]
    assert explorer.grids["dla"]["n"] == 12
    assert explorer.scores["dla"].method == "dla"


# -- messages --------------------------------------------------------------------------------------


def test_questions_are_answered_with_their_id(explorer, probe):
    message, _ = tell(explorer, kind="sample", language="source")
    assert {k: message[k] for k in ("id", "kind", "ok", "n")} == {
        "id": "v:1",
        "kind": "sample",
        "ok": True,
        "n": N,
    }
    accuracy = np.mean([e["gold"] == e["predicted"] for e in message["examples"]])
    assert accuracy == probe.effect("source", HEADS[0]).accuracy
    assert message["examples"][2]["text"] == probe.sample("source").examples[2].text

    message, buffers = tell(explorer, kind="look", language="near", example=2, head="a1.h3")
    expected = probe.attention("near", 2, cl.Head(1, 3)).numpy()
    found = np.frombuffer(buffers[0], np.float32).reshape(expected.shape)
    assert (found == expected).all()
    assert len(message["tokens"]) == len(expected)
    assert message["decision"] == len(expected) - 1
    assert len(message["promoted"]) == len(message["suppressed"]) == 8

    message, _ = tell(explorer, kind="effect", language="source", head="a1.h3")
    assert message["ablated_margin"] == probe.effect("source", cl.Head(1, 3)).ablated_margin
    members = ["a0.h1", "a1.h0", "a1.h3"]
    message, _ = tell(explorer, kind="circuit", language="source", members=members)
    assert message["f"] == probe.faithfulness("source", HEADS).f


def test_errors_come_back_to_be_shown(explorer, monkeypatch):
    message, _ = tell(explorer, kind="effect", language="source", head="a7.h0")
    assert not message["ok"]
    assert "names head a7.h0" in message["error"]
    assert message["detail"] == ""
    message, _ = tell(explorer, kind="nonsense", language="source")
    assert "does not know the question 'nonsense'" in message["error"]

    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(explorer._probe, "effect", fail)
    message, _ = tell(explorer, kind="effect", language="source", head="a1.h0")
    assert message["error"] == "RuntimeError: the device is gone"
    assert "Traceback" in message["detail"]


def test_an_interrupt_is_answered_and_goes_on(explorer, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(explorer._probe, "effect", interrupt)
    sent = []
    explorer.send = lambda message, buffers=None: sent.append(message)
    with pytest.raises(KeyboardInterrupt):
        explorer._receive(explorer, {"kind": "effect", "language": "source", "head": "a1.h0"}, [])
    assert sent[0]["error"].startswith("KeyboardInterrupt")


def test_the_state_can_be_sent(explorer):
    state = {k: v for k, v in explorer.get_state().items() if k in explorer.traits()}
    json.dumps({k: state[k] for k in ("facts", "grids", "members", "method")}, allow_nan=False)
    mean = np.array(explorer.grids["cdt-linear"]["mean"])
    rank = np.array(explorer.grids["cdt-linear"]["rank"])
    assert sorted(rank.flatten()) == list(range(1, 9))
    assert rank.flatten()[mean.argmax()] == 1


# -- the circuit -----------------------------------------------------------------------------------


def test_choices_are_those_that_there_are(explorer):
    for name, value in (("method", "magic"), ("language", "mars")):
        before = getattr(explorer, name)
        with pytest.raises(cl.InputError, match=f"{name}='{value}' is unknown: choose one of"):
            setattr(explorer, name, value)
        assert getattr(explorer, name) == before
    explorer.language = "near"
    assert explorer.language == "near"


def test_an_edited_circuit_says_so(explorer, scores):
    assert explorer.circuit is not None
    assert explorer.circuit.selection == "cdt-linear: top 3"
    start = scores.top(3)
    away = str(start.heads[0])
    new = next(str(h) for h in scores.ranking() if h not in start)
    explorer.members = [*[str(h) for h in start.heads[1:]], new]
    found = explorer.circuit
    assert set(map(str, found)) == {new, *map(str, start.heads[1:])}
    assert found.selection == (
        f"by hand in the explorer, from (cdt-linear: top 3): + {new}, - {away}"
    )
    assert found.provenance == scores.provenance
    # Back by hand it is the circuit that it was.
    explorer.members = [str(h) for h in reversed(start.heads)]
    assert explorer.circuit.selection == "cdt-linear: top 3"
    with pytest.raises(cl.InputError, match="not a head name"):
        explorer.members = ["nonsense"]
    with pytest.raises(cl.InputError, match=r"names head a5\.h0"):
        explorer.members = ["a5.h0"]
    explorer.circuit = scores.top(5)
    assert len(explorer.members) == 5
    with pytest.raises(cl.InputError, match="of a 3 × 3 model"):
        explorer.circuit = cl.Circuit.of(["a0.h0"], 3, 3)


def test_saving_asks_before_it_overwrites(explorer, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    path = home / "circuit.json"
    members = ["a1.h2", "a0.h0"]
    message, _ = tell(explorer, kind="save", path=str(path), members=members)
    assert message["saved"] == str(path)
    saved = cl.Circuit.load(path)
    assert list(map(str, saved)) == ["a0.h0", "a1.h2"]
    assert saved.selection.startswith("by hand in the explorer")
    message, _ = tell(explorer, kind="save", path=str(path), members=[])
    assert message["exists"] == str(path)
    assert cl.Circuit.load(path) == saved
    tell(explorer, kind="save", path=str(path), members=[], overwrite=True)
    assert len(cl.Circuit.load(path)) == 0
    message, _ = tell(explorer, kind="save", path=str(home), members=[])
    assert "is a folder" in message["error"]
    message, _ = tell(explorer, kind="save", path=" ", members=[])
    assert "Give the name of the file" in message["error"]
    for elsewhere in ("../circuit.json", "/tmp/circuit.json", "circuit.py", "a/../../x.json"):
        message, _ = tell(explorer, kind="save", path=elsewhere, members=members)
        assert "writes .json files below" in message["error"], elsewhere
    assert not (tmp_path / "circuit.json").exists()


# -- saved results, refusals -----------------------------------------------------------------------


def test_saved_results_need_no_model(model, task, baseline, scores, probe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve = cl.faithfulness(
        model,
        task,
        scores,
        baseline,
        sizes=[3],
        n_random=2,
        examples=probe.sample("source").examples,
        quiet=True,
    )
    explorer = explore(scores={"mine": scores}, curve=curve, mode="dark")
    assert not explorer.facts["computes"]
    assert explorer.facts["curve"]["f"] == pytest.approx(curve.faithfulness.tolist())
    json.dumps(explorer.facts, allow_nan=False)
    message, _ = tell(explorer, kind="look", language="", example=0, head="a0.h0")
    assert "This needs the model" in message["error"]
    explorer.members = ["a1.h1"]
    assert explorer.circuit.selection == "by hand in the explorer, alongside the scores of mine"
    assert explorer.circuit.provenance == scores.provenance
    message, _ = tell(explorer, kind="save", path=str(tmp_path / "c.json"), members=["a1.h1"])
    assert cl.Circuit.load(tmp_path / "c.json") == explorer.circuit


def test_scores_of_other_weights_are_noted(model, task, baseline, scores):
    other = replace(scores, provenance=replace(scores.provenance, model_fingerprint="other"))
    explorer = explore(model, task, baseline, {"old": other})
    assert "'old' were taken from other weights" in explorer.facts["notes"][0]


def test_bad_combinations_are_refused(model, task, baseline, scores):
    for arguments, message in (
        ({}, "nothing to show"),
        ({"circuit": scores.top(2)}, "nothing to show"),
        ({"model": model, "scores": scores}, "but task and baseline are missing"),
        ({"model": model, "task": task}, "but baseline is missing"),
        ({"scores": [scores, scores]}, "Two of the scores are by 'cdt-linear'"),
        ({"scores": scores, "mode": "pink"}, "The mode is 'auto', 'light' or 'dark'"),
        (
            {"scores": scores, "circuit": cl.Circuit.of(["a0.h0"], 3, 3)},
            "The circuit is of a 3 × 3 model, but the scores are of 2 layers of 4 heads",
        ),
        (
            {"model": model, "task": task, "baseline": baseline, "n_examples": 0},
            "n_examples must be positive",
        ),
        (
            {"model": loaded("gpt2"), "task": task, "baseline": baseline},
            "taken from other weights",
        ),
    ):
        with pytest.raises(cl.InputError, match=message):
            explore(**arguments)


def test_without_anywidget_it_says_what_to_install(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "circuitlens.explorer.widget", raising=False)
    with pytest.raises(cl.InputError, match=r"pip install circuitlens\[notebooks\]"):
        explore(scores=scores)


def test_the_view_takes_no_html_and_loads_nothing():
    folder = Path(cl.__file__).parent / "explorer" / "static"
    script = "".join(path.read_text() for path in sorted(folder.glob("*.js")))
    assert "export default" in script
    for banned in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "import(",
        "fetch(",
    ):
        assert banned not in script
    text = script.replace("http://www.w3.org/2000/svg", "") + (folder / "explorer.css").read_text()
    for banned in ("http:", "https:", "url(", "@import", "import "):
        assert banned not in text


def test_the_explorer_draws_what_a_head_does(toy_proxy, toy_task, toy_baseline, toy_scores):
    scores = toy_scores
    explorer = explore(toy_proxy, toy_task, toy_baseline, scores, scores.top(2))
    head = scores.ranking()[0]
    explorer.selected = [str(head)]
    fig = explorer.head_card()
    assert str(head) in fig.layout.title.text
    roles = cl.head_roles(
        explorer._probe.model,
        explorer._probe.task,
        [head],
        explorer._probe.baseline,
        max_examples=explorer._probe.max_score_examples,
        quiet=True,
    )
    assert fig.data == cl.view.head_card(roles, head, explorer.circuit).data
    other = scores.ranking()[-1]
    assert str(other) in explorer.head_card(other).layout.title.text
    explorer.selected, explorer.members = [], []
    with pytest.raises(cl.InputError, match="No head is chosen"):
        explorer.head_card()
    assert explorer.margin_lens().data
