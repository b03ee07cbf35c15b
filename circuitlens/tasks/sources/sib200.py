"""SIB-200: the topic of a sentence, in 205 parallel languages and scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, to_examples
from circuitlens.tasks.reading import read_rows
from circuitlens.tasks.sources.data_set import (
    DataSet,
    from_hub,
    open_folder,
    pick,
    refuse_foreign,
)

__all__ = ["DATA_SET", "Sib200"]

_LAYOUT = "<FLORES code>/train.tsv, dev.tsv and test.tsv, such as eng_Latn/train.tsv"
# Languages that people ask for by name; all others by their FLORES codes.
_NAMES = {
    "acehnese": "ace_Latn",
    "amharic": "amh_Ethi",
    "arabic": "arb_Arab",
    "aymara": "ayr_Latn",
    "balinese": "ban_Latn",
    "banjarese": "bjn_Latn",
    "buginese": "bug_Latn",
    "chinese": "zho_Hans",
    "english": "eng_Latn",
    "guarani": "grn_Latn",
    "hausa": "hau_Latn",
    "igbo": "ibo_Latn",
    "indonesian": "ind_Latn",
    "javanese": "jav_Latn",
    "malay": "zsm_Latn",
    "minangkabau": "min_Latn",
    "quechua": "quy_Latn",
    "spanish": "spa_Latn",
    "sundanese": "sun_Latn",
    "swahili": "swh_Latn",
    "tagalog": "tgl_Latn",
    "thai": "tha_Thai",
    "urdu": "urd_Arab",
    "yoruba": "yor_Latn",
}


@dataclass(frozen=True)
class Sib200:
    """SIB-200 (Adelani et al., EACL 2024, arXiv 2309.07445): seven topics.

    Attributes:
        folder: ``<FLORES code>/{train,dev,test}.tsv`` as in the data set's repository; ``None``
            reads ``Davlan/sib200`` from the hub.
    """

    folder: Path | None = None

    @property
    def languages(self) -> Sequence[str]:
        """FLORES codes: those of the folder, or on the hub those that have a name here."""
        if self.folder is None:
            return sorted(_NAMES.values())
        folder = open_folder(self.folder, holds=_LAYOUT)
        return sorted(path.parent.name for path in folder.glob("*_*/train.tsv"))

    def resolve(self, language: str) -> str:
        """Accept FLORES codes, names, and codes without a script.

        Of several scripts, such a code means the one that has a name here, such as ``min_Latn``
        for ``min``.

        Raises:
            InputError: for an unknown language, or a code of several scripts of which none has a
                name; they are listed.
        """
        have = self.languages
        if self.folder is not None:
            refuse_foreign(have, self.folder, "SIB-200", _LAYOUT)
        elif re.fullmatch(r"[a-z]{3}_[a-z]{4}", language.strip().lower()):
            # The hub has more languages than have a name here, and knows their codes as written.
            code, script = language.strip().lower().split("_")
            return f"{code}_{script.title()}"
        bare: dict[str, list[str]] = {}
        for code in have:
            bare.setdefault(code.split("_")[0], []).append(code)
        named = {name: code for name, code in _NAMES.items() if code in have}
        usual = {code.split("_")[0]: code for code in named.values()}
        asked = language.strip().lower()
        if len(scripts := bare.get(asked, [])) > 1 and asked not in usual:
            raise InputError(
                f"SIB-200 has {asked} in several scripts: say which, {' or '.join(scripts)}."
            )
        known = {short: codes[0] for short, codes in bare.items()} | usual | named
        return pick(language, known | {code.lower(): code for code in have}, "SIB-200")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits; an id is the same sentence in every language."""
        names = {"train": "train", "validation": "dev", "test": "test"}
        if self.folder is None:
            hub = dataset_records(from_hub("Davlan/sib200", language), "category")
            rows = {name: hub[name] for name in names}
        else:
            place = self.folder / language
            rows = {
                name: read_rows(place / f"{file}.tsv", quoting=False)
                for name, file in names.items()
            }
        return {
            name: to_examples(
                rows[name],
                fields=["text"],
                label="category",
                id="index_id",
                group=None,
                split=name,
                where=f"SIB-200 {language} {name}",
            )
            for name in names
        }


DATA_SET = DataSet(
    name="sib200",
    description="SIB-200, topics in 205 languages",
    open=Sib200,
    language="eng_Latn",
    prompt={
        "template": "{text} Topic:",
        "labels": {
            "science/technology": " science",
            "travel": " travel",
            "politics": " politics",
            "sports": " sports",
            "health": " health",
            "entertainment": " entertainment",
            "geography": " geography",
        },
    },
)
