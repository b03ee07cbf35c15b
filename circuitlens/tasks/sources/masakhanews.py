"""MasakhaNEWS: topics of news in 16 languages spoken in Africa."""

from __future__ import annotations

from pathlib import Path

from circuitlens.tasks.sources.data_set import CONVERTED, DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet

__all__ = ["DATA_SET"]

_NAMES = {
    "amharic": "amh",
    "english": "eng",
    "french": "fra",
    "hausa": "hau",
    "igbo": "ibo",
    "kirundi": "run",
    "lingala": "lin",
    "luganda": "lug",
    "nigerian_pidgin": "pcm",
    "oromo": "orm",
    "shona": "sna",
    "somali": "som",
    "swahili": "swa",
    "tigrinya": "tir",
    "xhosa": "xho",
    "yoruba": "yor",
}
# Topics that a language has besides these three; a task has no class without examples.
_EVERYWHERE = ("health", "politics", "sports")
_TOPICS = {
    "amharic": ("business",),
    "english": ("business", "entertainment", "technology"),
    "french": ("business", "technology"),
    "hausa": ("business", "entertainment", "religion", "technology"),
    "igbo": ("business", "entertainment", "religion"),
    "kirundi": ("business", "entertainment", "religion"),
    "lingala": ("business",),
    "luganda": ("business", "religion"),
    "nigerian_pidgin": ("business", "entertainment"),
    "oromo": ("entertainment", "technology"),
    "shona": ("business",),
    "somali": ("business", "entertainment", "religion", "technology"),
    "swahili": ("business", "entertainment", "religion", "technology"),
    "tigrinya": ("business", "entertainment", "technology"),
    "xhosa": ("business", "entertainment"),
    "yoruba": ("entertainment", "religion"),
}


def _open(folder: Path | None) -> HubParquet:
    """MasakhaNEWS (Adelani et al., IJCNLP-AACL 2023, arXiv 2304.09972).

    Languages differ in their topics, and :meth:`Task.to` finds only those that have the same:
    amharic, lingala and shona; english and tigrinya; hausa, somali and swahili; igbo and kirundi;
    nigerian_pidgin and xhosa.
    """
    return HubParquet(
        "MasakhaNEWS",
        "masakhane/masakhanews",
        _NAMES,
        ("headline",),
        folder=folder,
        revision=CONVERTED,
        parallel=False,
    )


DATA_SET = DataSet(
    name="masakhanews",
    description="MasakhaNEWS, topics of news in 16 languages spoken in Africa",
    open=_open,
    language="english",
    prompt={"template": "{headline} Topic:"},
    prompts={
        language: {"labels": {topic: f" {topic}" for topic in sorted((*_EVERYWHERE, *more))}}
        for language, more in _TOPICS.items()
    },
)
