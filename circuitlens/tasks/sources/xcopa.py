"""XCOPA: which of two sentences is the cause or the effect, in 11 parallel languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.tasks.examples import Example
from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet, Rows, parts

__all__ = ["DATA_SET", "Xcopa"]

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
    for row in rows:
        yield {
            **row,
            "id": f"{split}:{row['idx']}",
            "premise": str(row["premise"]).strip().rstrip("."),
            "connective": _CONNECTIVES.get(str(row["question"]), str(row["question"])),
            "answer": _CHOICES[int(row["label"])],
        }


@dataclass(frozen=True)
class Xcopa:
    """XCOPA (Ponti et al., EMNLP 2020, arXiv 2005.00333): every example brings its answers.

    There is no train split: the validation split is divided.

    Attributes:
        folder: ``<configuration>/{validation,test}*.parquet`` as on the hub; ``None`` reads
            ``cambridgeltl/xcopa`` from there.
    """

    folder: Path | None = None

    @property
    def _files(self) -> HubParquet:
        return HubParquet(
            "XCOPA",
            "cambridgeltl/xcopa",
            _NAMES,
            ("premise", "connective", *_CHOICES),
            label="answer",
            folder=self.folder,
            splits_of=(("validation", "validation"), ("test", "test")),
            prepare=_prepare,
            id="id",
        )

    @property
    def languages(self) -> Sequence[str]:
        """Names of the languages."""
        return self._files.languages

    def resolve(self, language: str) -> str:
        """Accept names and codes."""
        return self._files.resolve(language)

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read both splits, and divide the first."""
        found = self._files.splits(language)
        return {**parts(found["validation"]), "test": found["test"]}


DATA_SET = DataSet(
    name="xcopa",
    description="XCOPA, causes and effects by choice in 11 languages",
    open=Xcopa,
    language="indonesian",
    prompt={
        "template": "{premise} {connective}",
        "labels": {"choice1": " first", "choice2": " second"},
        "choices": _CHOICES,
    },
)
