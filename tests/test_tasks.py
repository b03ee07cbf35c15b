from __future__ import annotations

import csv
import inspect
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import token_of_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import circuitlens as cl
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import SequenceReadout, TokenReadout
from circuitlens.tasks import Encoded, Example, Pools, Task
from circuitlens.tasks.encoding import _report_truncation, encode
from circuitlens.tasks.examples import split_pools
from circuitlens.tasks.files import name_of_files
from circuitlens.tasks.toy import toy_model, toy_tokenizer

POOLS = ("pool_a", "pool_b", "validation", "test")
TEMPLATE = "{text} ->"
WORDS = {"negative": " negative", "positive": " positive"}
LABELS = tuple(WORDS)

quick = settings(max_examples=60, deadline=None)


@cache
def tokenizer():
    return toy_tokenizer()


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def example(
    name: str, text: str | None = None, label: str = "negative", group: str = ""
) -> Example:
    return Example(name, {"text": f"text {name}" if text is None else text}, label, group)


def numbered(prefix: str, count: int) -> list[Example]:
    return [example(f"{prefix}{n}", label=LABELS[n % 2]) for n in range(count)]


def small_pools() -> dict[str, tuple[Example, ...]]:
    return {pool: tuple(numbered(pool, 2)) for pool in POOLS}


def small_task(**changes) -> Task:
    options = {"template": TEMPLATE, "labels": WORDS, "pools": Pools(**small_pools()), **changes}
    return Task(name="small", language="one", **options)


def everything(pools: Pools) -> list[Example]:
    return [e for pool in POOLS for e in getattr(pools, pool)]


def content(task: Task) -> dict[str, tuple[dict[str, str], str]]:
    return {e.id: (dict(e.fields), e.label) for e in everything(task.pools)}


def places(pools: Pools) -> dict[str, set[str]]:
    """The pools in which every group stands."""
    found: dict[str, set[str]] = defaultdict(set)
    for pool in POOLS:
        for e in getattr(pools, pool):
            found[e.group].add(pool)
    return found


def records(count: int = 120) -> list[dict[str, str]]:
    return [
        {"id": f"{n:03d}", "text": f"bada, {n}", "label": ("bad", "good")[n % 2]}
        for n in range(count)
    ]


def as_content(rows: Iterable[Mapping[str, str]]) -> dict[str, tuple[dict[str, str], str]]:
    return {row["id"]: ({"text": row["text"]}, row["label"]) for row in rows}


@dataclass(frozen=True)
class Corpus:
    """A source that holds whatever a test gives it."""

    rows: Mapping[str, Mapping[str, Sequence[Example]]]

    @property
    def languages(self) -> Sequence[str]:
        return tuple(self.rows)

    def resolve(self, language: str) -> str:
        return language

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        return self.rows[language]


# -- pools ---------------------------------------------------------------------------------

parallel_rows = st.lists(
    st.tuples(
        st.text(max_size=6),  # id
        st.sampled_from("pqrstuvw"),  # group
        st.sampled_from(["both", "first", "second"]),  # the languages that have the row
    ),
    unique_by=lambda row: row[0],
    max_size=60,
)


@quick
@given(
    rows=parallel_rows,
    grouped=st.booleans(),
    own_splits=st.booleans(),
    seed=st.integers(0, 10_000),
    share=st.floats(0.05, 0.95),
)
def test_a_group_stands_in_one_pool_whatever_the_language_and_the_rows_missing(
    rows, grouped, own_splits, seed, share
):
    def pools(language: str) -> Pools:
        splits: dict[str, list[Example]] = {"train": []}
        if own_splits:
            splits |= {"validation": [], "test": []}
        for number, (name, group, where) in enumerate(rows):
            if where in ("both", language):
                group = group if grouped else name
                split = "train"
                if own_splits:
                    split = {"p": "test", "q": "validation"}.get(group[:1], "train")
                # Texts differ, or repetitions of a held-out text would be dropped.
                text = f"{language} {number}"
                splits[split].append(example(name, text, group=group))
        found = split_pools(splits, seed=seed, share_a=share)
        # Nothing is lost and nothing is made up.
        assert sorted(e.id for e in everything(found)) == sorted(
            e.id for e in chain(*splits.values())
        )
        return found

    first, second = places(pools("first")), places(pools("second"))
    for group in first.keys() | second.keys():
        assert len(first.get(group, set()) | second.get(group, set())) == 1


ANCHORS = {
    "train": numbered("anchor-train-", 40),
    "validation": numbered("anchor-validation-", 4),
    "test": numbered("anchor-test-", 4),
}
split_or_absent = st.sampled_from([None, "train", "validation", "test"])


@quick
@given(st.lists(st.tuples(split_or_absent, split_or_absent, st.integers(1, 3)), max_size=12))
def test_to_leaves_out_what_stands_on_the_other_side_and_nothing_else(groups):
    # Oracle: a group is dropped exactly if the languages have it in different splits.
    corpus: dict[str, dict[str, list[Example]]] = {
        language: {split: list(rows) for split, rows in ANCHORS.items()}
        for language in ("first", "second")
    }
    for number, (*splits, size) in enumerate(groups):
        for language, split in zip(corpus, splits, strict=True):
            if split:
                corpus[language][split] += [
                    example(f"{number}-{n}", group=f"group {number}") for n in range(size)
                ]
    first = Task.from_source(
        Corpus(corpus), "first", name="parallel", template=TEMPLATE, labels=WORDS
    )
    second = first.to("second")
    assert second.origin is first
    assert second.language == "second"
    here, there = places(first.pools), places(second.pools)
    for number, (one, two, _) in enumerate(groups):
        group = f"group {number}"
        crossing = one and two and one != two
        assert (group in there) == bool(two and not crossing)
        if group in here and group in there:
            training = here[group] & {"pool_a", "pool_b"}
            assert there[group] == training or not training
    assert {e.id for e in chain(*ANCHORS.values())} <= content(second).keys()


