"""The sequence readout: the score of a label is the log-probability of its whole word.

1. The tokens of a word follow the prompt, all but the last one; every token is read at the column
   before it. A row can hold several words: a word whose beginning is another's needs no row of its
   own, and words of one token need none besides the prompt.
2. The score is Σ log p over the word's tokens, or their mean (``mean=True``). A label with several
   words gets the log of the sum of their probabilities.
3. In masked language models a word of k tokens is read in the places of k masks, in one pass.

For words of one token the normaliser is the same for every label and cancels in the margin, which
is then that of the token readout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.models.batch import (
    Answers,
    Batch,
    Frame,
    Plan,
    Readout,
    Views,
    Words,
    at_least_float32,
)
from circuitlens.models.hooks import Hook
from circuitlens.models.readouts.columns import last_columns
from circuitlens.models.readouts.vocabulary import VocabularyReadout, ends_of, rows_of_head
from circuitlens.models.tokens import PromptText, begin

__all__ = ["SequenceReadout"]


@dataclass(frozen=True)
class SequenceReadout(VocabularyReadout):
    """Log-probabilities of whole answers.

    Attributes:
        words: tokens of the words of every label; empty if every example brings its own.
        n_choices: number of answers among which every example chooses, if it brings its own.
        mask: the mask token, in a masked language model.
        mean: divide the score of a word by its number of tokens.
    """

    words: Answers = ()
    n_choices: int = 0
    mask: int | None = None
    mean: bool = False

    name = "sequence"

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.words) or self.n_choices

    @property
    def is_masked(self) -> bool:
        """Whether the model answers at its mask."""
        return self.mask is not None

    # -- prompts -------------------------------------------------------------------------------

    def for_labels(
        self, prompt: PromptText, words: Mapping[str, Words], kind: str = "auto"
    ) -> Readout:
        """A model knows no labels, so this readout is never the one that is asked."""
        raise NotImplementedError

    def for_choices(
        self, tokenizer: PreTrainedTokenizerBase, n_choices: int, mean: bool = False
    ) -> Readout:
        """As :meth:`for_labels`."""
        raise NotImplementedError

    def frame(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Frame:
        """As that of the token readout, but without a mask, of which each row has its own."""
        if self.mask is None:
            return Frame(begin(tokenizer, bos), (), ())
        before, behind = ends_of(tokenizer)
        return Frame(before, (), behind)

    def plan(self, answers: Answers) -> Plan:
        """Lay words out in as few rows as hold all of them."""
        return _plan(self.words or answers, self.mask)

    def where(self, batch: Batch) -> Bool[Tensor, "row pos"]:
        """The columns at which a token of an answer is read."""
        found = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        if batch.reading is None:
            return found
        row, column, kept = _places(batch)
        found[row[kept], column[kept]] = True
        return found

    # -- scores --------------------------------------------------------------------------------

    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """The scores of the labels."""
        return self.label_logits(model, batch, hooks)

    def label_logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """Scores of the labels, from the hooked view."""
        width = self._width(batch)
        with last_columns(model, model.bridge.unembed, width, batch.n_suffix) as arguments:
            return self._scores(model.run(batch, hooks, **arguments), batch, width)

    def hf_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """The scores of the labels, from the Hugging Face view."""
        return self.hf_label_logits(model, batch, module)

    def hf_label_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """Scores of the labels, from the Hugging Face view."""
        width, head = self._width(batch), model.hf.get_output_embeddings()
        with last_columns(model, head, width, batch.n_suffix) as arguments:
            return self._scores(model.run_hf(batch, module, **arguments).logits, batch, width)

    def of_labels(self, logits: Float[Tensor, "*batch label"]) -> Float[Tensor, "*batch label"]:
        """The scores themselves."""
        return at_least_float32(logits)

    def _width(self, batch: Batch) -> int:
        """Columns before the suffix from the first on that is read."""
        assert batch.reading is not None
        return -int(batch.reading[..., 1].min())

    def _scores(self, logits: Tensor, batch: Batch, width: int) -> Float[Tensor, "batch label"]:
        """Scores from the logits of the last ``width`` columns before the suffix."""
        assert batch.reading is not None
        row, column, kept = _places(batch)
        column = column - (batch.input_ids.shape[1] - batch.n_suffix - width)
        at = at_least_float32(logits[row, column.clamp(min=0)])
        token, label, word = batch.reading[..., 2:].unbind(-1)
        log_p = at.gather(-1, token.clamp(min=0)[..., None])[..., 0] - at.logsumexp(-1)
        n_words = max(map(len, self.words), default=1)
        place = torch.where(kept, label * n_words + word, 0)
        shape = (len(batch), self.n_labels * n_words)
        scores = log_p.new_zeros(shape).scatter_add(1, place, torch.where(kept, log_p, 0.0))
        counts = torch.zeros(shape, device=place.device).scatter_add(1, place, kept.float())
        if self.mean:
            scores = scores / counts.clamp(min=1)
        if n_words == 1:
            return scores
        scores = scores.masked_fill(counts == 0, -torch.inf)
        several: Tensor = scores.unflatten(1, (self.n_labels, n_words)).logsumexp(-1)
        return several

    # -- training ------------------------------------------------------------------------------

    def losses(self, model: Views, batch: Batch, module: nn.Module) -> Float[Tensor, " batch"]:
        """Minus the log-probability of the right answer; no other answer is run."""
        scores = self.hf_label_logits(model, _of_gold(batch), module)
        return -scores.float().gather(1, batch.gold[:, None])[:, 0]

    def head_masks(self, hf: PreTrainedModel) -> dict[str, Bool[Tensor, "..."]]:
        """The unembedding's rows of all tokens of the words; of free answers, all rows."""
        tokens = {token for label in self.words for word in label for token in word}
        return rows_of_head(hf, tokens or None)

    # -- the head ------------------------------------------------------------------------------

    def uncapped(self, model: Views) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """None: a cap on logits, like their normaliser, goes by its gradient here."""
        return None


