"""From examples to token batches.

A prompt is the template filled with the texts, in the frame of tokens that the model's readout
asks for: behind ``<s>`` if the tokenizer has one; for a masked language model behind ``[CLS]``, and
with ``[MASK]``, in whose place the answer belongs, and ``[SEP]`` after it. A text that is too long
loses its end, never the end of the prompt: the question is asked in any case.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from string import Formatter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuitlens.errors import InputError, check_whole
from circuitlens.models.batch import Batch, Readout
from circuitlens.tasks.examples import Example

__all__ = ["Encoded", "bare_prompt", "encode", "label_words", "template_fields"]

logger = logging.getLogger(__name__)

# A few long texts lose little; more than this share of all is worth interrupting a session for.
_MANY_CUT = 0.05


def template_fields(template: str) -> list[str]:
    """Names of the fields in a prompt template, in order, as often as they occur.

    Raises:
        InputError: if the template cannot be parsed, or a field has no name.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(
            f"The prompt template {template!r} cannot be read ({error}); write {{{{ and }}}} for "
            "braces that are no field."
        ) from error
    if not all(name.isidentifier() for name in names):
        raise InputError(
            f"The prompt template {template!r} has a field without a proper name: name the text "
            "in the braces, such as {text}."
        )
    return names


def label_words(labels: Any) -> dict[str, str]:
    """Check the answer words by label, and turn labels into strings, as data files have them.

    Raises:
        InputError: if they are no mapping, a label is empty or stands there twice, or a word is no
            string.
    """
    if not isinstance(labels, Mapping):
        raise InputError(
            "labels must be a mapping from every label to its answer word, such as "
            f"{{'negative': ' negative'}}, but is {labels!r}."
        )
    found: dict[str, str] = {}
    for label, word in labels.items():
        name = "" if label is None else str(label)
        if not name.strip():
            raise InputError(f"The label {label!r} of the word {word!r} is empty: give it a name.")
        if name in found:
            raise InputError(f"The label {name!r} stands in labels twice: remove one.")
        if not isinstance(word, str):
            raise InputError(
                f"The answer word of the label {name!r} must be a string, such as "
                f"{f' {name}'!r}, but is {word!r}."
            )
        found[name] = word
    return found


