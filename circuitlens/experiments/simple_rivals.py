"""The simplest rivals of a transfer: the most frequent label, and n-grams with a linear model.

They see the same rows as a transfer does: pool B to train on, validation to choose from, test once.
An adapted language model that falls behind them has not earned its cost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from circuitlens.errors import check_choice
from circuitlens.tasks import Evaluation, Example, Task
from circuitlens.tasks.evaluation import summarise

__all__ = ["SIMPLE", "SimpleRival", "simple_cell", "simple_rival", "simple_rivals"]

SIMPLE = ("majority", "n-grams")
# Inverse strengths of regularisation that validation chooses from.
_STRENGTHS = (0.1, 1.0, 10.0, 100.0)


# A run's table and its report show the same ones.
_FITTED: dict[tuple[str, str, str], SimpleRival] = {}


@dataclass(frozen=True)
class SimpleRival:
    """A simple rival on one target language.

    Attributes:
        name: ``"majority"`` or ``"n-grams"``.
        language: of the target.
        result: on the target's test split; margins are of log-probabilities.
        right: which test examples are answered correctly.
        validation: accuracy on validation of every strength that was tried.
        n_features: numbers that are fitted for each label.
        seconds: of fitting, all strengths together.
    """

    name: str
    language: str
    result: Evaluation
    right: tuple[bool, ...]
    validation: tuple[tuple[float, float], ...]
    n_features: int
    seconds: float


def simple_rival(task: Task, name: str = "n-grams") -> SimpleRival:
    """Fit a simple rival on the target's training pool and measure it on its test split.

    Args:
        task: in the target language.
        name: ``"majority"``, the most frequent label of pool B; or ``"n-grams"``, logistic
            regression on TF-IDF weights of words (1 to 2) and of characters (2 to 5), whose
            strength validation chooses. Of prompts without text nothing is left but the majority.

    Raises:
        InputError: for another name.
    """
    check_choice("name", name, SIMPLE)
    start = time.perf_counter()
    labels = list(task.labels)
    pools = {pool: task[pool] for pool in ("pool_b", "validation", "test")}
    gold = {pool: [labels.index(e.label) for e in examples] for pool, examples in pools.items()}
    counts = Counter(gold["pool_b"])
    # Of one label, or of sounds without any text, there is nothing to fit.
    silent = not any(e.texts for e in pools["pool_b"])
    if name == "majority" or len(counts) == 1 or silent:
        shares = np.array([counts[i] for i in range(len(labels))]) / len(gold["pool_b"])
        scores = {pool: np.tile(_log(shares), (len(pools[pool]), 1)) for pool in pools}
        n_features = 1
        tried = [(0.0, _accuracy(scores["validation"], gold["validation"]))]
    else:
        scores, tried, n_features = _ngrams(pools, gold, len(labels))
    result = summarise(
        torch.tensor(scores["test"], dtype=torch.float32), torch.tensor(gold["test"]), tuple(labels)
    )
    right = scores["test"].argmax(1) == np.array(gold["test"])
    return SimpleRival(
        name,
        task.language,
        result,
        tuple(map(bool, right)),
        tuple(tried),
        n_features,
        time.perf_counter() - start,
    )


def simple_rivals(task: Task, languages: Iterable[str]) -> list[SimpleRival]:
    """Both rivals in some target languages, each fitted once in a process.

    Args:
        task: in any language.
        languages: of the targets.
    """
    found = []
    for language in dict.fromkeys(languages):
        target = task.to(language)
        for name in SIMPLE:
            key = (target.fingerprint(), target.language, name)
            if key not in _FITTED:
                _FITTED[key] = simple_rival(target, name)
            found.append(_FITTED[key])
    return found


def _ngrams(
    pools: Mapping[str, Sequence[Example]], gold: Mapping[str, list[int]], n_labels: int
) -> tuple[dict[str, np.ndarray], list[tuple[float, float]], int]:
    """Log-probabilities of labels in every pool, strengths tried, and the number of features."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion

    texts = {pool: [" ".join(e.texts.values()) for e in found] for pool, found in pools.items()}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True)
    try:
        features = FeatureUnion([("words", words), ("letters", letters)])
        train = features.fit_transform(texts["pool_b"])
    except ValueError:
        # Texts without a single word, such as emoji.
        features = FeatureUnion([("letters", letters)])
        train = features.fit_transform(texts["pool_b"])
    columns = {pool: features.transform(found) for pool, found in texts.items()}
    best: tuple[float, Any] | None = None
    tried = []
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(train, gold["pool_b"])
        accuracy = float(model.score(columns["validation"], gold["validation"]))
        tried.append((strength, accuracy))
        # Of equals the stronger regularisation.
        if best is None or accuracy > best[0]:
            best = accuracy, model
    assert best is not None
    scores = {}
    for pool, rows in columns.items():
        # A label that was never seen has no column.
        shares = np.zeros((rows.shape[0], n_labels))
        shares[:, best[1].classes_] = best[1].predict_proba(rows)
        scores[pool] = _log(shares)
    return scores, tried, int(train.shape[1])


def _log(shares: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    # Finite, as what is saved is JSON.
    return np.asarray(np.log(np.maximum(shares, 1e-12)))


def _accuracy(scores: Float[np.ndarray, "example label"], gold: Sequence[int]) -> float:
    return float((scores.argmax(1) == np.array(gold)).mean())


def simple_cell(rival: SimpleRival, task: Task, before: Evaluation, seed: int) -> dict[str, Any]:
    """A simple rival as a cell of a comparison, alongside those of strategies.

    Args:
        rival: on ``task``.
        task: in the target language.
        before: the model before any transfer, from which gains are counted.
        seed: of the cells that it appears alongside; nothing about it is random.
    """
    return {
        "strategy": rival.name,
        "heads": None,
        "target_language": rival.language,
        "source_language": None,
        "target_before": before.to_dict(),
        "target_after": rival.result.to_dict(),
        "retained": [],
        "n_trainable": rival.n_features * len(task.labels),
        "learning_rate": 0.0,
        "alpha": 1.0,
        "front": None,
        "validation": [list(pair) for pair in rival.validation],
        "history": [],
        "seconds": rival.seconds,
        "target_right": [int(right) for right in rival.right],
        "target_ids": [example.id for example in task["test"]],
        "drift": [],
        "shift": None,
        "decision": None,
        "prompt": None,
        "seed": seed,
        "peak_mib": 0.0,
    }
