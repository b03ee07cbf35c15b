from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import circuitlens as cl
from circuitlens.models.readouts import TokenReadout
from circuitlens.tasks.encoding import encode

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
THINGS = ["soup", "tea", "cake", "bread", "fish", "rice", "juice", "bean", "corn", "bun", "pie"]
WORDS = [*THINGS, "the", "is", "hot", "cold", "very", "good", "bad", "x", ":", "mood", "##s"]


def word_pieces(**options: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    names |= options
    marks = {f"{key}_token": token for key, token in names.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


@pytest.fixture(scope="module")
def task() -> cl.Task:
    records = [
        {"text": f"the {thing}{plural} is {very}{word}", "label": label}
        for thing in THINGS
        for plural in ("", "s")
        for very in ("", "very ")
        for word, label in (("hot", "good"), ("cold", "bad"))
    ]
    return cl.Task.from_records(records, template="{text} mood:")


@pytest.fixture
def model() -> cl.HookedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Large enough that a few steps teach it something.
        initializer_range=0.5,
    )
    return cl.load(BertForMaskedLM(config), word_pieces())


def test_the_answer_belongs_in_the_place_of_the_mask(task, model):
    encoded = task.encode(model, task["test"])
    for example, row in zip(task["test"], encoded.tokens, strict=True):
        pieces = " ".join(model.tokenizer.convert_ids_to_tokens(list(row)))
        assert pieces.replace(" ##", "") == f"[CLS] {example.fields['text']} mood : [MASK] [SEP]"
    assert (encoded.n_prefix, encoded.n_suffix) == (1, 1)
    assert model.tokenizer.convert_ids_to_tokens(list(encoded.readout.tokens)) == ["bad", "good"]
    batch = encoded.batch([0, 1, 2, 3])
    assert (batch.input_ids[batch.mask("decision")] == model.tokenizer.mask_token_id).all()
    # Sources are neither [CLS] nor [SEP].
    assert not batch.mask("all")[:, -1].any()
    assert batch.mask("all").sum() == batch.attention_mask.sum() - 2 * len(batch)


def test_a_causal_model_gets_no_mask(task):
    causal = cl.load(tiny("qwen2"), word_pieces())
    encoded = task.encode(causal, task["test"])
    assert encoded.n_suffix == 0
    assert all(row[-1] == 5 + WORDS.index(":") for row in encoded.tokens)


def test_the_mask_and_what_follows_it_count_against_the_context(task):
    options = {"prompt": task.prompt, "readout": TokenReadout(masked=True)}
    # [CLS] mood : [MASK] [SEP] and one token for "x"; two to spare.
    for context, texts in ((10, 2), (9, 1)):
        encoded = encode(task["test"], word_pieces(), context=context, **options)
        assert {len(row) for row in encoded.tokens} == {5 + texts}
        assert all(row[-2:] == (4, 3) for row in encoded.tokens)
    with pytest.raises(cl.InputError, match="takes 6 tokens of the model's context of 8"):
        encode(task["test"], word_pieces(), context=8, **options)


def test_roberta_s_reserved_positions_are_no_context(task):
    model = cl.load(tiny("roberta"), word_pieces())
    model.hf.config.max_position_embeddings = 11
    encoded = task.encode(model, task["test"])
    assert {len(row) for row in encoded.tokens} == {6}


def test_a_tokenizer_without_mask_is_refused(task, model):
    without = cl.load(model.hf, word_pieces(mask=""))
    with pytest.raises(cl.InputError, match="no mask token"):
        task.encode(without, task["test"])


def test_the_first_piece_of_a_word_stands_for_it(task, model):
    pieces = replace(task, labels={"good": " moods", "bad": " bad"})
    readout = pieces.encode(model, task["test"]).readout
    assert model.tokenizer.convert_ids_to_tokens(list(readout.tokens)) == ["mood", "bad"]


def test_encoders_load_with_their_head_whatever_they_were_saved_with(tmp_path, task, model):
    model.hf.config.architectures = ["BertForPreTraining"]
    model.save(tmp_path)
    again = cl.load(tmp_path)
    assert type(again.hf).__name__ == "BertForMaskedLM"
    assert not again.family.causal
    before, after = (cl.evaluate(m, task, task["test"], quiet=True) for m in (model, again))
    assert after == before


def test_a_masked_model_learns_a_task_and_another(task, model):
    proxy = cl.finetune(model, task, learning_rate=1e-2, epochs=12, batch_size=8, quiet=True)
    assert cl.evaluate(proxy, task, task["test"], quiet=True).accuracy > 0.75
    baseline = cl.label_balanced_mean(proxy, task, allow_chance=True, quiet=True)
    assert torch.isfinite(baseline.mean).all()
    other = replace(task, labels={"bad": " cold", "good": " hot"})
    result = cl.transfer(
        proxy,
        cl.Circuit(tuple(proxy.geometry), n_layers=2, n_heads=4),
        other,
        learning_rates=[1e-2],
        epochs=3,
        batch_size=8,
        quiet=True,
    )
    # To answer with other words takes longer than this, but the way is the right one.
    assert result.target_after.margin > result.target_before.margin + 1
