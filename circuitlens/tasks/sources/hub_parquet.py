"""Data sets that the hub keeps as Parquet files, one configuration per language."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, to_examples
from circuitlens.tasks.sources.data_set import from_hub, parquet_folder, pick

__all__ = ["HubParquet", "parts"]

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class HubParquet:
    """Where the rows of a data set are, and what its columns mean.

    Attributes:
        title: what messages call it.
        repository: on the hub.
        names: configuration of every language by its name; codes are understood as well.
        fields: columns of the texts.
        label: column of the label.
        folder: ``<configuration>/<split>*.parquet``, as on the hub; ``None`` asks the hub.
        revision: of the repository.
        splits_of: name on the hub of every split.
        prepare: changes the rows of a split, given its name.
        id, group: columns; without an id, rows are numbered within their split.
    """

    title: str
    repository: str
    names: Mapping[str, str]
    fields: tuple[str, ...]
    label: str = "label"
    folder: Path | None = None
    revision: str | None = None
    splits_of: tuple[tuple[str, str], ...] = (
        ("train", "train"),
        ("validation", "validation"),
        ("test", "test"),
    )
    prepare: Callable[[Rows, str], Rows] | None = None
    id: str | None = None
    group: str | None = None

    @property
    def languages(self) -> Sequence[str]:
        """Names of the languages."""
        return sorted(self.names)

    def resolve(self, language: str) -> str:
        """Accept names and codes."""
        known = {name: name for name in self.names}
        known |= {code.lower(): name for name, code in self.names.items()}
        return pick(language, known, self.title)

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the splits."""
        code = self.names[language]
        if self.folder is None:
            found = from_hub(self.repository, code, revision=self.revision)
        else:
            found = parquet_folder(self.folder / code, [there for _, there in self.splits_of])
        records = dataset_records(found, self.label)
        splits: dict[str, Sequence[Example]] = {}
        for name, there in self.splits_of:
            rows: Rows = records[there]
            splits[name] = to_examples(
                rows if self.prepare is None else self.prepare(rows, there),
                fields=list(self.fields),
                label=self.label,
                id=self.id,
                group=self.group,
                split=name,
                where=f"{self.title} {language} {there}",
            )
        return splits


def parts(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Divide a development split, where there is no other, into one to train and one to validate.

    The second may not depend on the pools' seed: choices are made on it. Every fifth group goes
    there.
    """
    groups = {group: n for n, group in enumerate(dict.fromkeys(e.group for e in examples))}
    validation = [e for e in examples if groups[e.group] % 5 == 0]
    taken = {e.id for e in validation}
    return {"train": [e for e in examples if e.id not in taken], "validation": validation}
