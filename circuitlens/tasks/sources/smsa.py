"""SmSA: sentiment in Indonesian."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import to_examples
from circuitlens.tasks.reading import read_rows
from circuitlens.tasks.sources.data_set import SENTIMENT, DataSet, needed, open_folder, pick

__all__ = ["DATA_SET", "SmSA"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmSA:
    """SmSA (Purwarianti and Crisdayanti, 2019; IndoNLU): Indonesian sentiment.

    NusaX was made from SmSA, so a model trained on all of it has seen the source of every NusaX
    test sentence: rows named in ``overlap_with_nusax.txt`` are left out.

    Attributes:
        folder: holds ``{train,valid,test}_preprocess.tsv`` as in IndoNLU.
    """

    folder: Path

    @property
    def languages(self) -> Sequence[str]:
        """Indonesian."""
        return ("indonesian",)

    def resolve(self, language: str) -> str:
        """Accept the name and the ISO 639-3 code."""
        return pick(language, {"indonesian": "indonesian", "ind": "indonesian"}, "SmSA")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits without the rows that NusaX repeats."""
        folder = open_folder(self.folder, holds="train_preprocess.tsv")
        overlap: set[tuple[str, int]] = set()
        listing = folder / "overlap_with_nusax.txt"
        if listing.is_file():
            for line in listing.read_text(encoding="utf-8").splitlines():
                if line and not line.startswith("#"):
                    split, row = line.split("\t")
                    overlap.add((split, int(row)))
        splits: dict[str, Sequence[Example]] = {}
        for file, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
            path = folder / f"{file}_preprocess.tsv"
            table = read_rows(path, quoting=False, columns=["text", "label"])
            rows = [
                {**row, "id": f"{file}:{number}"}
                for number, row in enumerate(table, start=1)
                if (file, number) not in overlap
            ]
            splits[name] = to_examples(
                rows,
                fields=["text"],
                label="label",
                id="id",
                group=None,
                split=name,
                where=str(path),
            )
        if overlap:
            logger.info("SmSA: %d rows left out (overlap_with_nusax.txt).", len(overlap))
        return splits


DATA_SET = DataSet(
    name="smsa",
    description="SmSA, sentiment in Indonesian (from a local folder)",
    open=lambda folder: SmSA(needed("SmSA", folder)),
    language="indonesian",
    prompt=SENTIMENT,
)
