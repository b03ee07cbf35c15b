"""What heads do: where they look, and which answers they raise.

1. *Looking*: attention of each head, averaged over examples. Shares go to the first token, to the
   token before, to the token itself, and to earlier copies of the same token; and for every token,
   what one occurrence of it gets from the position where the answer is read, and from all.
2. *Saying*: exact ablation of the head, answer by answer: how much of each label's logit (relative
   to the mean of all labels) goes with it, on the examples of each class.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.circuit import Circuit
from circuitlens.circuits.effects import AblatedSingly, ablated_singly
from circuitlens.errors import InputError
from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import pattern_hook, recording
from circuitlens.nodes import Head
from circuitlens.tasks import Encoded, Task
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_json, whole, write_json

__all__ = ["HeadRole", "HeadRoles", "head_roles"]

_SCHEMA = "circuitlens.roles/1"

# A token that occurs less often says little.
_OCCURRENCES = 5
_SHOWN = 5
# Prompts of which reports show the attention.
_PROMPTS = 6


@dataclass(frozen=True)
class HeadRole:
    """What one head does, averaged over examples.

    Attributes:
        head: which.
        first, previous, itself, copies: mean attention to the first token, to the one before, to
            the token itself, and to earlier copies of it (where there are some).
        looked_at: tokens that get most attention from the decision, and what an occurrence gets.
        read: the same from all positions.
        raises: by class of the example and label, how much the head adds to the label's
            logit, relative to the mean over labels. Classes without example are left out.
        attention: from the decision to every token of the prompts in :attr:`HeadRoles.prompts`;
            empty in results from before these were kept.
    """

    head: Head
    first: float
    previous: float
    itself: float
    copies: float
    looked_at: tuple[tuple[str, float], ...]
    read: tuple[tuple[str, float], ...]
    raises: Mapping[str, Mapping[str, float]]
    attention: tuple[tuple[float, ...], ...] = ()

    @property
    def summary(self) -> str:
        """The role in one sentence."""
        tokens = ", ".join(f"{token!r} {share:.0%}" for token, share in self.looked_at[:3])
        shares = {
            "first token": self.first,
            "token before": self.previous,
            "token itself": self.itself,
        }
        place, share = max(shares.items(), key=lambda item: item[1])
        best = max(
            (
                (gold, label, value)
                for gold, row in self.raises.items()
                for label, value in row.items()
            ),
            key=lambda item: abs(item[2]),
        )
        verb = "raises" if best[2] > 0 else "lowers"
        return (
            f"From the decision it looks at {tokens}; {share:.0%} of its attention goes to the "
            f"{place}. Most of all it {verb} {best[1]!r} on {best[0]!r} examples ({best[2]:+.2f} "
            "logits)."
        )


@dataclass(frozen=True, eq=False, repr=False)
class HeadRoles:
    """What the heads of a circuit do.

    Attributes:
        roles: one for each head.
        n_examples: examples that were looked at.
        provenance: where it comes from.
        prompts: label and tokens of a few of them, which reports show.
    """

    roles: tuple[HeadRole, ...]
    n_examples: int
    provenance: Provenance
    prompts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def of(self, head: Head | str) -> HeadRole:
        """The role of a head.

        Raises:
            InputError: if it was not looked at.
        """
        wanted = Head.parse(head) if isinstance(head, str) else head
        for role in self.roles:
            if role.head == wanted:
                return role
        raise InputError(f"Head {wanted} is none of {', '.join(str(r.head) for r in self.roles)}.")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per head: attention, tokens, and ``raises GOLD → LABEL`` in logits."""
        rows: list[dict[str, Any]] = []
        for role in self.roles:
            row: dict[str, Any] = {
                "head": str(role.head),
                "first": role.first,
                "previous": role.previous,
                "itself": role.itself,
                "copies": role.copies,
                "looked_at": ", ".join(f"{t} {s:.2f}" for t, s in role.looked_at),
                "read": ", ".join(f"{t} {s:.2f}" for t, s in role.read),
            }
            for gold, by_label in role.raises.items():
                row |= {f"{gold} → {label}": value for label, value in by_label.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        content = {
            "roles": [{**asdict(role), "head": str(role.head)} for role in self.roles],
            "n_examples": self.n_examples,
            "provenance": self.provenance.to_dict(),
            "prompts": [[label, list(tokens)] for label, tokens in self.prompts],
        }
        write_json(Path(path), _SCHEMA, content, sealed=True)

    @classmethod
    def load(cls, path: str | Path) -> HeadRoles:
        """Read what :meth:`save` wrote."""
        with whole(path):
            content = read_json(Path(path), _SCHEMA)

            def pairs(found: list[list[Any]]) -> tuple[tuple[str, float], ...]:
                return tuple((str(token), float(share)) for token, share in found)

            roles = [
                HeadRole(
                    **{
                        **role,
                        "head": Head.parse(role["head"]),
                        "looked_at": pairs(role["looked_at"]),
                        "read": pairs(role["read"]),
                        "attention": tuple(map(tuple, role.get("attention", ()))),
                    }
                )
                for role in content["roles"]
            ]
            provenance = Provenance.from_dict(content["provenance"])
            prompts = tuple((label, tuple(tokens)) for label, tokens in content.get("prompts", ()))
            return cls(tuple(roles), content["n_examples"], provenance, prompts)

    def __repr__(self) -> str:
        heads = f"{len(self.roles)} heads, {self.n_examples} examples"
        return f"HeadRoles({self.provenance.task}: {heads})"

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li><b>{role.head}</b> {html.escape(role.summary)}</li>" for role in self.roles
        )
        return f"<p><b>HeadRoles</b> on {html.escape(self.provenance.task)}</p><ul>{items}</ul>"


