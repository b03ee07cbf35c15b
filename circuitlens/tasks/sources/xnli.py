"""XNLI: inference in 15 parallel languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, to_examples
from circuitlens.tasks.sources.data_set import INFERENCE, DataSet, from_hub, parquet_folder, pick

__all__ = ["DATA_SET", "Xnli"]

_XNLI_LANGUAGES = [
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
]


@dataclass(frozen=True)
class Xnli:
    """XNLI (Conneau et al., EMNLP 2018), one configuration per language.

    Attributes:
        folder: ``<language>/{train,validation,test}*.parquet`` as on the hub; ``None`` reads
            ``facebook/xnli`` from there.
    """

    folder: Path | None = None

    @property
    def languages(self) -> Sequence[str]:
        """ISO 639-1 codes."""
        return _XNLI_LANGUAGES

    def resolve(self, language: str) -> str:
        """Accept the codes."""
        return pick(language, _XNLI_LANGUAGES, "XNLI")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits."""
        if self.folder is None:
            hub = from_hub("facebook/xnli", language)
        else:
            hub = parquet_folder(self.folder / language)
        splits: dict[str, Sequence[Example]] = {}
        for name, rows in dataset_records(hub, "label").items():
            # Rows are the same in all languages, three to a premise where they are evaluated. By
            # number and not by text: a translation may give two premises one wording, and then
            # a pair and its translation would be in different groups.
            numbered: Iterable[dict[str, Any]] = (
                {**row, "id": f"{name}:{n}", "premise_id": f"{name}:{n // 3}"}
                for n, row in enumerate(rows)
            )
            splits[name] = to_examples(
                numbered,
                fields=["premise", "hypothesis"],
                label="label",
                id="id",
                group="premise_id",
                split=name,
                where=f"XNLI {language} {name}",
            )
        return splits


DATA_SET = DataSet(
    name="xnli",
    description="XNLI, inference in 15 languages",
    open=Xnli,
    language="en",
    prompt=INFERENCE,
)
