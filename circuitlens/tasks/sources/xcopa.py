"""XCOPA: which of two sentences is the cause or the effect, in 11 parallel languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet, Rows

__all__ = ["DATA_SET"]

_NAMES = {
    "chinese": "zh",
    "estonian": "et",
    "haitian": "ht",
    "indonesian": "id",
    "italian": "it",
    "quechua": "qu",
    "swahili": "sw",
    "tamil": "ta",
    "thai": "th",
    "turkish": "tr",
    "vietnamese": "vi",
}
_CHOICES = ("choice1", "choice2")
# What asks for the cause and for the effect; the answers are in the data set's language.
_CONNECTIVES = {"cause": "because", "effect": "so"}


def _prepare(rows: Rows, split: str) -> Iterator[Mapping[str, Any]]:
    # A label that is withheld names no choice, which the reader of the rows rejects.
    answers = dict(enumerate(_CHOICES))
    for row in rows:
        yield {
            **row,
            "id": f"{split}:{row['idx']}",
            "premise": str(row["premise"]).strip().rstrip(".。"),
            "connective": _CONNECTIVES.get(str(row["question"]), str(row["question"])),
            "answer": answers.get(int(row["label"]), ""),
        }


def _open(folder: Path | None) -> HubParquet:
    """XCOPA (Ponti et al., EMNLP 2020, arXiv 2005.00333): every example brings its answers.

    There is no train split: the validation split is divided.
    """
    return HubParquet(
        "XCOPA",
        "cambridgeltl/xcopa",
        _NAMES,
        ("premise", "connective", *_CHOICES),
        label="answer",
        folder=folder,
        divide=True,
        prepare=_prepare,
        id="id",
    )


DATA_SET = DataSet(
    name="xcopa",
    description="XCOPA, causes and effects by choice in 11 languages",
    open=_open,
    language="indonesian",
    prompt={
        "template": "{premise} {connective}",
        "labels": {"choice1": " first", "choice2": " second"},
        "choices": _CHOICES,
    },
)
