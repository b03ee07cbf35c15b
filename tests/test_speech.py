"""End to end: a speech model made and trained here, adapted with text, watched while it listens."""

from __future__ import annotations

import pytest
import torch

import circuitlens as cl
from figures.speech_world import (
    AUDIO,
    HOMOPHONES,
    speech_task,
    text_task,
    train_from_scratch,
    untrained,
)

pytestmark = pytest.mark.slow


def test_homophones_sound_alike_and_nothing_else_does():
    from figures.speech_world import FILLERS, PAIRS, tone

    for first, second in PAIRS:
        assert (tone(first) == tone(second)).all()
    others = [tone(word) for word in (*FILLERS, *(pair[0] for pair in PAIRS))]
    assert all((a != b).any() for i, a in enumerate(others) for b in others[:i])


def test_labels_are_balanced_and_domains_apart():
    source, target = speech_task("source"), speech_task("source").to("target")
    for task in (source, target):
        counts = [sum(e.label == word for e in task["test"]) for word in HOMOPHONES]
        assert len(set(counts)) == 1
    cues = [{e.fields["text"].split()[0] for e in task["test"]} for task in (source, target)]
    assert not cues[0] & cues[1]
    texts = [e.fields["text"] for e in text_task()["pool_a"]]
    assert not any(word in text.split() for text in texts for word in HOMOPHONES)


@pytest.fixture(scope="module")
def heard():
    return train_from_scratch(7, steps=1200)


def word_accuracy(model: cl.HookedModel, domain: str) -> float:
    return cl.evaluate(model, speech_task("source").to(domain), "test", quiet=True).accuracy


def test_a_speech_model_learns_to_hear_one_domain(heard):
    assert word_accuracy(untrained(7), "source") < 0.4
    assert word_accuracy(heard, "source") > 0.95
    # Homophones behind words of the other domain are a guess at best.
    assert word_accuracy(heard, "target") < 0.6


@pytest.mark.parametrize("strategy", ["circuit", "lora-norms", "full"])
def test_text_of_a_domain_and_a_monitor_on_speech(heard, strategy):
    source, speech = text_task(), speech_task()
    baseline = cl.label_balanced_mean(heard, source, quiet=True)
    scores = cl.relevance(heard, source, baseline, quiet=True)
    encoder = {n: p.clone() for n, p in heard.composite.rest(heard.hf)}
    result = cl.transfer(
        heard,
        scores.top(0.25),
        source.to("target"),
        strategy=strategy,
        scores=scores,
        monitor={"source speech": speech},
        keep_monitor=0.02,
        learning_rates=[1e-3, 3e-3],
        epochs=8,
        quiet=True,
    )
    before, after = result.monitored["source speech"]
    assert after >= before - 0.02
    assert result.target_after.accuracy > result.target_before.accuracy + 0.2
    # On test something more may be lost than on the sentences that chose.
    assert word_accuracy(result.model, "source") > 0.9
    if strategy == "full":
        assert word_accuracy(result.model, "target") > word_accuracy(heard, "target") + 0.1
    adapted = dict(result.model.composite.rest(result.model.hf))
    assert all(torch.equal(encoder[name], adapted[name]) for name in encoder)


def test_the_composite_writes_what_was_said(heard):
    """By ``generate`` of the whole model, from sound alone, without circuitlens in between."""
    speech = speech_task()
    processor = heard.composite.processor
    hits = 0
    examples = speech["test"][:30]
    for example in examples:
        text = f"{AUDIO} {example.fields['text']}"
        inputs = processor(
            text=[text],
            audio=[example.fields["audio"].samples],
            sampling_rate=16_000,
            return_tensors="pt",
        )
        written = heard.whole.generate(**inputs, max_new_tokens=1, do_sample=False)
        hits += processor.tokenizer.decode(written[0, -1]).strip() == example.label
    assert hits / len(examples) > 0.9
    assert hits / len(examples) == pytest.approx(
        cl.evaluate(heard, speech, examples, quiet=True).accuracy
    )