def test_leaving_out_is_logged_with_its_number(caplog):
    corpus = {
        "first": {**ANCHORS, "train": [*ANCHORS["train"], *numbered("moved", 3)]},
        "second": {**ANCHORS, "test": [*ANCHORS["test"], *numbered("moved", 3)]},
    }
    task = Task.from_source(Corpus(corpus), "first", name="n", template=TEMPLATE, labels=WORDS)
    caplog.clear()
    assert not [name for name in content(task.to("second")) if name.startswith("moved")]
    assert "3 examples were left out" in caplog.text


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_pool_a_gets_about_its_share(share):
    count = 3000
    given_splits = {"train": numbered("t", count), "validation": [], "test": []}
    pools = split_pools(given_splits, seed=3, share_a=share)
    deviation = math.sqrt(count * share * (1 - share))
    assert abs(len(pools.pool_a) - share * count) < 4 * deviation
    assert len(pools.pool_a) + len(pools.pool_b) == count


def test_missing_splits_are_made_of_the_training_examples():
    pools = split_pools({"train": numbered("t", 3000)}, seed=0)
    assert 0.17 < len(pools.test) / 3000 < 0.23
    assert 0.06 < len(pools.validation) / 3000 < 0.12
    again = split_pools({"train": numbered("t", 3000)}, seed=1)
    assert {e.id for e in pools.test} != {e.id for e in again.test}


def test_a_split_that_is_there_is_kept_as_it_is():
    test = numbered("e", 7)
    pools = split_pools({"train": numbered("t", 200), "test": test}, seed=0)
    assert pools.test == tuple(test)
    assert pools.validation
    assert {e.id for e in pools.validation} <= {f"t{n}" for n in range(200)}


def test_the_seed_changes_the_pools_and_order_does_not():
    rows = numbered("t", 200)
    one, other = (split_pools({"train": rows}, seed=s) for s in (0, 1))
    backwards = split_pools({"train": rows[::-1]}, seed=0)
    assert {e.id for e in one.pool_a} != {e.id for e in other.pool_a}
    assert {e.id for e in one.pool_a} == {e.id for e in backwards.pool_a}


@pytest.mark.parametrize("where", ["train", "test"])
def test_an_id_that_occurs_twice_is_an_error(where):
    splits = {"train": numbered("t", 5), "test": numbered("e", 5)}
    splits[where].append(example("t3", "another text"))
    with pytest.raises(cl.InputError, match=rf"'t3' occurs twice \(again in {where}\)"):
        split_pools(splits, seed=0)


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5, float("nan")])
def test_a_share_outside_zero_and_one_is_an_error(share):
    with pytest.raises(cl.InputError, match="share_a must lie between 0 and 1"):
        split_pools({"train": numbered("t", 5)}, seed=0, share_a=float(share))


spellings = st.sampled_from(["{}", " {} ", "{}\n", "\t{}"])
texts = st.tuples(
    st.sampled_from(["train", "validation", "test"]),
    st.lists(st.sampled_from(["Ba", "ba", "DU", "du"]), min_size=1, max_size=2),
    st.sampled_from([" ", "  ", "\t"]),
    spellings,
)


@quick
@given(st.lists(texts, max_size=30))
def test_rows_whose_text_is_held_out_from_them_are_dropped_and_no_others(rows):
    def plain(words: list[str]) -> str:
        return " ".join(words).lower()

    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for n, (split, words, blank, spelling) in enumerate(rows):
        splits[split].append(example(str(n), spelling.format(blank.join(words))))
    pools = split_pools(splits, seed=0)
    held_out = {plain(words) for split, words, *_ in rows if split != "train"}
    expected = {
        str(n)
        for n, (split, words, *_) in enumerate(rows)
        if split == "train" and plain(words) not in held_out
    }
    # Within the training pools a text stays on one side, with all its copies in pool A.
    sides = [{plain(e.text.split()) for e in pool} for pool in (pools.pool_a, pools.pool_b)]
    assert not sides[0] & sides[1]
    kept = {e.id for e in (*pools.pool_a, *pools.pool_b)}
    assert kept <= expected
    assert {plain(rows[int(n)][1]) for n in expected} == sides[0] | sides[1]
    assert pools.test == tuple(splits["test"])
    tested = {plain(e.text.split()) for e in splits["test"]}
    unseen = [e for e in splits["validation"] if plain(e.text.split()) not in tested]
    assert pools.validation == tuple(unseen)


def test_one_field_of_two_in_common_with_the_test_split_is_no_repetition():
    def pair(name: str, premise: str, hypothesis: str) -> Example:
        return Example(name, {"premise": premise, "hypothesis": hypothesis}, "negative")

    splits = {
        "train": [pair("1", "a", "b"), pair("2", "a", "c"), pair("3", "b", "a")],
        "validation": [],
        "test": [pair("4", "a", "b")],
    }
    pools = split_pools(splits, seed=0)
    assert {e.id for e in (*pools.pool_a, *pools.pool_b)} == {"2", "3"}


# -- encoding ------------------------------------------------------------------------------

sentences = st.lists(st.sampled_from(["bada", "bidi", "gu", "zevo"]), min_size=1, max_size=40).map(
    " ".join
)


def encode_texts(*texts: str, limit: int = 96, context: int | None = None) -> Encoded:
    examples = [example(str(n), text, LABELS[n % 2]) for n, text in enumerate(texts)]
    return encode(
        examples,
        tokenizer(),
        Prompt(TEMPLATE, WORDS, limit),
        readout=TokenReadout(),
        context=context,
    )


@quick
@given(st.lists(sentences, min_size=1, max_size=6))
def test_batches_are_padded_on_the_left_and_positions_count_from_the_first_token(texts):
    encoded = encode_texts(*texts)
    batch = encoded.batch(range(len(texts)))
    for row, text in enumerate(texts):
        prompt = [tokenizer().bos_token_id, *ids_of(f"{text} ->")]
        padding = batch.input_ids.shape[1] - len(prompt)
        assert batch.input_ids[row].tolist() == [tokenizer().pad_token_id] * padding + prompt
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(prompt)
        assert batch.position_ids[row, padding:].tolist() == list(range(len(prompt)))
    assert (batch.attention_mask[:, -1] == 1).all()
    assert (batch.attention_mask.sum(1) == batch.input_ids.shape[1]).any()


def test_decision_and_text_positions_of_a_batch():
    batch = encode_texts("bada", "bada bidi gu").batch([0, 1])
    assert batch.mask("decision").nonzero().tolist() == [[0, 6], [1, 6]]
    # All prompt tokens but <s> and padding.
    expected = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool()
    assert torch.equal(batch.mask("all"), expected)


