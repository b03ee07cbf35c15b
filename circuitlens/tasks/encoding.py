"""From examples to token batches.

A prompt is the template filled with the texts, in the frame of tokens that the model's readout
asks for: after ``<s>`` if the tokenizer puts it there; for a masked language model after
``[CLS]``, and with ``[MASK]``, in whose place the answer belongs, and ``[SEP]`` after it. A model
with a classification head gets the texts alone, as its tokenizer joins them. A text that is too
long is cut at its end, never at the end of the prompt: the question is always asked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuitlens.errors import InputError, check_whole
from circuitlens.models.batch import Answers, Batch, Plan, Readout
from circuitlens.models.features import Features
from circuitlens.models.media import MEDIA
from circuitlens.models.prompt import Prompt, template_fields
from circuitlens.models.readouts.words import tokens_of_words
from circuitlens.models.tokens import text_ids
from circuitlens.tasks.examples import Example
from circuitlens.tasks.media_fields import HasMedia, has_media, joined

__all__ = ["Encoded", "encode"]

logger = logging.getLogger(__name__)

# A few long texts lose little; more than this share of all is worth interrupting a session for.
_MANY_CUT = 0.05


@dataclass(frozen=True)
class Encoded:
    """Encoded examples, in the order given.

    Attributes:
        ids: example ids.
        tokens: prompt tokens of every example, unpadded.
        gold: index of the right label of every example.
        readout: where the answer is read, and what stands for the labels there.
        pad_token: token for padding.
        n_prefix: 1 if prompts begin with ``<s>`` or ``[CLS]``, else 0.
        n_suffix: tokens at the end of prompts that belong to no text (1 for ``[SEP]``).
        n_truncated: how many texts lost their end.
        groups: the group of every example (:class:`Example`); its id where none are given.
        answers: tokens of the possible answers of every example, if it brings its own.
        partners: tokens of the prompt whose activations stand in for those of every example, where
            heads are not measured from means.
        features: of the sounds and images of every example, if it has any, and of its partner.
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
    answers: tuple[Answers, ...] = ()
    partners: tuple[tuple[int, ...], ...] = ()
    features: tuple[Features, ...] = ()
    partner_features: tuple[Features, ...] = ()

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
            answers=self.answers + other.answers,
            partners=self.partners + other.partners,
            features=joined((self.tokens, other.tokens), (self.features, other.features)),
            partner_features=joined(
                (self.partners, other.partners), (self.partner_features, other.partner_features)
            ),
        )

    def take(self, indices: Sequence[int]) -> Encoded:
        """The examples at ``indices``."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in indices),
            tokens=tuple(self.tokens[i] for i in indices),
            gold=tuple(self.gold[i] for i in indices),
            groups=tuple(self.groups[i] for i in indices),
            answers=tuple(self.answers[i] for i in indices) if self.answers else (),
            partners=tuple(self.partners[i] for i in indices) if self.partners else (),
            features=tuple(self.features[i] for i in indices) if self.features else (),
            partner_features=tuple(self.partner_features[i] for i in indices)
            if self.partner_features
            else (),
        )

    def _plan(self, index: int) -> Plan:
        return self.readout.plan(self.answers[index] if self.answers else ())

    @cached_property
    def n_rows(self) -> int:
        """Rows that each example takes in a batch."""
        # Of answers that all examples share, the first plan is that of all.
        each = range(len(self)) if self.answers else range(1)
        return max(len(self._plan(i).continuations) for i in each)

    def batch(self, indices: Sequence[int], device: torch.device | None = None) -> Batch:
        """Pad the examples at ``indices`` to one width and stack them."""
        plans = [self._plan(i) for i in indices]
        rows: list[tuple[int, ...]] = []
        tails: list[int] = []
        for i, plan in zip(indices, plans, strict=True):
            prompt = self.tokens[i]
            end = len(prompt) - self.n_suffix
            # An example with fewer rows than another has its last one again.
            missing = self.n_rows - len(plan.continuations)
            for tokens in (*plan.continuations, *plan.continuations[-1:] * missing):
                rows.append((*prompt[:end], *tokens, *prompt[end:]))
                tails.append(len(tokens))
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            first = 0 if self.readout.pad_right else width - len(tokens)
            ids[row, first : first + len(tokens)] = torch.tensor(tokens)
            mask[row, first : first + len(tokens)] = 1
        values, places = self._features(indices, mask)
        batch = Batch(
            ids,
            mask,
            torch.tensor([self.gold[i] for i in indices]),
            self.readout,
            self.n_prefix,
            self.n_suffix,
            self.n_rows,
            values=values,
            places=places,
        )
        if any(plan.entries for plan in plans):
            most = max(len(plan.entries) for plan in plans)
            reading = torch.full((len(plans), most, 5), -1)
            for number, plan in enumerate(plans):
                reading[number, : len(plan.entries)] = torch.tensor(plan.entries)
            batch = replace(batch, reading=reading, tail=torch.tensor(tails))
        if self.partners:
            # With the same answers behind them, so that they have the same rows.
            other = replace(
                self,
                tokens=self.partners,
                features=self.partner_features,
                partners=(),
                partner_features=(),
            )
            batch = replace(batch, partner=other.batch(indices))
        return batch if device is None else batch.to(device)

    def _features(
        self, indices: Sequence[int], mask: Int[Tensor, "row pos"]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features of sounds and images in the rows of a batch, and where they stand."""
        if not self.features:
            return None, None
        own = [self.features[i] for i in indices for _ in range(self.n_rows)]
        values = own[0].values.new_zeros(*mask.shape, own[0].values.shape[-1])
        places = torch.zeros_like(mask, dtype=torch.bool)
        for row, (features, begin) in enumerate(zip(own, mask.argmax(1).tolist(), strict=True)):
            end = begin + len(features.places)
            # What stands behind the prompt, an answer, is text.
            values[row, begin:end], places[row, begin:end] = features
        return values, places

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


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    """Return the longest beginning of ``text`` that has at most ``limit`` tokens."""
    if tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        encoding = tokenizer(text, return_offsets_mapping=True, **options)
        spans = encoding["offset_mapping"]
        return text if len(spans) <= limit else text[: spans[limit][0]].rstrip()
    ids = text_ids(tokenizer, text)
    return text if len(ids) <= limit else str(tokenizer.decode(ids[:limit]))


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    readout: Readout,
    context: int | None = None,
    n_embeddings: int | None = None,
    where: str = "examples",
    media: HasMedia | None = None,
) -> Encoded:
    """Encode examples as prompts; the log says how many texts were cut, as a warning if many were.

    Args:
        examples: what to encode. The label of one that has none is not looked at.
        tokenizer: of the model.
        prompt: what is asked, and what its answers are. Of an example, the longest text is cut
            first.
        readout: that of the model.
        context: most tokens that the model takes; lowers the limit where needed.
        n_embeddings: tokens that the model knows.
        where: what to call the examples in the log.
        media: the model, which encodes sounds and images.

    Raises:
        InputError: for label words that the readout cannot tell apart, a limit that is not a whole
            number of at least 1, a template longer than the context, a missing mask token, or
            tokens that the model does not know.
    """
    readout = prompt.readout_of(readout, tokenizer)
    frame = readout.frame(tokenizer, prompt.bos)
    fields = template_fields(prompt.template)
    limit = check_whole("max_text_tokens", prompt.max_text_tokens)
    if not readout.prompted:
        _check_pair(fields)
    outer = prompt.outer(tokenizer) if readout.prompted else ("", "")
    seen = [n for n in MEDIA if n in fields and has_media(n, examples, media, where)]
    marks = {name: media.placeholder(name) for name in seen} if media else {}

    def filled(texts: Mapping[str, str]) -> tuple[int, ...]:
        if readout.prompted:
            ids = prompt.text(tokenizer, {**texts, **marks}, outer, frozenset(marks)).ids()
            # A template may begin with the token itself.
            given = tuple(ids[: len(frame.before)]) == frame.before
            return (*(() if given else frame.before), *ids, *frame.place, *frame.behind)
        parts = [text_ids(tokenizer, texts[name]) for name in fields]
        second = () if len(parts) < 2 else (*frame.between, *parts[1])
        return (*frame.before, *parts[0], *second, *frame.behind)

    uses = Counter(name for name in fields if name not in marks)
    longest = max(map(len, readout.plan(()).continuations), default=0)
    if context is not None:
        bare = len(filled(dict.fromkeys(fields, "x"))) + longest
        what = "prompt template" if readout.prompted else "frame of special tokens"
        if bare >= context:
            raise InputError(
                f"The {what} takes {bare} tokens, but the model's context has {context}: "
                "shorten the template."
            )
        # Two tokens to spare: joining text and template can shift a token boundary.
        limit = min(limit, context - bare - 2)
        if limit < 1:
            raise InputError(
                f"The {what} takes {bare} tokens of the model's context of {context}, "
                "which leaves none for the text: shorten the template."
            )
    rows: list[tuple[int, ...]] = []
    answers: list[Answers] = []
    features: list[Features] = []
    truncated = 0
    for example in examples:
        texts = {name: example.fields[name] for name in fields if name not in marks}
        lengths = {name: len(text_ids(tokenizer, text)) for name, text in texts.items()}
        limits = _share_out(lengths, uses, limit)
        if limits != lengths:
            truncated += 1
            texts = {name: _cut(tokenizer, text, limits[name]) for name, text in texts.items()}
        rows.append(filled(texts))
        if media and marks:
            given = {name: example.fields[name] for name in marks}
            rows[-1], own = media.features(rows[-1], given, f"example {example.id} ({where})")
            features.append(own)
            if context is not None and len(rows[-1]) + longest > context:
                raise InputError(
                    f"The prompt of example {example.id} ({where}) takes {len(rows[-1])} tokens "
                    f"with its {' and '.join(marks)}, but the model's context has {context}: "
                    "shorten it, or lower max_text_tokens."
                )
        if prompt.choices:
            asked = prompt.text(tokenizer, {**texts, **marks}, outer, frozenset(marks))
            blank = "" if prompt.chat else " "
            words = {c: f"{blank}{example.fields[c].strip()}" for c in prompt.choices}
            answers.append(tuple(tokens_of_words(asked, words).values()))
    if truncated:
        _report_truncation(where, truncated, len(examples), limit, limit < prompt.max_text_tokens)
    _check_known(rows, answers, n_embeddings, where)
    index = {label: i for i, label in enumerate(prompt.labels)}
    pad = tokenizer.pad_token_id
    return Encoded(
        ids=tuple(e.id for e in examples),
        tokens=tuple(rows),
        gold=tuple(index.get(e.label, 0) for e in examples),
        readout=readout,
        # Padding is masked everywhere, so any token serves where a tokenizer names none.
        pad_token=int(pad) if pad is not None else 0,
        n_prefix=len(frame.before),
        n_suffix=len(frame.behind),
        n_truncated=truncated,
        groups=tuple(e.group for e in examples),
        answers=tuple(answers),
        features=tuple(features),
    )


