from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest
import torch
from helpers import token_of_labels
from transformers import AutoTokenizer

import circuitlens as cl
from circuitlens.tasks import toy
from circuitlens.tasks.toy import TOY_PROMPT, Lexicon, ToyLanguages, toy_model, toy_tokenizer
from circuitlens.utils import threads
from circuitlens.utils.threads import settle_threads

LANGUAGES = ("source", "near", "far")
SPLITS = ("train", "validation", "test")
SHIFTED_ONSET = dict(zip("ptkfsm", "bdgvzn", strict=True))
SHIFTED_FINAL = {"a": "o", "e": "u"}


@cache
def small(seed: int = 0) -> ToyLanguages:
    return ToyLanguages(seed, n_train=900, n_validation=150, n_test=150)


@cache
def texts(language: str, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Text and label by id."""
    splits = small(seed).splits(language)
    return {e.id: (e.fields["text"], e.label) for split in SPLITS for e in splits[split]}


@cache
def concepts(language: str, seed: int = 0) -> dict[str, list[str]]:
    """What the words of every example mean, in their order."""
    meaning = {word: concept for concept, word in small(seed).lexicon[language].items()}
    return {
        name: [meaning[word] for word in text.split()]
        for name, (text, _) in texts(language, seed).items()
    }


def clauses(words: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word in ("and", "but"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def clause_label(words: list[str]) -> str:
    kinds = {word.split(":")[0] for word in words}
    if not kinds & {"good", "bad"}:
        return "neutral"
    return "positive" if ("good" in kinds) != ("not" in kinds) else "negative"


# -- meanings ------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_labels_follow_from_the_words(language):
    # Oracle: read the sentences with the lexicon and work out the label from the grammar.
    for name, words in concepts(language).items():
        parts = [clause_label(clause) for clause in clauses(words)]
        label = next((part for part in parts if part != "neutral"), "neutral")
        if "but" in words:
            label = parts[-1]
        assert texts(language)[name][1] == label, name


@pytest.mark.parametrize("language", ["near", "far"])
def test_an_example_means_the_same_in_all_languages(language):
    theirs = concepts(language)
    assert theirs.keys() == concepts("source").keys()
    for name, words in concepts("source").items():
        assert list(map(sorted, clauses(words))) == list(map(sorted, clauses(theirs[name])))
        assert [w for w in words if w in ("and", "but")] == [
            w for w in theirs[name] if w in ("and", "but")
        ]


def test_near_has_the_grammar_of_the_source_and_far_has_its_own():
    assert concepts("near") == concepts("source")
    seen = Counter()
    for name, words in concepts("source").items():
        for here, there in zip(clauses(words), clauses(concepts("far")[name]), strict=True):
            kind = "not" in here, any(word.startswith("verb") for word in here)
            seen[kind] += 1
            the, noun, *rest = here
            assert the == "the"
            assert noun.startswith("noun")
            # Predicate first, then intensifier or object, then noun and determiner, then not.
            rest = [word for word in rest if word != "not"]
            if kind[1]:
                verb, _, thing = rest
                expected = [verb, thing, "the"]
            else:
                expected = rest[::-1]
            assert there == [*expected, noun, "the", *(["not"] if kind[0] else [])]
    assert min(seen.values()) > 50
    assert len(seen) == 4


def test_negation_and_but_turn_labels_so_that_words_alone_do_not_tell():
    rows = concepts("source")
    negated = [n for n, words in rows.items() if "not" in words]
    contrasted = [
        n
        for n, words in rows.items()
        if "but" in words and len(set(map(clause_label, clauses(words)))) == 2
    ]
    assert len(negated) > 0.3 * len(rows)
    assert len(contrasted) > 0.1 * len(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_are_about_balanced_in_every_split(seed):
    for split, examples in small(seed).splits("source").items():
        counts = Counter(e.label for e in examples)
        assert set(counts) == set(TOY_PROMPT["labels"])
        slack = 5 * (len(examples) * 2 / 9) ** 0.5
        assert all(abs(n - len(examples) / 3) < slack for n in counts.values()), split


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_stands_in_two_splits_or_twice(language):
    rows = texts(language)
    assert len({text for text, _ in rows.values()}) == len(rows) == 1200
    # Distinct sentences have distinct meanings, because words have one meaning each.
    words = small().lexicon[language]
    assert len(set(words.values())) == len(words)


def test_sizes_and_the_test_split_do_not_depend_on_the_other_sizes():
    short = ToyLanguages(0, n_train=10, n_validation=150, n_test=150).splits("source")
    long = small().splits("source")
    assert {name: len(examples) for name, examples in short.items()} == {
        "test": 150,
        "validation": 150,
        "train": 10,
    }
    assert short["test"] == long["test"]
    assert short["validation"] == long["validation"]
    assert short["train"] == long["train"][:10]


# -- seeds ---------------------------------------------------------------------------------


def test_a_seed_gives_the_same_languages_again_and_another_gives_others():
    again = ToyLanguages(0, n_train=900, n_validation=150, n_test=150)
    for language in LANGUAGES:
        assert dict(again.lexicon[language]) == dict(small().lexicon[language])
        assert again.splits(language) == small().splits(language)
        other = texts(language, seed=1)
        same = [name for name, (text, _) in texts(language).items() if other[name][0] == text]
        assert len(same) < 5
    one, other = Lexicon(0)["source"], Lexicon(1)["source"]
    assert sum(one[concept] == other[concept] for concept in one) < 5


@pytest.mark.slow
def test_the_toy_task_does_not_depend_on_the_process():
    # Sets of strings are ordered by a hash that changes with PYTHONHASHSEED.
    script = "import circuitlens as cl; print(cl.load_task('toy', 'far').fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == cl.load_task("toy", "far").fingerprint()


def test_models_follow_from_their_seed_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (toy_model(seed, n_layers=1) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


# -- words ---------------------------------------------------------------------------------


def shifted(word: str) -> str:
    onset, middle, final = word[0], word[1:-1], word[-1]
    return SHIFTED_ONSET.get(onset, onset) + middle + SHIFTED_FINAL.get(final, final)


@pytest.mark.parametrize("seed", range(4))
def test_near_words_are_source_words_or_regular_shifts_of_them(seed):
    lexicon = Lexicon(seed)
    source, near = lexicon["source"], lexicon["near"]
    assert source.keys() == near.keys()
    changed = [c for c in source if near[c] != source[c]]
    assert [c for c in changed if near[c] != shifted(source[c])] == []
    # Some words shift and some that could are left alone.
    assert len(changed) > 0.2 * len(source)
    movable = [c for c in source if shifted(source[c]) != source[c]]
    assert 0.05 < (len(movable) - len(changed)) / len(movable) < 0.6
    # A shifted word is no other source word, so nothing is a false friend.
    assert {near[c] for c in changed}.isdisjoint(source.values())


@pytest.mark.parametrize("seed", range(4))
def test_far_words_are_new_but_for_a_few_cognates(seed):
    lexicon = Lexicon(seed)
    source, near, far = (lexicon[language] for language in LANGUAGES)
    cognates = [c for c in source if far[c] == source[c]]
    assert 0 < len(cognates) < 0.25 * len(source)
    new = {far[c] for c in source if c not in cognates}
    assert new.isdisjoint(source.values())
    assert new.isdisjoint(near.values())
    assert all(len(far[c]) == len(source[c]) for c in source)


def test_unknown_languages_are_refused_with_the_known_ones():
    with pytest.raises(cl.InputError, match="no language 'martian'; it has source, near, far"):
        cl.load_task("toy", "martian")


def test_the_toy_task_gives_little_to_transfer_and_stays_parallel():
    task = cl.load_task("toy")
    assert (task.language, task.template, task.labels) == (
        "source",
        TOY_PROMPT["template"],
        TOY_PROMPT["labels"],
    )
    assert len(task["pool_a"]) + len(task["pool_b"]) == 4000
    assert 100 < len(task["pool_b"]) < 320
    far = task.to("far")
    for pool in ("pool_a", "pool_b", "validation", "test"):
        assert [(e.id, e.label) for e in far[pool]] == [(e.id, e.label) for e in task[pool]]
        assert not {e.text for e in far[pool]} & {e.text for e in task[pool]}


# -- tokenizer and model -------------------------------------------------------------------


def test_syllables_and_label_words_are_one_token_each():
    tokenizer = toy_tokenizer()
    for language in LANGUAGES:
        for word in small().lexicon[language].values():
            syllables = [word[i : i + 2] for i in range(0, len(word), 2)]
            for text, first in ((word, syllables[0]), (f" {word}", f"Ġ{syllables[0]}")):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.convert_ids_to_tokens(ids) == [first, *syllables[1:]]
    found = token_of_labels(tokenizer, TOY_PROMPT["template"], TOY_PROMPT["labels"])
    assert tokenizer.convert_ids_to_tokens(list(found.values())) == [
        "Ġnegative",
        "Ġneutral",
        "Ġpositive",
    ]


def test_the_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [
        TOY_PROMPT["template"].format(text=text) + word
        for language in LANGUAGES
        for text, _ in texts(language).values()
        for word in ("", " positive")
    ]
    prompts += ["Ünïcode, 123 and\nlines", "<s>bada<pad>", ""]
    for special in (True, False):
        before = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        assert again(prompts, add_special_tokens=special)["input_ids"] == before
    assert len(again) == len(tokenizer)
    assert again.padding_side == tokenizer.padding_side == "left"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name) is not None


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tokenizer_gives_texts_back(language):
    tokenizer = toy_tokenizer()
    for text, _ in list(texts(language).values())[:200]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_every_prompt_fits_the_context_of_the_model():
    model, task = toy_model(n_layers=1), cl.load_task("toy", "far")
    for pool in ("pool_a", "test"):
        encoded = task.encode(model, task[pool])
        # So there is nothing to warn of either.
        assert encoded.n_truncated == 0
        assert encoded.pad_token == model.tokenizer.pad_token_id
        assert max(map(len, encoded.tokens)) <= model.hf.config.max_position_embeddings


def test_a_saved_toy_model_loads_with_the_same_logits(tmp_path):
    model, task = toy_model(3, n_layers=2), cl.load_task("toy")
    model.save(tmp_path)
    again = cl.load(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    assert again.hf is not model.hf
    batch = task.encode(model, task["test"][:8]).batch(range(8))
    same = task.encode(again, task["test"][:8]).batch(range(8))
    assert torch.equal(batch.input_ids, same.input_ids)
    with torch.no_grad():
        expected = model.hf_logits(batch)
        assert torch.equal(again.hf_logits(same), expected)
        torch.testing.assert_close(again.logits(same), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


REPRODUCED = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
import circuitlens as cl
from circuitlens.tasks import toy
task = cl.load_task("toy")
options = {**toy.TOY_FINETUNE, "epochs": 2, "quiet": True}
try:
    model = cl.finetune(toy.toy_model(n_layers=1), task, **options)
except cl.CompetenceError as error:
    model = error.model
baseline = cl.label_balanced_mean(model, task, allow_chance=True, quiet=True)
scores = cl.relevance(model, task, baseline, max_examples=30, quiet=True)
print(model.fingerprint(), scores.provenance.machine["threads"], scores.mean.flatten().tolist())
"""


@pytest.mark.slow
def test_the_recorded_setting_reproduces_the_bits():
    def run(threads: int) -> str:
        command = [sys.executable, "-W", "ignore", "-c", REPRODUCED, str(threads)]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=300, env=environment
        )
        return done.stdout.strip().splitlines()[-1]

    for n in (1, 2):
        first, second = run(n), run(n)
        assert first == second
        assert first.split()[1] == str(n)


