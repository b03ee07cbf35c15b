"""NusaX-Senti: sentiment in 12 parallel languages of Indonesia."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, to_examples
from circuitlens.tasks.reading import read_rows
from circuitlens.tasks.sources.data_set import (
    CONVERTED,
    SENTIMENT,
    DataSet,
    from_hub,
    open_folder,
    pick,
    refuse_foreign,
)

__all__ = ["DATA_SET", "NusaX"]

logger = logging.getLogger(__name__)

_NUSAX_CODES = {
    "ace": "acehnese",
    "ban": "balinese",
    "bjn": "banjarese",
    "bug": "buginese",
    "eng": "english",
    "ind": "indonesian",
    "jav": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "sun": "sundanese",
    "bbc": "toba_batak",
}


_NUSAX_LAYOUT = "<language>/train.csv, valid.csv and test.csv, such as indonesian/train.csv"


@dataclass(frozen=True)
class NusaX:
    """NusaX-Senti (Winata et al., EACL 2023): sentiment in 12 parallel languages.

    Attributes:
        folder: ``<language>/{train,valid,test}.csv`` as in the data set's repository; ``None``
            reads ``indonlp/NusaX-senti`` from the hub.
    """

    folder: Path | None = None

    @property
    def languages(self) -> Sequence[str]:
        """The languages that the folder holds."""
        names = sorted(_NUSAX_CODES.values())
        if self.folder is None:
            return names
        folder = open_folder(self.folder, holds=_NUSAX_LAYOUT)
        return [name for name in names if (folder / name).is_dir()]

    def resolve(self, language: str) -> str:
        """Accept names and ISO 639-3 codes."""
        have = self.languages
        if self.folder is not None:
            refuse_foreign(have, self.folder, "NusaX", _NUSAX_LAYOUT)
        known = {name: name for name in have}
        known |= {code: name for code, name in _NUSAX_CODES.items() if name in have}
        return pick(language, known, "NusaX")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits; rows named in ``known_issues.tsv`` are left out."""
        options: dict[str, Any] = {"fields": ["text"], "label": "label", "id": "id", "group": None}
        if self.folder is None:
            code = next(c for c, name in _NUSAX_CODES.items() if name == language)
            hub = from_hub("indonlp/NusaX-senti", code, revision=CONVERTED)
            return {
                name: to_examples(rows, split=name, where=f"NusaX {language} {name}", **options)
                for name, rows in dataset_records(hub, "label").items()
            }
        faulty = self._faulty(language)
        splits: dict[str, Sequence[Example]] = {}
        left_out = 0
        for file, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
            path = self.folder / language / f"{file}.csv"
            rows = read_rows(path)
            found = to_examples(rows, split=name, where=str(path), **options)
            splits[name] = [e for e in found if (file, e.id) not in faulty]
            left_out += len(found) - len(splits[name])
        if left_out:
            logger.info(
                "NusaX %s: %d rows with known faults left out (known_issues.tsv).",
                language,
                left_out,
            )
        return splits

    def _faulty(self, language: str) -> set[tuple[str, str]]:
        path = Path(self.folder or "") / "known_issues.tsv"
        if not path.is_file():
            return set()
        rows = read_rows(path, quoting=False)
        return {(row["split"], row["id"]) for row in rows if row["language"] == language}


DATA_SET = DataSet(
    name="nusax",
    description="NusaX-Senti, sentiment in 12 languages of Indonesia",
    open=NusaX,
    language="indonesian",
    prompt=SENTIMENT,
)
