"""Answer words as tokens, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from circuitlens.errors import InputError
from circuitlens.models.batch import Words
from circuitlens.models.tokens import PromptText

__all__ = ["first_difference", "listed", "refuse_beginnings", "tokens_of_words"]


def listed(words: Words) -> tuple[str, ...]:
    """The words of a label as a tuple."""
    return (words,) if isinstance(words, str) else tuple(words)


def _word_tokens(prompt: PromptText, before: list[int], word: str, label: str) -> tuple[int, ...]:
    """Tokens of a word as it follows a prompt, whose own tokens are ``before``.

    Words are tried behind the prompt and not alone, because tokenizers of the SentencePiece kind
    split the two cases differently.

    Raises:
        InputError: if the word changes the tokens of the prompt, has none, or is unknown.
    """
    after = prompt.ids(word)
    what = f"The word {word!r} of the label {label!r}"
    if after[: len(before)] != before:
        if str(prompt)[-1:].isspace():
            raise InputError(
                f"The prompt ends in a space ({str(prompt)!r}), which tokenizers put into the word "
                "that follows: end the template with its last word or sign, and start the answer "
                f"words with the space, such as {' ' + word.strip()!r}."
            )
        raise InputError(
            f"{what} changes the tokens of the prompt {str(prompt)!r} that it follows: start the "
            "word with a space, or end the template differently (template=…, labels=…)."
        )
    found = tuple(after[len(before) :])
    if not found:
        raise InputError(f"{what} has no tokens: choose another word (labels=…).")
    unknown = prompt.tokenizer.unk_token_id
    if unknown is not None and unknown in found:
        raise InputError(f"{what} is unknown to the tokenizer: choose another word (labels=…).")
    return found


def tokens_of_words(
    prompt: PromptText, words: Mapping[str, Words]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Tokens of all words of every label.

    Raises:
        InputError: if a word changes the tokens of the prompt, has none, or is unknown; if two
            words have the same tokens.
    """
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    seen: dict[tuple[int, ...], str] = {}
    before = prompt.ids()
    for label, given in words.items():
        tokens = []
        for word in listed(given):
            one = _word_tokens(prompt, before, word, label)
            if one in seen:
                raise InputError(
                    f"The labels {seen[one]!r} and {label!r} have the same tokens for {word!r}: "
                    "choose different words (labels=…)."
                )
            seen[one] = label
            tokens.append(one)
        found[label] = tuple(tokens)
    return found


def refuse_beginnings(
    tokens: Mapping[str, tuple[tuple[int, ...], ...]], words: Mapping[str, Words]
) -> None:
    """Reject a word that begins another label's: its probability is never below the other's.

    Raises:
        InputError: naming both.
    """
    every = [
        (label, word, ids)
        for label, found in tokens.items()
        for word, ids in zip(listed(words[label]), found, strict=True)
    ]
    for label, word, ids in every:
        for other, longer, more in every:
            if other != label and more[: len(ids)] == ids:
                raise InputError(
                    f"The word {word!r} of the label {label!r} is the beginning of {longer!r} of "
                    f"{other!r}, which can never be more probable: choose other words (labels=…), "
                    "or readout='sequence-mean'."
                )


def first_difference(words: Sequence[tuple[int, ...]]) -> int | None:
    """Place of the token by which all words differ, behind a beginning that all share.

    ``None`` if there is none: if some words share more than all do, or one is the beginning of
    another.
    """
    shared = 0
    while all(len(w) > shared for w in words) and len({w[shared] for w in words}) == 1:
        shared += 1
    if any(len(w) <= shared for w in words):
        return None
    return shared if len({w[shared] for w in words}) == len(words) else None
