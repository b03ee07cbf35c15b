"""Artificial languages with sentiment sentences, and a small model to learn them.

Everything follows from a seed: the lexicon, the sentences, the tokenizer and the model's initial
weights. The languages say the same things (example *n* has one meaning in all of them):

* ``source``: determiner, noun, negation, intensifier, adjective;
* ``near``: the same grammar; words changed by regular sound shifts, some of them cognates that
  the shifts leave alone;
* ``far``: other words except for a few cognates, adjectives first and negation at the clause's end;
* ``lexicon``, ``negation``, ``order``: differ from the source in only one thing, the words for
  things and qualities, the word for ``not`` and its place (the clause's end), or the order of words
  (each clause backwards); ``all`` differs in all three. With them one can ask which heads have to
  change for what.

A sentence has one or two clauses. Clauses state a quality that is good, bad or neither, or a
plain fact; ``not`` turns good into bad and back; intensifiers change nothing; after ``but`` the
second clause decides. So a single word does not tell the label: heads have to bind negation to its
adjective and the clause to its connective.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks.examples import Example

__all__ = [
    "TOY_FINETUNE",
    "TOY_KINDS",
    "TOY_PROMPT",
    "Lexicon",
    "ToyLanguages",
    "toy_model",
    "toy_tokenizer",
]

TOY_KINDS = ("lexicon", "negation", "order", "all")
TOY_LANGUAGES = ("source", "near", "far", *TOY_KINDS)
TOY_PROMPT: dict[str, Any] = {
    "template": "{text} ->",
    "labels": {"negative": " negative", "neutral": " neutral", "positive": " positive"},
    # Much for the source, little for the target, as in the low-resource case.
    "share_a": 0.95,
}
# Arguments of cl.finetune that teach toy_model() the source language. It learns words first and
# negation suddenly, after several epochs without gain, hence the patience.
TOY_FINETUNE: dict[str, Any] = {
    "learning_rate": 3e-3,
    "epochs": 15,
    "batch_size": 64,
    "patience": 8,
}

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = [c + v for c in _CONSONANTS for v in _VOWELS]
# Regular correspondences, as between related languages: word-initial stops are voiced and open
# vowels are rounded in final syllables.
_ONSET_SHIFT = str.maketrans("ptkfsm", "bdgvzn")
_FINAL_SHIFT = str.maketrans("ae", "ou")

_CONTENT = {"noun": 20, "good": 12, "bad": 12, "plain": 10, "verb": 8}
_FUNCTION = ("the", "not", "very", "quite", "and", "but")


@dataclass(frozen=True)
class Clause:
    """One clause of a meaning: who, what about it, and whether it is negated."""

    noun: str
    predicate: str
    object: str | None
    negated: bool
    intensifier: str | None

    @property
    def label(self) -> str:
        """Sentiment of the clause."""
        kind = self.predicate.split(":")[0]
        if kind not in ("good", "bad"):
            return "neutral"
        return "positive" if (kind == "good") != self.negated else "negative"


@dataclass(frozen=True)
class Meaning:
    """What a sentence says, in no language yet."""

    clauses: tuple[Clause, ...]
    connective: str | None

    @property
    def label(self) -> str:
        """Sentiment of the sentence: ``but`` lets the last clause decide."""
        if self.connective == "but":
            return self.clauses[-1].label
        return next((c.label for c in self.clauses if c.label != "neutral"), "neutral")


class Lexicon:
    """Words of the languages for one seed: ``lexicon["near"]["noun:3"]``."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"toy-lexicon-{seed}")
        concepts = [f"{kind}:{n}" for kind, size in _CONTENT.items() for n in range(size)]
        taken: set[str] = set()

        def coin(syllables: int) -> str:
            while True:
                word = "".join(rng.choice(_SYLLABLES) for _ in range(syllables))
                if word not in taken:
                    taken.add(word)
                    return word

        source = {c: coin(2) for c in concepts} | {c: coin(1) for c in _FUNCTION}
        near: dict[str, str] = {}
        far: dict[str, str] = {}
        for concept, word in source.items():
            onset, middle, final = word[0], word[1:-1], word[-1]
            shifted = onset.translate(_ONSET_SHIFT) + middle + final.translate(_FINAL_SHIFT)
            near[concept] = word if rng.random() < 0.25 or shifted in taken else shifted
            taken.add(near[concept])
            far[concept] = word if rng.random() < 0.1 else coin(len(word) // 2)
        # After the others, so that those are what they were.
        other = {c: coin(2) for c in concepts}
        no = coin(1)
        self._words = {
            "source": source,
            "near": near,
            "far": far,
            "lexicon": source | other,
            "negation": source | {"not": no},
            "order": source,
            "all": source | other | {"not": no},
        }

    def __getitem__(self, language: str) -> Mapping[str, str]:
        return self._words[language]

    def realise(self, meaning: Meaning, language: str) -> str:
        """Say ``meaning`` in ``language``."""
        word = self._words[language]
        clauses = [" ".join(self._clause(c, word, language)) for c in meaning.clauses]
        joint = f" {word[meaning.connective]} " if meaning.connective else ""
        return joint.join(clauses)

    @staticmethod
    def _clause(clause: Clause, word: Mapping[str, str], language: str) -> list[str]:
        negation = [word["not"]] if clause.negated else []
        strength = [word[clause.intensifier]] if clause.intensifier else []
        predicate = [word[clause.predicate]]
        other = [word[clause.object], word["the"]] if clause.object else []
        if language == "far":
            return [*predicate, *strength, *other, word[clause.noun], word["the"], *negation]
        moved = language in ("negation", "all")
        inner = [] if moved else negation
        words = [word["the"], word[clause.noun], *inner, *strength, *predicate, *other[::-1]]
        if language in ("order", "all"):
            words.reverse()
        return [*words, *negation] if moved else words


def _meanings(seed: int, stream: str) -> Iterator[Meaning]:
    """Yield meanings without end; the three labels are equally likely."""
    rng = random.Random(f"toy-meanings-{seed}-{stream}")

    def pick(kind: str) -> str:
        return f"{kind}:{rng.randrange(_CONTENT[kind])}"

    def clause(label: str) -> Clause:
        negated = rng.random() < 0.4
        if label == "neutral":
            if rng.random() < 0.5:
                return Clause(pick("noun"), pick("verb"), pick("noun"), negated, None)
            kind = "plain"
        else:
            kind = "good" if (label == "positive") != negated else "bad"
        strength = rng.choice(["very", "quite"]) if rng.random() < 0.4 else None
        return Clause(pick("noun"), pick(kind), None, negated, strength)

    labels = ("negative", "neutral", "positive")
    while True:
        label = rng.choice(labels)
        shape = rng.random()
        if shape < 0.4:
            yield Meaning((clause(label),), None)
        elif shape < 0.7:
            pair = [clause(label), clause("neutral")]
            rng.shuffle(pair)
            yield Meaning(tuple(pair), "and")
        else:
            yield Meaning((clause(rng.choice(labels)), clause(label)), "but")


@dataclass(frozen=True)
class ToyLanguages:
    """Source of toy examples: a lexicon and a stream of meanings, both from one seed.

    Attributes:
        seed: seed of lexicon and sentences.
        n_train, n_validation, n_test: sizes of the splits, the same in all languages.
    """

    seed: int = 0
    n_train: int = 4000
    n_validation: int = 200
    n_test: int = 400

    @cached_property
    def lexicon(self) -> Lexicon:
        """The words."""
        return Lexicon(self.seed)

    @property
    def languages(self) -> Sequence[str]:
        """The source, two targets, and a target for every kind of difference."""
        return TOY_LANGUAGES

    def resolve(self, language: str) -> str:
        """Accept their names."""
        if language not in TOY_LANGUAGES:
            raise InputError(
                f"The toy task has no language {language!r}; it has {', '.join(TOY_LANGUAGES)}."
            )
        return language

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Make the three splits; no meaning is in two of them."""
        return dict(_splits(self, language))


# Every task.to() asks for them.
@lru_cache(maxsize=len(TOY_LANGUAGES))
def _splits(toy: ToyLanguages, language: str) -> Mapping[str, Sequence[Example]]:
    meanings = _meanings(toy.seed, "labelled")
    seen: set[Meaning] = set()
    splits: dict[str, Sequence[Example]] = {}
    sizes = {"test": toy.n_test, "validation": toy.n_validation, "train": toy.n_train}
    for name, size in sizes.items():
        examples: list[Example] = []
        while len(examples) < size:
            meaning = next(meanings)
            if meaning in seen:
                continue
            seen.add(meaning)
            text = toy.lexicon.realise(meaning, language)
            examples.append(Example(f"{name}:{len(examples)}", {"text": text}, meaning.label))
        splits[name] = tuple(examples)
    return splits


def toy_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level BPE tokenizer whose merges are the syllables and the label words.

    It is built through ``Qwen2Tokenizer``'s own pipeline: ``AutoTokenizer`` rebuilds that for a
    Qwen2 model from vocabulary and merges, whatever else a tokenizer file says.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    blank = "Ġ"
    merges: list[tuple[str, str]] = [(c, v) for c in _CONSONANTS for v in _VOWELS]
    merges += [(blank, syllable) for syllable in _SYLLABLES]
    merges += [("-", ">"), (blank, "->")]
    for pieces in (["ne", "ga", "ti", "ve"], ["ne", "u", "t", "ra", "l"], ["po", "si", "ti", "ve"]):
        whole = blank + pieces[0]
        for piece in pieces[1:]:
            merges.append((whole, piece))
            whole += piece
    tokens = ["<unk>", "<s>", "<pad>", *sorted(bytes_to_unicode().values())]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    unique: Any = list(dict.fromkeys(merges))  # annotated as strings, but pairs are what it takes
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=unique,
        unk_token="<unk>",
        bos_token="<s>",
        add_bos_token=True,
        eos_token="<s>",
        pad_token="<pad>",
        padding_side="left",
    )


def toy_model(
    seed: int = 0, *, n_layers: int = 3, n_heads: int = 8, d_model: int = 64, d_mlp: int = 160
) -> HookedModel:
    """Make an untrained Qwen2 model (GQA, RoPE, RMSNorm, SwiGLU) for the toy languages.

    ``cl.finetune(toy_model(), cl.load_task("toy"), **TOY_FINETUNE)`` teaches it the source.
    """
    tokenizer = toy_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=max(1, n_heads // 2),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return HookedModel(model, tokenizer, f"toy-{seed}")
