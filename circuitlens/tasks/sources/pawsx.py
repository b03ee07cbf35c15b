"""PAWS-X: whether two sentences say the same, in 7 parallel languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from circuitlens.tasks.examples import Example
from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet, Rows

__all__ = ["DATA_SET", "PawsX"]

_NAMES = {
    "chinese": "zh",
    "english": "en",
    "french": "fr",
    "german": "de",
    "japanese": "ja",
    "korean": "ko",
    "spanish": "es",
}


def _prepare(rows: Rows, split: str) -> Iterator[Mapping[str, Any]]:
    # Ids restart in every split. Pairs that the translators left empty say NS, and the labels
    # of some are unknown.
    for row in rows:
        texts = (row["sentence1"], row["sentence2"])
        if all(texts) and "NS" not in texts and row["label"] is not None:
            yield {**row, "id": f"{split}:{row['id']}"}


@dataclass(frozen=True)
class PawsX:
    """PAWS-X (Yang et al., EMNLP 2019, arXiv 1908.11828).

    Pairs that share a sentence, directly or through other pairs, are one group. The English
    sentences decide, where there are any: translators render a sentence in several ways, and a
    pair and its translations belong on the same side.

    Attributes:
        folder: ``<configuration>/{train,validation,test}*.parquet`` as on the hub; ``None`` reads
            ``google-research-datasets/paws-x`` from there.
    """

    folder: Path | None = None

    @property
    def _files(self) -> HubParquet:
        return HubParquet(
            "PAWS-X",
            "google-research-datasets/paws-x",
            _NAMES,
            ("sentence1", "sentence2"),
            folder=self.folder,
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
        """Read the three splits."""
        found = self._files.splits(language)
        english = self.folder is None or (self.folder / _NAMES["english"]).is_dir()
        origin = found
        if english and language != "english":
            origin = self._files.splits("english")
        groups = _groups([e for examples in origin.values() for e in examples])
        return {
            name: [replace(e, group=groups.get(e.id, e.id)) for e in examples]
            for name, examples in found.items()
        }


def _groups(pairs: Sequence[Example]) -> dict[str, str]:
    """Group of every pair by id: the first pair that it is connected with by sentences."""
    numbers: dict[str, int] = {}
    ends = [[numbers.setdefault(text, len(numbers)) for text in e.fields.values()] for e in pairs]
    one, other = zip(*ends, strict=True) if ends else ((), ())
    edges = coo_matrix((np.ones(len(ends)), (one, other)), shape=(len(numbers),) * 2)
    _, part = connected_components(edges, directed=False)
    first: dict[int, str] = {}
    return {e.id: first.setdefault(int(part[n]), e.id) for e, n in zip(pairs, one, strict=True)}


DATA_SET = DataSet(
    name="pawsx",
    description="PAWS-X, paraphrases in 7 languages",
    open=PawsX,
    language="english",
    prompt={
        "template": "{sentence1} Question: {sentence2} True or False? Answer:",
        "labels": {"1": " True", "0": " False"},
    },
)