@torch.no_grad()
def head_roles(
    model: HookedModel,
    task: Task,
    heads: Circuit | Iterable[Head],
    baseline: MeanBaseline,
    *,
    max_examples: int | None = 200,
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> HeadRoles:
    """Look at what heads attend to and which labels they raise (module docstring).

    Args:
        model: the model.
        task: the task that the baseline was taken on.
        heads: a circuit, or any heads.
        baseline: the means that a head is set to.
        max_examples: a random subset of this size of the examples that discovery scores.
        batch_size: examples per forward pass.
        seed: for the subset.
        quiet: no progress bar.

    Raises:
        InputError: if there are no heads, or circuit or baseline are of another model or task.
    """
    ablated = ablated_singly(
        "head_roles",
        model,
        task,
        heads,
        baseline,
        max_examples=max_examples,
        batch_size=batch_size,
        seed=seed,
        quiet=quiet,
    )
    chosen, encoded = ablated.circuit, ablated.encoded
    raised = _raised(ablated)
    looks = _Looks(model, chosen)
    for _, batch in encoded.batches(batch_size, model.device):
        looks.add(batch)
    labels = list(task.labels)
    prompts, attention = _few(model, chosen, encoded, labels)
    roles = []
    for place, head in enumerate(chosen):
        by_gold = {
            gold: dict(zip(labels, raised[place, i].tolist(), strict=True))
            for i, gold in enumerate(labels)
            # Of few examples, a class may have none.
            if i in encoded.gold
        }
        own = tuple(weights[place] for weights in attention)
        roles.append(HeadRole(head, **looks.of(place), raises=by_gold, attention=own))
    return HeadRoles(
        tuple(roles),
        len(encoded),
        baseline.provenance_of(model, task, seed, {"positions": baseline.positions}),
        prompts,
    )


def _few(
    model: HookedModel, circuit: Circuit, encoded: Encoded, labels: Sequence[str]
) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], list[tuple[tuple[float, ...], ...]]]:
    """A few prompts of every label, and the attention of the heads from where they decide."""
    each = max(1, _PROMPTS // len(labels))
    chosen: list[int] = []
    for label in range(len(labels)):
        chosen += [i for i, gold in enumerate(encoded.gold) if gold == label][:each]
    prompts, attention = [], []
    for index in chosen[: max(_PROMPTS, len(labels))]:
        batch = encoded.batch([index], model.device)
        hooks, found = recording(pattern_hook(h.layer) for h in circuit)
        model.label_logits(batch, hooks)
        at = int(batch.mask("decision")[0].nonzero()[-1])
        weights = [found[pattern_hook(h.layer)][0, h.index, at] for h in circuit]
        attention.append(tuple(tuple(row.float().cpu().tolist()) for row in weights))
        tokens = tuple(model.tokens(batch.input_ids[0].tolist()))
        prompts.append((labels[encoded.gold[index]], tokens))
    return tuple(prompts), attention


def _raised(ablated: AblatedSingly) -> Float[Tensor, "head gold label"]:
    lost = ablated.labels[:1] - ablated.labels[1:]
    lost = lost - lost.mean(-1, keepdim=True)
    gold = torch.tensor(ablated.encoded.gold)
    n_labels = lost.shape[-1]
    return torch.stack([lost[:, gold == label].mean(1) for label in range(n_labels)], dim=1)


class _Looks:
    """Running sums of attention."""

    def __init__(self, model: HookedModel, circuit: Circuit) -> None:
        self._model, self._heads = model, circuit.heads
        n, size = len(circuit), max(len(model.tokenizer), model.n_embeddings)
        self._places = torch.zeros(n, 4, dtype=torch.float64)
        self._counts = torch.zeros(4, dtype=torch.float64)
        # From the decision, and from all positions.
        self._got = torch.zeros(2, n, size, dtype=torch.float64)
        self._seen = torch.zeros(2, size, dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Run a batch and add what its heads look at."""
        layers = sorted({head.layer for head in self._heads})
        hooks, found = recording(pattern_hook(layer) for layer in layers)
        self._model.label_logits(batch, hooks)
        patterns = torch.stack([found[pattern_hook(h.layer)][:, h.index] for h in self._heads], 1)
        patterns = patterns.double().cpu()
        ids, real = batch.input_ids.cpu(), batch.attention_mask.cpu().bool()
        decisions = batch.mask("decision").cpu()
        columns = torch.arange(ids.shape[1])
        for row in range(len(ids)):
            at = columns[real[row]]
            pattern, own = patterns[row][:, at][:, :, at], ids[row, at]
            n = len(own)
            same = (own[:, None] == own) & (torch.arange(n)[:, None] > torch.arange(n))
            diagonal = torch.eye(n, dtype=torch.bool)
            before = torch.diag(torch.ones(n - 1, dtype=torch.bool), -1) if n > 1 else ~diagonal
            first = torch.zeros(n, n, dtype=torch.bool)
            first[1:, 0] = True
            for place, mask in enumerate((first, before, diagonal, same)):
                self._places[:, place] += (pattern * mask).sum((1, 2))
                self._counts[place] += mask.any(1).sum()
            decision = decisions[row, at]
            for place, queries in enumerate((decision, torch.ones(n, dtype=torch.bool))):
                got = pattern[:, queries].sum(1)
                reach = (pattern[:, queries] > 0).any(0).sum(0).double()
                self._got[place].index_add_(1, own, got)
                self._seen[place].index_add_(0, own, reach)

    def of(self, place: int) -> dict[str, Any]:
        """Fields of a :class:`HeadRole`."""
        shares = (self._places[place] / self._counts.clamp(min=1)).tolist()
        names = ("first", "previous", "itself", "copies")
        found: dict[str, Any] = dict(zip(names, shares, strict=True))
        for number, name in enumerate(("looked_at", "read")):
            often = self._seen[number] >= _OCCURRENCES
            mean = torch.where(
                often, self._got[number, place] / self._seen[number].clamp(min=1), 0.0
            )
            best = mean.argsort(descending=True)[:_SHOWN].tolist()
            texts = self._model.tokens(best)
            found[name] = tuple(
                (text, float(mean[i])) for i, text in zip(best, texts, strict=True) if mean[i] > 0
            )
        return found