def _check_pair(fields: Sequence[str]) -> None:
    if len(fields) > 2:
        raise InputError(
            f"A classification head takes one text or a pair, but the template names "
            f"{len(fields)} ({', '.join(fields)}): name one or two (template=…)."
        )


def _check_known(
    rows: Sequence[tuple[int, ...]],
    answers: Sequence[Answers],
    n_embeddings: int | None,
    where: str,
) -> None:
    """Reject tokens that the model has no embedding for, which would be an index error in it."""
    if n_embeddings is None:
        return
    words = (word for example in answers for label in example for word in label)
    largest = max(map(max, chain(rows, words)))
    if largest >= n_embeddings:
        raise InputError(
            f"The tokenizer gives token {largest} ({where}), but the model has embeddings for "
            f"{n_embeddings} tokens: load the tokenizer that belongs to it, or give it more, "
            f"model.resize_token_embeddings({largest + 1}), before cl.load, and train them."
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
        else f"raise max_text_tokens above {limit} to keep more",
    )


def _share_out(lengths: Mapping[str, int], uses: Mapping[str, int], limit: int) -> dict[str, int]:
    """Lower the largest length until all, as often as they are used, fit into ``limit``."""
    limits = dict(lengths)
    while sum(uses[name] * n for name, n in limits.items()) > limit:
        limits[max(limits, key=lambda name: limits[name])] -= 1
    return limits
