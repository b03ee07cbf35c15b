"""What looks wrong between two languages of a task."""

from __future__ import annotations

import logging

from circuitlens.tasks.examples import POOLS, Example, Pools, normal_text

__all__ = ["compare_languages"]

logger = logging.getLogger(__name__)

# A target with more of the source's texts than this is hardly another language.
_SAME_TEXTS = 0.5


def compare_languages(source_name: str, source: Pools, target_name: str, target: Pools) -> None:
    """Warn where shared ids have different labels, or most texts are the same."""

    def by_id(pools: Pools) -> dict[str, Example]:
        return {e.id: e for name in POOLS for e in getattr(pools, name)}

    of_source, of_target = by_id(source), by_id(target)
    shared = of_source.keys() & of_target.keys()
    if differing := sorted(i for i in shared if of_source[i].label != of_target[i].label):
        logger.warning(
            "%d of the %d ids that %s and %s share have another label there (such as %r): if they "
            "do not name the same sentences, name the column of the ids (id=…).",
            len(differing),
            len(shared),
            source_name,
            target_name,
            differing[0],
        )
    known = {normal_text(e) for e in of_source.values()}
    same = sum(normal_text(e) in known for e in of_target.values())
    if same > _SAME_TEXTS * len(of_target):
        logger.warning(
            "%.0f %% of the texts of %s are those of %s: check that it is another language.",
            100 * same / len(of_target),
            target_name,
            source_name,
        )
