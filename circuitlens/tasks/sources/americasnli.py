"""AmericasNLI: inference in 10 parallel languages of the Americas."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import to_examples
from circuitlens.tasks.reading import read_rows
from circuitlens.tasks.sources.data_set import (
    INFERENCE,
    DataSet,
    needed,
    open_folder,
    pick,
    refuse_foreign,
)

__all__ = ["DATA_SET", "AmericasNLI"]

logger = logging.getLogger(__name__)

_AMERICAS_CODES = {
    "aym": "aymara",
    "bzd": "bribri",
    "cni": "ashaninka",
    "gn": "guarani",
    "hch": "wixarika",
    "nah": "nahuatl",
    "oto": "otomi",
    "quy": "quechua",
    "shp": "shipibo_konibo",
    "tar": "raramuri",
}


_AMERICAS_LAYOUT = "dev/<code>.tsv and test/<code>.tsv, such as dev/quy.tsv"


@dataclass(frozen=True)
class AmericasNLI:
    """AmericasNLI (Ebrahimi et al., ACL 2022): inference in 10 parallel languages.

    There is no train split: the dev split is divided into pools A and B and validation. Three
    hypotheses share a premise, and pools never split them.

    Attributes:
        folder: ``{dev,test}/<code>.tsv`` as in the data set's repository.
    """

    folder: Path

    @property
    def languages(self) -> Sequence[str]:
        """Codes of the languages that the folder holds."""
        folder = open_folder(self.folder, holds=_AMERICAS_LAYOUT)
        return [c for c in _AMERICAS_CODES if (folder / "dev" / f"{c}.tsv").is_file()]

    def resolve(self, language: str) -> str:
        """Accept the codes of the data set and names."""
        have = self.languages
        refuse_foreign(have, self.folder, "AmericasNLI", _AMERICAS_LAYOUT)
        known = {code: code for code in have}
        known |= {name: code for code, name in _AMERICAS_CODES.items() if code in have}
        return pick(language, known, "AmericasNLI")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read dev and test; dev is divided by premise."""
        dev, test = (self._read(split, language) for split in ("dev", "test"))
        # The validation split may not depend on the pools' seed: choices are made on it.
        validation = [e for e in dev if int(e.group.removeprefix("premise-")) % 5 == 0]
        taken = {e.id for e in validation}
        return {
            "train": [e for e in dev if e.id not in taken],
            "validation": validation,
            "test": test,
        }

    def _read(self, split: str, language: str) -> list[Example]:
        path = Path(self.folder) / split / f"{language}.tsv"
        rows: list[dict[str, Any]] = []
        blank = 0
        for row in read_rows(path, quoting=False):
            if not str(row["premise"]).strip() or not str(row["hypothesis"]).strip():
                blank += 1
                continue
            # Ids are the row numbers of XNLI's files, in which every premise has three rows.
            rows.append({**row, "premise_id": f"premise-{(int(row['id']) - 1) // 3}"})
        if blank:
            logger.info("AmericasNLI %s: %d rows without premise left out.", language, blank)
        return to_examples(
            rows,
            fields=["premise", "hypothesis"],
            label="label",
            id="id",
            group="premise_id",
            split=split,
            where=str(path),
        )


DATA_SET = DataSet(
    name="americasnli",
    description="AmericasNLI, inference in 10 languages of the Americas (from a local folder)",
    open=lambda folder: AmericasNLI(needed("AmericasNLI", folder)),
    language="quy",
    prompt=INFERENCE,
)
