"""PAWS-X: whether two sentences say the same, in 7 parallel languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet, Rows

__all__ = ["DATA_SET"]

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
    # Ids begin again in every split. Pairs that the translators left empty say NS. Pairs with one
    # first sentence belong together.
    first: dict[str, str] = {}
    for row in rows:
        if row["sentence1"] and row["sentence2"] and row["sentence1"] != "NS":
            name = f"{split}:{row['id']}"
            yield {**row, "id": name, "group": first.setdefault(row["sentence1"], name)}


def _open(folder: Path | None) -> HubParquet:
    """PAWS-X (Yang et al., EMNLP 2019, arXiv 1908.11828)."""
    return HubParquet(
        "PAWS-X",
        "google-research-datasets/paws-x",
        _NAMES,
        ("sentence1", "sentence2"),
        folder=folder,
        prepare=_prepare,
        id="id",
        group="group",
    )


DATA_SET = DataSet(
    name="pawsx",
    description="PAWS-X, paraphrases in 7 languages",
    open=_open,
    language="english",
    prompt={
        "template": "{sentence1} Question: {sentence2} True or False? Answer:",
        "labels": {"1": " True", "0": " False"},
    },
)