@quick
@given(texts=st.lists(sentences, min_size=1, max_size=5), limit=st.integers(1, 30))
def test_truncation_keeps_the_beginning_of_the_text_and_the_whole_prompt(texts, limit):
    # The words are made of syllables that are one token each.
    arrow = ids_of(" ->")
    encoded = encode_texts(*texts, limit=limit)
    for row, text in zip(encoded.tokens, texts, strict=True):
        assert list(row) == [tokenizer().bos_token_id, *ids_of(text)[:limit], *arrow]
    assert encoded.n_truncated == sum(len(ids_of(text)) > limit for text in texts)


@quick
@given(
    text=st.text(min_size=1, max_size=40).filter(lambda t: t.strip() and "<" not in t),
    limit=st.integers(1, 30),
)
def test_truncation_of_any_text_respects_the_limit_and_ends_with_the_prompt(text, limit):
    encoded = encode_texts(text, limit=limit)
    (row,) = encoded.tokens
    assert row[-1:] == tuple(ids_of(" ->"))
    assert len(row) <= 1 + limit + 1
    if encoded.n_truncated == 0:
        assert list(row[1:]) == ids_of(f"{text} ->")


@pytest.mark.parametrize("context", [6, 11, 20, 64])
def test_the_context_of_the_model_lowers_the_limit(context):
    text = " ".join(["bada"] * 50)
    encoded = encode_texts("gu", text, context=context)
    assert encoded.tokens[0] == (tokenizer().bos_token_id, *ids_of("gu ->"))
    assert context - 3 <= len(encoded.tokens[1]) <= context
    assert encoded.tokens[1][-1:] == tuple(ids_of(" ->"))
    assert encoded.n_truncated == 1


def test_a_template_longer_than_the_context_is_an_error():
    with pytest.raises(cl.InputError, match=r"takes 3 tokens, but the model's context has 3"):
        encode_texts("bada", context=3)


def test_a_task_encodes_within_the_context_of_the_model():
    pools = small_pools()
    pools["test"] = (example("long", " ".join(["bada"] * 80)), *pools["test"][1:])
    task = small_task(pools=Pools(**pools), max_text_tokens=150)
    encoded = task.encode(toy_model(), task["test"])
    assert encoded.ids == ("long", "test1")
    assert 60 <= len(encoded.tokens[0]) <= 64
    assert encoded.tokens[0][-1:] == tuple(ids_of(" ->"))


@quick
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(2, 40), st.sampled_from(["ba da", "da ba"])
)
def test_of_two_fields_the_longest_is_cut_first(premise, hypothesis, limit, syllables):
    one, two = syllables.split()
    fields = {"premise": one * premise, "hypothesis": two * hypothesis}
    encoded = encode(
        [Example("1", fields, "negative")],
        tokenizer(),
        Prompt("{premise} {hypothesis} ->", WORDS, limit),
        readout=TokenReadout(),
    )
    pieces = tokenizer().convert_ids_to_tokens(list(encoded.tokens[0][1:-1]))
    left = Counter(piece.removeprefix("Ġ") for piece in pieces)
    before, after = (premise, hypothesis), (left[one], left[two])
    assert encoded.n_truncated == (sum(before) > limit)
    assert sum(after) == min(limit, sum(before))
    for was, remains in zip(before, after, strict=True):
        assert remains == was or remains >= max(after) - 1
    assert encoded.tokens[0][-1:] == tuple(ids_of(" ->"))


def test_gold_labels_and_tokens_follow_the_order_of_the_labels():
    words = {"positive": " positive", "neutral": " neutral", "negative": " negative"}
    rows = [example(str(n), "bada", label) for n, label in enumerate(["negative", "positive"])]
    encoded = encode(rows, tokenizer(), Prompt(TEMPLATE, words), readout=TokenReadout())
    assert encoded.gold == (2, 0)
    assert tokenizer().convert_ids_to_tokens(list(encoded.readout.tokens)) == [
        "Ġpositive",
        "Ġneutral",
        "Ġnegative",
    ]
    assert encoded.n_prefix == 1


@quick
@given(st.lists(sentences, max_size=9), st.integers(1, 4))
def test_batches_hold_every_example_once_and_agree_with_it(texts, size):
    encoded = encode_texts(*texts)
    batches = list(encoded.batches(size))
    assert len(batches) == encoded.n_batches(size) == math.ceil(len(texts) / size)
    assert sorted(chain(*(index.tolist() for index, _ in batches))) == list(range(len(texts)))
    widths = []
    for index, batch in batches:
        assert len(batch) == len(index) <= size
        for row, i in enumerate(index.tolist()):
            prompt = batch.input_ids[row][batch.attention_mask[row].bool()]
            assert tuple(prompt.tolist()) == encoded.tokens[i]
            assert batch.gold[row] == encoded.gold[i]
        widths.append(batch.input_ids.shape[1])
    assert widths == sorted(widths)


@pytest.mark.parametrize("size", [0, -1, True, 2.5, float("nan"), "2", None])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(size):
    encoded = encode_texts("bada", "gu")
    message = rf"batch_size must be a whole number of at least 1, but is {size!r}\."
    for ask in (Encoded.n_batches, Encoded.batches):
        with pytest.raises(cl.InputError, match=message):
            list([inspect.unwrap(ask)(encoded, size)][0])


def test_a_batch_size_may_come_from_numpy():
    encoded = encode_texts("bada", "gu", "zevo")
    size = np.int64(2)
    assert inspect.unwrap(Encoded.n_batches)(encoded, size) == 2
    assert [len(index) for index, _ in inspect.unwrap(Encoded.batches)(encoded, size)] == [2, 1]


def test_no_result_is_made_of_memory_that_no_batch_has_filled():
    task = small_task()
    with pytest.raises(cl.InputError, match="batch_size must be a whole number"):
        cl.evaluate(toy_model(n_layers=1), task, task["test"], batch_size=-1)


def cut_texts(caplog, n_long: int, n: int, **options: int) -> tuple[str, str]:
    """Encode ``n`` texts, of which some are too long; return the level and text of the one line."""
    # A line is logged once in a process.
    _report_truncation.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="circuitlens"):
        encoded = encode_texts(*["bada " * 9] * n_long, *["bada"] * (n - n_long), **options)
    assert encoded.n_truncated == n_long
    (record,) = caplog.records
    return record.levelname, record.getMessage()