@lru_cache(maxsize=65536)
def _plan(answers: Answers, mask: int | None) -> Plan:
    words = [word for label in answers for word in label]
    if mask is None:
        heads = {word[:-1] for word in words}
        rows = sorted(
            h for h in heads if not any(o[: len(h)] == h and len(o) > len(h) for o in heads)
        )
    else:
        rows = [(mask,) * length for length in sorted({len(word) for word in words})]
    entries: list[tuple[int, int, int, int, int]] = []
    for label, alternatives in enumerate(answers):
        for number, word in enumerate(alternatives):
            if mask is None:
                row = next(r for r, c in enumerate(rows) if c[: len(word) - 1] == word[:-1])
                first = -1 - len(rows[row])
            else:
                row = next(r for r, c in enumerate(rows) if len(c) == len(word))
                first = -len(word)
            entries += [(row, first + t, token, label, number) for t, token in enumerate(word)]
    return Plan(tuple(rows), tuple(entries))


def _places(
    batch: Batch,
) -> tuple[Int[Tensor, "batch entry"], Int[Tensor, "batch entry"], Bool[Tensor, "batch entry"]]:
    """Row and column of every entry in the batch, and which entries are any."""
    assert batch.reading is not None
    row, column, label = (batch.reading[..., n] for n in (0, 1, 3))
    first = torch.arange(len(batch), device=row.device)[:, None] * batch.n_rows
    width = batch.input_ids.shape[1] - batch.n_suffix
    return first + row, width + column, label >= 0


def _of_gold(batch: Batch) -> Batch:
    """The rows and entries of the right answers only."""
    assert batch.reading is not None
    assert batch.tail is not None
    device = batch.gold.device
    entries: list[Tensor] = []
    rows: list[list[int]] = []
    for reading, gold in zip(batch.reading, batch.gold.tolist(), strict=True):
        own = reading[reading[:, 3] == gold].clone()
        used = own[:, 0].unique()
        own[:, 0] = torch.searchsorted(used, own[:, 0].contiguous())
        entries.append(own)
        rows.append(used.tolist())
    n_rows = max(map(len, rows))
    # An example with fewer rows than another runs one of them twice, of which nothing is read.
    index = torch.tensor(
        [
            n * batch.n_rows + r
            for n, used in enumerate(rows)
            for r in used + used[-1:] * (n_rows - len(used))
        ],
        device=device,
    )
    found = replace(
        batch,
        input_ids=batch.input_ids[index],
        attention_mask=batch.attention_mask[index],
        values=None if batch.values is None else batch.values[index],
        places=None if batch.places is None else batch.places[index],
        n_rows=n_rows,
        reading=pad_sequence(entries, batch_first=True, padding_value=-1),
        tail=batch.tail[index],
        partner=None,
    )
    # Columns that are padding now go.
    return found.without_columns(int(found.attention_mask.argmax(-1).min()))
