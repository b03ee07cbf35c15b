"""AfriSenti: sentiment of tweets in 14 African languages."""

from __future__ import annotations

from pathlib import Path

from circuitlens.tasks.sources.data_set import CONVERTED, DataSet
from circuitlens.tasks.sources.hub_parquet import HubParquet

__all__ = ["DATA_SET"]

_NAMES = {
    "algerian_arabic": "arq",
    "amharic": "amh",
    "hausa": "hau",
    "igbo": "ibo",
    "kinyarwanda": "kin",
    "moroccan_arabic": "ary",
    "mozambican_portuguese": "por",
    "nigerian_pidgin": "pcm",
    "oromo": "orm",
    "swahili": "swa",
    "tigrinya": "tir",
    "tsonga": "tso",
    "twi": "twi",
    "yoruba": "yor",
}


def _open(folder: Path | None) -> HubParquet:
    """AfriSenti (Muhammad et al., EMNLP 2023, arXiv 2302.08956); no parallel sentences.

    Oromo and Tigrinya have no train split: the validation split is divided.
    """
    return HubParquet(
        "AfriSenti",
        "shmuhammad/AfriSenti-twitter-sentiment",
        _NAMES,
        ("tweet",),
        folder=folder,
        revision=CONVERTED,
        divide=True,
        parallel=False,
    )


DATA_SET = DataSet(
    name="afrisenti",
    description="AfriSenti, sentiment of tweets in 14 languages of Africa",
    open=_open,
    language="hausa",
    prompt={
        "template": "{tweet} Sentiment:",
        "labels": {"negative": " negative", "neutral": " neutral", "positive": " positive"},
    },
)