def test_a_warning_says_once_how_many_texts_were_cut_and_what_to_raise(caplog):
    level, said = cut_texts(caplog, 42, 42, limit=6)
    assert level == "WARNING"
    assert "42 of 42 texts were cut to 6 tokens" in said
    assert "raise max_text_tokens above 6" in said


@pytest.mark.parametrize(("n_long", "level"), [(2, "INFO"), (5, "INFO"), (6, "WARNING")])
def test_a_few_cut_texts_are_no_warning(n_long, level, caplog):
    found, said = cut_texts(caplog, n_long, 100, limit=6)
    assert found == level
    assert f"{n_long} of 100 texts" in said


def test_raising_max_text_tokens_is_not_advised_where_the_context_is_full(caplog):
    _, said = cut_texts(caplog, 3, 3, context=12)
    assert "the model's context has no room for more, whatever max_text_tokens is" in said
    assert "raise" not in said


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token a word, no <s> and no padding token."""
    vocabulary = {word: n for n, word in enumerate(("<unk>", *words))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


def test_without_a_beginning_token_the_prompt_has_no_prefix():
    words = word_tokenizer("x", "hot", "->", "yes", "no")
    rows = [example("1", "hot hot", "a"), example("2", "hot", "b")]
    prompt = Prompt(TEMPLATE, {"a": " yes", "b": " no"}, 9)
    encoded = encode(rows, words, prompt, readout=TokenReadout())
    assert encoded.n_prefix == 0
    assert encoded.tokens == ((2, 2, 3), (2, 3))
    assert encoded.readout.tokens == (4, 5)
    batch = encoded.batch([0, 1])
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    # The first token is the attention sink all the same.
    assert batch.mask("all").tolist() == [[False, True, True], [False, False, True]]
    assert batch.mask("all+first").equal(batch.attention_mask.bool())


def readout_of_labels(words, template=TEMPLATE, kind="auto"):
    return TokenReadout().for_labels(Prompt(template, words).bare(tokenizer()), words, kind)


def test_the_first_token_that_differs_stands_for_a_label(caplog):
    found = token_of_labels(tokenizer(), TEMPLATE, {"good": " positive", "awful": " badi"})
    assert found == {"good": ids_of(" positive")[0], "awful": ids_of(" ba")[0]}
    # A beginning that all share moves into the prompt.
    words = {"good": " baga", "awful": " badi"}
    with caplog.at_level("INFO", logger="circuitlens"):
        shared = readout_of_labels(words)
    assert shared.shared == (ids_of(" ba")[0],)
    assert shared.tokens == (ids_of("ga")[0], ids_of("di")[0])
    assert "good: 'ga' of ' baga'" in caplog.text
    rows = [example("1", "bada", "good")]
    encoded = encode(rows, tokenizer(), Prompt(TEMPLATE, words), readout=TokenReadout())
    assert encoded.tokens[0][-2:] == (*ids_of(" ->"), ids_of(" ba")[0])


def test_words_that_first_tokens_do_not_tell_apart_are_scored_whole():
    for words in (
        {"a": " badi", "b": " baga", "c": " ga"},
        {"a": [" ba", " da"], "b": " ga"},
    ):
        found = readout_of_labels(words)
        assert isinstance(found, SequenceReadout)
        assert found.n_labels == len(words)
        with pytest.raises(cl.InputError, match=r"needs one word.*readout='sequence'"):
            readout_of_labels(words, kind="token")
    # The probability of a word is never above that of its beginning.
    words = {"a": " badi", "b": " ba", "c": " ga"}
    with pytest.raises(cl.InputError, match="' ba' of the label 'b' is the beginning of ' badi'"):
        readout_of_labels(words)
    assert readout_of_labels(words, kind="sequence-mean").mean
    with pytest.raises(cl.InputError, match="reads a classification head"):
        readout_of_labels({"a": " ba", "b": " ga"}, kind="classifier")


def test_a_label_word_is_tried_as_it_follows_the_prompt():
    # Behind a blank in the prompt, "ba" makes no token of its own: " ba" is the token.
    assert ids_of("ba") != ids_of(" ba")
    found = token_of_labels(tokenizer(), "{text} ->", {"bad": " ba", "good": " da"})
    assert found == {"bad": ids_of(" ba")[0], "good": ids_of(" da")[0]}
    with pytest.raises(cl.InputError, match=r"prompt ends in a space.*such as ' ba'"):
        token_of_labels(tokenizer(), "{text} -> ", {"bad": "ba", "good": "da"})


def test_two_labels_with_one_token_are_an_error_that_names_both():
    words = {"bad": " negative", "fine": " neutral", "awful": " negative"}
    with pytest.raises(cl.InputError, match=r"'bad' and 'awful' have the same tokens"):
        token_of_labels(tokenizer(), TEMPLATE, words)


def test_a_label_word_that_the_tokenizer_does_not_know_is_an_error():
    words = word_tokenizer("x", "->", "yes")
    with pytest.raises(cl.InputError, match=r"' nope' of the label 'b' is unknown"):
        token_of_labels(words, TEMPLATE, {"a": " yes", "b": " nope"})


# -- tasks ---------------------------------------------------------------------------------


def with_first(pool: str, first: Example) -> Pools:
    pools = small_pools()
    return Pools(**{**pools, pool: (first, *pools[pool])})


@pytest.mark.parametrize("pool", POOLS)
def test_errors_of_an_example_name_the_example_and_its_pool(pool):
    cases = [
        (Example("odd", {"body": "x"}, "negative"), r"has no field 'text'.*\['body'\]"),
        (example("odd", ""), "has an empty text"),
        (example("odd", " \n\t"), "has an empty text"),
        (example("odd", label="mixed"), r"'mixed', which is not one of \['negative', 'positive'\]"),
    ]
    for first, message in cases:
        with pytest.raises(cl.InputError, match=rf"Example odd \(small/one, {pool}\).*{message}"):
            small_task(pools=with_first(pool, first))


@pytest.mark.parametrize("pool", POOLS)
def test_a_class_without_example_in_a_pool_is_an_error(pool):
    pools = small_pools()
    pools[pool] = pools[pool][:1]
    message = rf"No example has the label 'positive' in {pool} of small/one \(1 examples\)"
    with pytest.raises(cl.InputError, match=message):
        small_task(pools=Pools(**pools))


def test_a_template_without_field_and_a_single_label_are_errors():
    with pytest.raises(cl.InputError, match="'Is it good\\?' has no field in braces"):
        small_task(template="Is it good?")
    with pytest.raises(cl.InputError, match=r"at least two labels, but has \['negative'\]"):
        small_task(labels={"negative": " negative"})


def test_doubled_braces_in_a_template_are_no_field():
    with pytest.raises(cl.InputError, match="no field in braces"):
        small_task(template="{{text}} ->")
    task = small_task(template="{{{text}}} ->")
    encoded = task.encode(toy_model(), task["test"])
    assert encoded.tokens[0][1:] == tuple(ids_of("{text test0} ->"))


def test_pools_by_name_held_out_examples_and_the_table_agree():
    task = small_task()
    assert task["pool_b"] == task.pools.pool_b
    assert task.held_out == (*task.pools.pool_b, *task.pools.validation)
    frame = task.to_frame()
    assert list(frame["id"]) == [e.id for e in everything(task.pools)]
    assert list(frame["pool"]) == [pool for pool in POOLS for _ in range(2)]
    assert list(frame["text"]) == [e.fields["text"] for e in everything(task.pools)]


def test_the_fingerprint_changes_with_everything_that_counts():
    task = small_task()
    pools = small_pools()
    swapped = {**pools, "pool_a": pools["pool_b"], "pool_b": pools["pool_a"]}
    first, second = pools["test"]
    others = [
        small_task(template="{text} =>"),
        small_task(labels={"negative": " bad", "positive": " positive"}),
        small_task(labels=dict(reversed(WORDS.items()))),
        small_task(max_text_tokens=95),
        small_task(pools=Pools(**swapped)),
        small_task(pools=Pools(**{**pools, "test": (replace(first, id="z"), second)})),
        small_task(
            pools=Pools(**{**pools, "test": (replace(first, fields={"text": "z"}), second)})
        ),
        small_task(pools=Pools(**{**pools, "test": (second, first)})),
    ]
    assert small_task().fingerprint() == task.fingerprint()
    assert len({task.fingerprint(), *(o.fingerprint() for o in others)}) == 1 + len(others)


def test_a_task_without_source_knows_no_other_language():
    with pytest.raises(cl.InputError, match="small has no language other than one"):
        small_task().to("two")


def test_a_task_and_what_it_is_made_of_have_short_names():
    task = Task.from_records(records(), name="reviews", language="one")
    sizes = ", ".join(f"{pool}={len(task[pool])}" for pool in POOLS)
    assert repr(task) == (f"Task(name='reviews', language='one', labels=['bad', 'good'], {sizes})")
    assert repr(task.pools) == f"Pools({sizes})"
    assert len(repr(task.source)) < 200
    assert repr(encode_texts("bada", "bada " * 9, limit=6)) == (
        "Encoded(2 examples, 2 labels, n_truncated=1)"
    )


def test_pools_can_be_asked_for_by_name_and_unknown_ones_are_refused():
    task, model = small_task(), toy_model(n_layers=1)
    for pool in POOLS:
        assert task.encode(model, pool) == task.encode(model, task[pool])
        found = cl.evaluate(model, task, pool, quiet=True)
        assert found == cl.evaluate(model, task, task[pool], quiet=True)
    # The last is an attribute of what holds the pools.
    for name in ("train", "", "size"):
        message = f"no pool '{name}'; use one of pool_a, pool_b, validation, test"
        with pytest.raises(cl.InputError, match=message):
            cl.evaluate(model, task, name)
        with pytest.raises(cl.InputError, match=message):
            task[name]


@pytest.mark.parametrize("nothing", [[], ()])
def test_nothing_cannot_be_evaluated(nothing):
    with pytest.raises(cl.InputError, match="no examples of small/one to encode: give at least"):
        cl.evaluate(toy_model(n_layers=1), small_task(), nothing)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (Example("odd", {"body": "x"}, "negative"), r"Example odd .* no field 'text'.*\['body'\]"),
        (example("odd", " "), "Example odd .* has an empty text"),
        (
            Example("odd", {"a": "", "text": 3}, "negative"),
            "Example odd .* has the text 3, which is not a str",
        ),
        (example("odd", label="pos"), r"'pos', which is not one of \['negative', 'positive'\]"),
        ("a text", r"'a text' is not an example of small/one: make one with .*Example\("),
        ({"text": "x"}, r"is not an example of small/one"),
    ],
)
def test_examples_of_ones_own_are_checked_before_they_are_encoded(odd, message):
    task, model = small_task(), toy_model(n_layers=1)
    with pytest.raises(cl.InputError, match=message):
        inspect.unwrap(Task.encode)(task, model, [*task["test"], odd])


# -- records, files and data sets ----------------------------------------------------------


def test_records_become_a_task_with_words_of_their_labels():
    task = Task.from_records(records(), id="id", seed=4, share_a=0.4)
    assert content(task) == as_content(records())
    assert task.labels == {"bad": " bad", "good": " good"}
    assert (task.seed, task.share_a) == (4, 0.4)


def test_records_without_id_are_numbered_within_their_split():
    rows = records()
    splits = {"train": rows[:80], "dev": rows[80:90], "test": rows[90:100]}
    task = Task.from_records(splits, id="")
    assert [e.id for e in task["validation"]] == [f"validation:{n}" for n in range(10)]
    assert [e.fields["text"] for e in task["test"]] == [row["text"] for row in rows[90:100]]
    training = {e.id: e.fields["text"] for e in (*task["pool_a"], *task["pool_b"])}
    assert training == {f"train:{n}": row["text"] for n, row in enumerate(rows[:80])}


def test_records_can_come_from_a_generator_and_other_columns():
    rows = ({"body": r["text"], "y": int(r["label"] == "good")} for r in records())
    task = Task.from_records(rows, template="{body} ->", label="y", labels={"1": " a", "0": " b"})
    assert len(content(task)) == 120
    assert {label for _, label in content(task).values()} == {"0", "1"}
    assert list(task.labels) == ["1", "0"]


def test_a_group_column_keeps_rows_together():
    rows = [{**row, "about": str(n // 4)} for n, row in enumerate(records(400))]
    task = Task.from_records(rows, id="id", group="about")
    assert all(len(pools) == 1 for pools in places(task.pools).values())
    assert len(places(task.pools)) == 100


def test_labels_that_are_numbers_get_the_words_given_for_numbers(tmp_path):
    rows = [{**row, "label": n % 3} for n, row in enumerate(records())]
    words = {0: " negatif", 1: " netral", 2: " positif"}
    expected = {"0": " negatif", "1": " netral", "2": " positif"}
    path = write(tmp_path / "data.csv", rows)
    for task in (
        Task.from_records(rows, id="id", labels=words),
        Task.from_file(path, id="id", labels=words),
        small_task(labels={"0": " negatif", 1: " netral"}, pools=Pools(**with_labels("0", "1"))),
    ):
        assert list(task.labels) == list(expected)[: len(task.labels)]
        assert {e.label for e in everything(task.pools)} == task.labels.keys()
    assert Task.from_records(rows, labels=words).labels == expected


def with_labels(*labels: str) -> dict[str, tuple[Example, ...]]:
    return {
        pool: tuple(replace(e, label=label) for e, label in zip(rows, labels, strict=True))
        for pool, rows in small_pools().items()
    }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["bad", "good"], r"must be a mapping from every label to its answer word.*\['bad', 'go"),
        ("bad", "must be a mapping"),
        ({"bad": 1, "good": 2}, "answer word of the label 'bad' must be a string, such as ' bad'"),
        ({0: " a", "0": " b"}, "label '0' is in labels twice"),
        ({None: " a", "good": " b"}, "label None of the word ' a' is empty"),
        ({" ": " a", "good": " b"}, "label ' ' of the word ' a' is empty"),
        ({}, r"at least two labels, but has \[\]"),
    ],
)
def test_labels_without_words_are_refused(labels, message):
    make = inspect.unwrap(Task.from_source.__func__)
    source = Corpus({"one": ANCHORS})
    with pytest.raises(cl.InputError, match=message):
        make(Task, source, "one", name="n", template=TEMPLATE, labels=labels)
    if labels == {}:
        with pytest.raises(cl.InputError, match=message):
            Task.from_records(records(), labels=labels)


def test_a_data_frame_gives_the_task_of_its_rows():
    rows = records()
    frame = pd.DataFrame(rows)
    expected = Task.from_records(rows, id="id")
    # The second has strings that know pd.NA.
    for given_frame in (frame, frame.convert_dtypes()):
        assert Task.from_records(given_frame, id="id").pools == expected.pools
    splits = {"train": frame[:80], "dev": frame[80:90], "test": frame[90:]}
    lists = {name: part.to_dict("records") for name, part in splits.items()}
    assert Task.from_records(splits, id="id").pools == Task.from_records(lists, id="id").pools


def test_a_data_frame_with_two_columns_of_one_name_is_refused():
    frame = pd.DataFrame(records())
    doubled = pd.concat([frame, frame[["text"]]], axis=1)
    with pytest.raises(cl.InputError, match="records has 2 columns named 'text'"):
        Task.from_records(doubled)


def test_records_that_are_no_mappings_are_refused():
    make = inspect.unwrap(Task.from_records.__func__)
    rows = [*records(), "just a text with a label"]
    with pytest.raises(cl.InputError, match="Row 121 of records is 'just a text"):
        # A generator, of which checks of types do not see the rows.
        make(Task, (row for row in rows))


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT, "", "  "])
def test_a_row_without_label_is_named(missing):
    rows = [*records(), {"id": "x", "text": "t", "label": missing}]
    for given_rows in (rows, pd.DataFrame(rows)):
        for labels in (None, {"bad": " bad", "good": " good"}):
            with pytest.raises(cl.InputError, match=r"no 'label' in row 121: every row needs one"):
                Task.from_records(given_rows, labels=labels)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_with_a_row_without_label_is_refused(suffix, tmp_path):
    rows = records()
    rows[4]["label"] = "" if suffix == ".csv" else None
    path = write(tmp_path / f"data{suffix}", rows)
    with pytest.raises(cl.InputError, match=r"data\.\w+ has no 'label' in row 5"):
        Task.from_file(path)


@pytest.mark.parametrize("hidden", [-1, None])
def test_labels_that_a_data_set_withholds_are_refused(hidden):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(60)]
    parts = {"train": rows, "test": [{"text": "t", "label": hidden}]}
    split = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part, features=features) for name, part in parts.items()}
    )
    with pytest.raises(cl.InputError, match="/test has no 'label' in row 1: every row needs one"):
        Task.from_dataset(split)


def test_an_unknown_option_is_named_with_the_known_ones(tmp_path):
    path = write(tmp_path / "data.csv", records())
    columns = {"label", "id", "group"}
    common = {"template", "labels", "seed", "share_a", "max_text_tokens", "tokenizer"}
    for make, known in (
        (lambda: Task.from_records(records(), foo="x"), {"name", "language"} | columns | common),
        (lambda: Task.from_dataset(datasets.Dataset.from_list(records()), foo="x"), common),
        (lambda: Task.from_file(path, foo="x"), {"name"} | columns | common),
        (lambda: cl.load_task(str(path), foo="x"), columns | common),
        (lambda: cl.load_task("toy", foo="x"), common),
        # Before anything is downloaded.
        (lambda: cl.load_task("nusax", foo="x"), common),
    ):
        with pytest.raises(cl.InputError, match="takes no option 'foo'; it takes") as caught:
            make()
        listed = str(caught.value).partition("it takes ")[2].rstrip(".").split(", ")
        assert known <= set(listed)
    assert "id" not in listed
    with pytest.raises(cl.InputError, match="The task toy takes no option 'id'"):
        cl.load_task("toy", id="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "{body} ->"}, r"no column 'body'; its columns are \['id', 'text', 'label'\]"),
        ({"label": "y"}, "no column 'y'"),
        ({"id": "key"}, "no column 'key'"),
        ({"group": "about"}, "no column 'about'"),
        ({"labels": {"good": " good", "nice": " nice"}}, "label 'bad', which is not one of"),
        ({"share_a": 1.0}, "share_a must lie between 0 and 1"),
    ],
)
def test_records_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(cl.InputError, match=message):
        Task.from_records(records(), **change)


def test_records_of_an_unknown_split_or_with_blank_texts_are_refused():
    with pytest.raises(cl.InputError, match=r"split 'extra'; use only .*'train'"):
        Task.from_records({"train": records(), "extra": records()})
    rows = records()
    rows[7]["text"] = "  "
    with pytest.raises(cl.InputError, match=r"Example 007 .* has an empty text"):
        Task.from_records(rows, id="id")


def test_records_hold_one_language_only():
    task = Task.from_records(records(), language="one")
    assert task.to("one").pools == task.pools
    with pytest.raises(cl.InputError, match=r"has only the language 'one'.*'two'"):
        task.to("two")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            separator = "," if path.suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    return path


# What parsers like to turn into something else.
AWKWARD = [
    "NA",
    "null",
    "1e5",
    'say "no", twice',
    "two\nlines",
    "ñandú…",
    "007",
    "true",
    "tab\there",
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_file_format_gives_the_rows_that_were_written(suffix, tmp_path):
    rows = records()
    for row, text in zip(rows, AWKWARD, strict=False):
        row["text"] = text
    task = Task.from_file(write(tmp_path / f"data{suffix}", rows), id="id")
    assert content(task) == as_content(rows)
    assert (task.name, task.language) == ("data", "unnamed")
    assert task.pools == Task.from_records(rows, id="id").pools


def test_texts_are_read_without_outer_blanks(tmp_path):
    rows = records()
    rows[0] = {**rows[0], "text": "  bada \n", "label": " bad"}
    task = Task.from_file(write(tmp_path / "data.csv", rows), id="id")
    assert content(task)["000"] == ({"text": "bada"}, "bad")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_folder_of_splits_keeps_them(suffix, tmp_path):
    rows = records()
    parts = {"train": rows[:90], "valid": rows[90:100], "test": rows[100:]}
    for name, part in parts.items():
        write(tmp_path / f"{name}{suffix}", part)
    (tmp_path / "README.md").write_text("not data")
    write(tmp_path / "extra.csv", rows)
    task = Task.from_file(tmp_path, id="id", name="folder")
    assert [e.id for e in task["validation"]] == [row["id"] for row in parts["valid"]]
    assert [e.id for e in task["test"]] == [row["id"] for row in parts["test"]]
    training = {e.id for e in (*task["pool_a"], *task["pool_b"])}
    assert training == {row["id"] for row in parts["train"]}


def test_a_folder_without_train_file_is_refused(tmp_path):
    write(tmp_path / "test.csv", records())
    with pytest.raises(cl.InputError, match="has no train file"):
        Task.from_file(tmp_path)


@pytest.mark.parametrize("layout", ["{language}.csv", "{language}/all.tsv", "{language}"])
def test_a_path_with_a_place_for_the_language_reaches_the_others(layout, tmp_path):
    for language in ("one", "two"):
        rows = [{**row, "text": f"{language} {row['id']}"} for row in records()]
        target = tmp_path / layout.format(language=language)
        if target.suffix:
            write(target, rows[10:] if language == "two" else rows)
        else:
            write(target / "train.csv", rows[:80])
            write(target / "dev.csv", rows[80:100])
            write(target / "test.csv", rows[100:])
    first = Task.from_file(tmp_path / layout, language="one", id="id")
    second = first.to("two")
    assert second.language == "two"
    assert {fields["text"][:3] for fields, _ in content(first).values()} == {"one"}
    assert {fields["text"][:3] for fields, _ in content(second).values()} == {"two"}
    here, there = places(first.pools), places(second.pools)
    assert len(there) >= 110
    assert all(here[group] == pools for group, pools in there.items())
    with pytest.raises(cl.InputError, match=r"three"):
        first.to("three")


def test_a_path_without_a_place_for_the_language_holds_one(tmp_path):
    task = Task.from_file(write(tmp_path / "data.csv", records()), language="one")
    with pytest.raises(cl.InputError, match=r"has only the language 'one': write \{language\}"):
        task.to("two")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.txt", "text,label\n", "not a known kind of data file"),
        ("data.csv", "", "is empty"),
        ("data.jsonl", "{broken\n", "could not be read"),
        ("data.parquet", "no parquet", "could not be read"),
        ("data.csv", "text,label\nfine,good\ntoo,many,cells\n", "more cells in line 3"),
        ("data.csv", "text,label\ngood, row 0,a\n", "more cells in line 2"),
        ("data.tsv", "text\tlabel\nalone\n", "fewer cells in line 2"),
        ("data.csv", "body,label\nfine,good\n", r"no column 'text'; its columns are \['body'"),
        ("data.csv", "text,label\n", "at least two labels"),
        ("data.csv", "text,label,text\na,b,c\n", r"data\.csv has 2 columns named 'text': rename"),
        ("data.tsv", "text\tlabel\tlabel\na\tb\tc\n", "has 2 columns named 'label'"),
    ],
)
def test_files_that_cannot_be_used_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(cl.InputError, match=message):
        Task.from_file(tmp_path / name)


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8-sig", "utf-8"])
def test_files_in_another_encoding_are_told_from_those_in_utf8(name, encoding, tmp_path):
    rows = [{**row, "text": f"ñandú {row['id']}"} for row in records()]
    path = write(tmp_path / name, rows)
    path.write_bytes(path.read_bytes().decode("utf-8").encode(encoding))
    if encoding.startswith("utf-8") or encoding == "utf-16":
        assert content(Task.from_file(path, id="id")) == as_content(rows)
    else:
        with pytest.raises(cl.InputError, match=rf"{name} is not in UTF-8: save it as UTF-8"):
            Task.from_file(path)
        assert content(Task.from_file(path, id="id", encoding=encoding)) == as_content(rows)


def test_utf16_without_a_mark_is_found_even_if_it_decodes(tmp_path):
    path = write(tmp_path / "data.csv", records())
    path.write_bytes(path.read_bytes().decode("utf-8").encode("utf-16-le"))
    with pytest.raises(cl.InputError, match="is not in UTF-8: save it as UTF-8"):
        Task.from_file(path)


def test_columns_without_a_name_at_the_end_do_no_harm(tmp_path):
    path = write(tmp_path / "data.csv", records())
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line},,\n" for line in lines), encoding="utf-8")
    assert content(Task.from_file(path, id="id")) == as_content(records())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(cl.InputError, match=r"There is no data file .*nothing\.csv"):
        Task.from_file(tmp_path / "nothing.csv")


def test_load_task_takes_the_path_of_a_file(tmp_path):
    path = write(tmp_path / "mine.csv", records())
    task = cl.load_task(str(path), "one", id="id", seed=2)
    assert (task.name, task.language, task.seed) == ("mine", "one", 2)
    assert content(task) == as_content(records())


def test_a_dataset_is_read_by_the_names_of_its_labels():
    rows = records()
    names = ["good", "bad"]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    numbers = [{**row, "label": names.index(row["label"])} for row in rows]
    whole = datasets.Dataset.from_list(numbers, features=features)
    assert content(Task.from_dataset(whole, id="id")) == as_content(rows)

    parts = {"train": range(90), "validation": range(90, 100), "test": range(100, 120)}
    split = datasets.DatasetDict({name: whole.select(index) for name, index in parts.items()})
    task = Task.from_dataset(split, id="id", name="hub")
    assert task.name == "hub"
    assert content(task) == as_content(rows)
    assert [e.id for e in task["validation"]] == [f"{n:03d}" for n in range(90, 100)]
    assert [e.id for e in task["test"]] == [f"{n:03d}" for n in range(100, 120)]


def test_a_dataset_with_plain_labels_and_another_label_column():
    rows = [{"id": r["id"], "text": r["text"], "y": r["label"]} for r in records()]
    task = Task.from_dataset(datasets.Dataset.from_list(rows), label="y", id="id")
    assert content(task) == as_content(records())


def test_a_tokenizer_given_at_load_time_checks_the_label_words(tmp_path):
    good = {"bad": " negative", "good": " positive"}
    poor = {"bad": " positive", "good": " positive"}
    path = write(tmp_path / "data.csv", records())
    dataset = datasets.Dataset.from_list(records())
    for make, given_data in (
        (Task.from_records, records()),
        (Task.from_file, path),
        (Task.from_dataset, dataset),
    ):
        make(given_data, template=TEMPLATE, labels=good, tokenizer=tokenizer())
        make(given_data, template=TEMPLATE, labels=poor)
        with pytest.raises(cl.InputError, match="'bad' and 'good' have the same tokens"):
            make(given_data, template=TEMPLATE, labels=poor, tokenizer=tokenizer())
    cl.load_task("toy", tokenizer=tokenizer())
    words = {**WORDS, "neutral": [" so", " ba"]}
    with pytest.raises(cl.InputError, match="needs one word"):
        cl.load_task("toy", labels=words, readout="token", tokenizer=tokenizer())


# -- missing values, odd templates, chains of languages --------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), "  "])
def test_a_missing_text_is_empty_and_not_the_word_for_it(missing):
    rows = [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(60)]
    with pytest.raises(cl.InputError, match="has an empty text"):
        Task.from_records([*rows, {"text": missing, "label": "a"}])


def test_a_missing_id_is_named():
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "id": n} for n in range(60)]
    with pytest.raises(cl.InputError, match="has no 'id' in row 61"):
        Task.from_records([*rows, {"text": "t", "label": "a", "id": None}], id="id")


def test_a_template_that_leaves_no_room_for_the_text_is_refused():
    words = {"neg": " negative", "pos": " positive"}
    examples = [Example("1", {"text": "bada " * 20}, "neg")]
    encoding = partial(encode, examples, toy_tokenizer(), readout=TokenReadout())
    for context in (3, 4, 5):
        with pytest.raises(cl.InputError, match="shorten the template"):
            encoding(Prompt("{text} ->", words), context=context)
    with pytest.raises(cl.InputError, match="max_text_tokens must be a whole number"):
        encoding(Prompt("{text} ->", words, 0))


def test_a_field_used_twice_counts_twice():
    words = {"neg": " negative", "pos": " positive"}
    examples = [Example("1", {"text": "bada " * 30}, "neg")]
    prompt = Prompt("{text} {text} ->", words)
    found = encode(examples, toy_tokenizer(), prompt, readout=TokenReadout(), context=40)
    assert len(found.tokens[0]) <= 40
    assert found.n_truncated == 1


@pytest.mark.parametrize("template", ["{text} {oops ->", "{text} } ->", "{text} {} ->"])
def test_templates_that_cannot_be_filled_are_refused(template):
    with pytest.raises(cl.InputError, match="prompt template"):
        Task.from_records([{"text": "a", "label": "b"}], template=template)


def test_a_chain_of_languages_is_kept_apart_from_all_of_it():
    corpus = {
        "one": {**ANCHORS, "train": [*ANCHORS["train"], *numbered("moved", 3)]},
        "two": ANCHORS,
        "three": {**ANCHORS, "test": [*ANCHORS["test"], *numbered("moved", 3)]},
    }
    task = Task.from_source(Corpus(corpus), "one", name="n", template=TEMPLATE, labels=WORDS)
    third = task.to("two").to("three")
    assert not [name for name in content(third) if name.startswith("moved")]


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text("text,label\na,b\n")
    with pytest.raises(cl.InputError, match=r"two train files, train\.csv and train\.tsv"):
        Task.from_file(tmp_path)
    with pytest.raises(cl.InputError, match="two validation splits"):
        Task.from_records({"train": [], "valid": [], "dev": []})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("reviews.csv", "reviews"),
        ("data/reviews_{language}.csv", "reviews"),
        ("data/{language}.csv", "data"),
        ("data/{language}/reviews.csv", "reviews"),
        ("{language}.csv", "task"),
        ("data/{language}/{language}.csv", "task"),
    ],
)
def test_a_task_is_named_after_its_file(path, name):
    assert name_of_files(Path(path)) == name


def test_a_text_of_the_test_split_is_not_validated_on(caplog):
    splits = {
        "train": [example(f"t{n}", f"bada {'bi ' * n}", LABELS[0]) for n in range(4)],
        "validation": [example("v1", "Gu  zevo", LABELS[0]), example("v2", "zevo", LABELS[1])],
        "test": [example("x1", "gu zevo", LABELS[1])],
    }
    pools = split_pools(splits, seed=0)
    assert [e.id for e in pools.validation] == ["v2"]
    assert [e.id for e in pools.test] == ["x1"]
    assert "1 validation examples were left out: the same text or group is in test" in (caplog.text)
