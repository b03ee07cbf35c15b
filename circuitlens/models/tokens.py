"""Text as tokens: special tokens in texts are text, and what a tokenizer puts around a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from circuitlens.errors import InputError
from circuitlens.utils.pieces import bytes_of, readable

__all__ = ["Around", "PromptText", "around", "begin", "text_ids", "token_texts"]


class Around(NamedTuple):
    """Special tokens that a tokenizer puts before and behind a text, and between two."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    between: tuple[int, ...]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text in which special tokens stand for nothing but their letters.

    A review that contains ``</s>`` must not end the prompt.
    """
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(found["input_ids"])


@dataclass(frozen=True)
class PromptText:
    """A prompt as text, and which parts of it are the template's.

    Attributes:
        tokenizer: of the model.
        parts: texts in order; those marked true are the template's, in which special tokens are
            special.
    """

    tokenizer: PreTrainedTokenizerBase
    parts: tuple[tuple[str, bool], ...]

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)

    def ids(self, word: str = "") -> list[int]:
        """Tokens of the prompt, with a word behind it."""
        tokenizer, whole = self.tokenizer, f"{self}{word}"
        special = [token for token in tokenizer.all_special_tokens if token in whole]
        foreign = [(text, mine) for text, mine in (*self.parts, (word, False)) if text]
        if not any(token in text for text, mine in foreign if not mine for token in special):
            return list(tokenizer(whole, add_special_tokens=False)["input_ids"])
        # The template is taken apart at its special tokens; everything between is text.
        border = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        ids: list[int] = []
        pending = ""
        for text, mine in foreign:
            done = 0
            for found in border.finditer(text) if mine else ():
                pending += text[done : found.start()]
                ids += text_ids(tokenizer, pending) if pending else []
                ids.append(cast(int, tokenizer.convert_tokens_to_ids(found.group())))
                pending, done = "", found.end()
            pending += text[done:]
        return ids + (text_ids(tokenizer, pending) if pending else [])


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as text that people can read, with their spaces.

    Decoding single tokens removes spaces from those of SentencePiece, and makes nothing of half a
    letter, as byte-level vocabularies have them.
    """
    pieces = [str(p) for p in tokenizer.convert_ids_to_tokens(list(ids))]
    special = set(tokenizer.all_special_tokens)
    if _is_byte_level(tokenizer):
        # Special tokens, and others that were added, are written as they are, and not in bytes.
        known = [None if piece in special else bytes_of(piece) for piece in pieces]
        return readable(
            [p.encode() if b is None else b for p, b in zip(pieces, known, strict=True)]
        )
    found = []
    for piece, token in zip(pieces, ids, strict=True):
        text = str(tokenizer.decode([token]))
        if not text or "\ufffd" in text or not (text.isprintable() or text.isspace()):
            text = f"<{piece.strip('<>')}>"  # a piece of a character, or one without shape
        elif piece.startswith("▁") and not text.startswith(" "):
            text = f" {text}"
        found.append(text)
    return found


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary is of bytes: then it writes a space as Ġ."""
    pieces = tokenizer.convert_ids_to_tokens(text_ids(tokenizer, "x x"))
    return any("Ġ" in str(piece) for piece in pieces)


def around(tokenizer: PreTrainedTokenizerBase) -> Around:
    """Find out what the tokenizer puts around one text and around a pair.

    Raises:
        InputError: if it splits a text differently with its special tokens than without.
    """
    text = text_ids(tokenizer, "x")
    single = list(tokenizer("x")["input_ids"])
    start = _place(single, text)
    before, behind = tuple(single[:start]), tuple(single[start + len(text) :])
    inner = list(tokenizer("x", "x")["input_ids"])[len(before) + len(text) :]
    return Around(before, behind, tuple(inner[: _place(inner, text)]))


def _place(tokens: list[int], part: list[int]) -> int:
    for start in range(len(tokens) - len(part) + 1):
        if tokens[start : start + len(part)] == part:
            return start
    raise InputError(
        "The tokenizer splits a text differently when it adds its special tokens, so that prompts "
        "cannot be put together: give another one, cl.load(…, tokenizer=…)."
    )


def begin(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> tuple[int, ...]:
    """Tokens at the start of a causal prompt.

    Args:
        tokenizer: of the model.
        bos: ``True`` or ``False`` force ``<s>`` or forbid it; ``None`` does as the tokenizer.

    Raises:
        InputError: if it is forced, and there is none.
    """
    if bos is None:
        return around(tokenizer).before
    if not bos:
        return ()
    if tokenizer.bos_token_id is None:
        raise InputError(
            "bos=True asks for a token at the start of prompts, and the tokenizer has none: set "
            "tokenizer.bos_token, or leave bos out."
        )
    return (int(tokenizer.bos_token_id),)