@dataclass(frozen=True)
class Encoded:
    """Encoded examples, in the order given.

    Attributes:
        ids: example ids.
        tokens: prompt tokens of every example, unpadded.
        gold: index of the right label of every example.
        readout: where the answer is read, and what stands for the labels there.
        pad_token: token for padding on the left.
        n_prefix: 1 if prompts begin with ``<s>`` or ``[CLS]``, else 0.
        n_suffix: tokens at the end of prompts that belong to no text (1 for ``[SEP]``).
        n_truncated: how many texts lost their end.
        groups: the group of every example (:class:`Example`); its id where none are given.
    """

    ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    gold: tuple[int, ...]
    readout: Readout
    pad_token: int
    n_prefix: int
    n_suffix: int
    n_truncated: int
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", self.ids)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"Encoded({len(self)} examples, {self.readout.n_labels} labels, "
            f"n_truncated={self.n_truncated})"
        )

    def __add__(self, other: Encoded) -> Encoded:
        """These examples, then those.

        Raises:
            InputError: if the answers are read otherwise there.
        """
        if (self.readout, self.n_suffix) != (other.readout, other.n_suffix):
            raise InputError(
                "Examples cannot be mixed whose answers are read differently: give both tasks the "
                "same label words and the same model."
            )
        return replace(
            self,
            ids=self.ids + other.ids,
            tokens=self.tokens + other.tokens,
            gold=self.gold + other.gold,
            n_truncated=self.n_truncated + other.n_truncated,
            groups=self.groups + other.groups,
        )

    def take(self, indices: Sequence[int]) -> Encoded:
        """The examples at ``indices``."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in indices),
            tokens=tuple(self.tokens[i] for i in indices),
            gold=tuple(self.gold[i] for i in indices),
            groups=tuple(self.groups[i] for i in indices),
        )

    def batch(self, indices: Sequence[int], device: torch.device | None = None) -> Batch:
        """Pad the examples at ``indices`` on the left and stack them."""
        rows = [self.tokens[i] for i in indices]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        gold = torch.tensor([self.gold[i] for i in indices])
        batch = Batch(ids, mask, gold, self.readout, self.n_prefix, self.n_suffix)
        return batch if device is None else batch.to(device)

    def batches(
        self, batch_size: int, device: torch.device | None = None
    ) -> Iterator[tuple[Int[Tensor, " batch"], Batch]]:
        """Yield batches of similar lengths, each with the indices of its examples.

        Raises:
            InputError: if the size is not a whole number of at least 1.
        """
        # A negative step would yield nothing, and leave results as they were allocated.
        batch_size = check_whole("batch_size", batch_size)
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield torch.tensor(chosen), self.batch(chosen, device)

    def n_batches(self, batch_size: int) -> int:
        """How many batches :meth:`batches` yields.

        Raises:
            InputError: if the size is not a whole number of at least 1.
        """
        return -(-len(self) // check_whole("batch_size", batch_size))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def bare_prompt(template: str) -> str:
    """An example of a prompt: the template with ``x`` for every text."""
    return template.format(**dict.fromkeys(template_fields(template), "x"))


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    """Return the longest beginning of ``text`` that has at most ``limit`` tokens."""
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoding["offset_mapping"]
        return text if len(spans) <= limit else text[: spans[limit][0]].rstrip()
    ids = _ids(tokenizer, text)
    return text if len(ids) <= limit else str(tokenizer.decode(ids[:limit]))


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    words: Mapping[str, str],
    *,
    max_text_tokens: int,
    readout: Readout,
    context: int | None = None,
    where: str = "examples",
) -> Encoded:
    """Encode examples as prompts; the log says how many texts were cut, as a warning if many were.

    Args:
        examples: what to encode.
        tokenizer: of the model.
        template: prompt template with the fields of the examples.
        words: label word by label; their order numbers the labels.
        max_text_tokens: limit for the texts of one example together. The longest text of an
            example is cut first.
        readout: that of the model.
        context: most tokens that the model takes; lowers the limit where needed.
        where: what to call the examples in the log.

    Raises:
        InputError: for label words that the readout cannot tell apart, a limit that is not a whole
            number of at least 1, a template longer than the context, or a missing mask token.
    """
    readout = readout.for_labels(tokenizer, bare_prompt(template), words)
    before, place, behind = readout.frame(tokenizer)
    fields = template_fields(template)
    limit = check_whole("max_text_tokens", max_text_tokens)
    if context is not None:
        bare = sum(map(len, (before, _ids(tokenizer, bare_prompt(template)), place, behind)))
        if bare >= context:
            raise InputError(
                f"The prompt template takes {bare} tokens, but the model's context has {context}: "
                "shorten the template."
            )
        # Two tokens to spare: joining text and template can shift a token boundary.
        limit = min(limit, context - bare - 2)
        if limit < 1:
            raise InputError(
                f"The prompt template takes {bare} tokens of the model's context of {context}, "
                "which leaves none for the text: shorten the template."
            )
    rows: list[tuple[int, ...]] = []
    truncated = 0
    for example in examples:
        texts = {name: example.fields[name] for name in fields}
        lengths = {name: len(_ids(tokenizer, text)) for name, text in texts.items()}
        limits = _share_out(lengths, Counter(fields), limit)
        if limits != lengths:
            truncated += 1
            texts = {name: _cut(tokenizer, text, limits[name]) for name, text in texts.items()}
        prompt = _ids(tokenizer, template.format(**texts))
        rows.append((*before, *prompt, *place, *behind))
    if truncated:
        _report_truncation(where, truncated, len(examples), limit, limit < max_text_tokens)
    index = {label: i for i, label in enumerate(words)}
    pad = tokenizer.pad_token_id
    return Encoded(
        ids=tuple(e.id for e in examples),
        tokens=tuple(rows),
        gold=tuple(index[e.label] for e in examples),
        readout=readout,
        # Padding is masked everywhere, so any token serves where a tokenizer names none.
        pad_token=int(pad) if pad is not None else 0,
        n_prefix=len(before),
        n_suffix=len(behind),
        n_truncated=truncated,
        groups=tuple(e.group for e in examples),
    )


@lru_cache(maxsize=256)
def _report_truncation(
    where: str, truncated: int, total: int, limit: int, by_context: bool
) -> None:
    # Cached, so that a pool that every stage encodes again is reported once.
    logger.log(
        logging.WARNING if truncated > _MANY_CUT * total else logging.INFO,
        "%s: %d of %d texts were cut to %d tokens, so that what decides their labels may be gone: "
        "%s.",
        where,
        truncated,
        total,
        limit,
        "the model's context has no room for more, whatever max_text_tokens is; shorten the texts"
        if by_context
        else f"raise max_text_tokens={limit} to keep more",
    )


def _share_out(lengths: Mapping[str, int], uses: Mapping[str, int], limit: int) -> dict[str, int]:
    """Lower the largest length until all, as often as they are used, fit into ``limit``."""
    limits = dict(lengths)
    while sum(uses[name] * n for name, n in limits.items()) > limit:
        limits[max(limits, key=lambda name: limits[name])] -= 1
    return limits
