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
_TOPICS = ("business", "entertainment", "health", "politics", "religion", "sports", "technology")


def _open(folder: Path | None) -> HubParquet:
    """MasakhaNEWS (Adelani et al., IJCNLP-AACL 2023, arXiv 2304.09972).

    Not every language has every topic: give ``labels`` with those that yours has.
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
    prompt={
        "template": "{headline} Topic:",
        "labels": {topic: f" {topic}" for topic in _TOPICS},
    },
)