def test_commands_give_small_models_one_thread(monkeypatch):
    model = toy_model(n_layers=1).hf
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settle_threads(model)
    assert not chosen
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle_threads(model)
    assert chosen == [1]
    monkeypatch.setattr(threads, "SMALL", 10)
    settle_threads(model)
    assert chosen == [1]


@pytest.mark.parametrize("kind", toy.TOY_KINDS)
def test_a_kind_differs_from_the_source_in_that_alone(kind):
    languages = toy.ToyLanguages()
    lexicon = languages.lexicon
    source, other = lexicon["source"], lexicon[kind]
    changed = {concept for concept in source if source[concept] != other[concept]}
    content = {concept for concept in source if ":" in concept}
    expected = {"lexicon": content, "negation": {"not"}, "order": set(), "all": content | {"not"}}
    assert changed == expected[kind]
    back = {word: concept for concept, word in other.items()}
    for mine, theirs in zip(
        languages.splits("source")["test"][:200], languages.splits(kind)["test"], strict=False
    ):
        assert (mine.id, mine.label) == (theirs.id, theirs.label)
        words = [back[word] for word in theirs.fields["text"].split()]
        meant = mine.fields["text"].split()
        assert sorted(source[concept] for concept in words) == sorted(meant)
        clauses = [[]]
        for concept in words:
            clauses.append([]) if concept in ("and", "but") else clauses[-1].append(concept)
        for clause in clauses:
            # Moved to the end, or where it would stand if all were said backwards.
            if "not" in clause and kind in ("negation", "all"):
                assert clause[-1] == "not"
        if kind == "lexicon":
            assert [source[concept] for concept in words] == meant
        if kind == "order" and len(clauses) == 1:
            assert [source[concept] for concept in words] == meant[::-1]
    assert len(set(other.values())) == len(other)
