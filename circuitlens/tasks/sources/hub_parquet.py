"""Data sets that the hub keeps as Parquet files, one configuration per language."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, to_examples
from circuitlens.tasks.sources.data_set import from_hub, parquet_folder, pick

__all__ = ["HubParquet", "Rows"]

Rows = Iterable[Mapping[str, Any]]
_SPLITS = ("train", "validation", "test")


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
        divide: whether the validation split is divided where there is no train split.
        parallel: whether an id means the same in every language.
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
    divide: bool = False
    parallel: bool = True
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
            optional = ("train",) if self.divide else ()
            found = parquet_folder(self.folder / code, _SPLITS, optional)
        records = dataset_records(found, self.label)
        absent = [name for name in _SPLITS if name not in records]
        divided = self.divide and absent == ["train"]
        if absent and not divided:
            raise InputError(f"{self.title} {language} has no {absent[0]} split.")
        splits: dict[str, Sequence[Example]] = {}
        for name, rows in ((name, records[name]) for name in _SPLITS if name in records):
            examples = to_examples(
                rows if self.prepare is None else self.prepare(rows, name),
                fields=list(self.fields),
                label=self.label,
                id=self.id,
                group=self.group,
                split=name,
                where=f"{self.title} {language} {name}",
            )
            splits[name] = examples if self.parallel else [_own(e, code) for e in examples]
        if divided:
            splits |= _parts(splits["validation"])
        return splits


def _own(example: Example, code: str) -> Example:
    # Equal ids would be taken for translations: kept apart by pools, and paired by intervals.
    return replace(example, id=f"{code}:{example.id}", group=f"{code}:{example.group}")


def _parts(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Divide a development split, where there is no other, into one to train and one to validate.

    The second may not depend on the pools' seed: choices are made on it. Every fifth group goes
    there.
    """
    groups = {group: n for n, group in enumerate(dict.fromkeys(e.group for e in examples))}
    validation = [e for e in examples if groups[e.group] % 5 == 0]
    taken = {e.id for e in validation}
    return {"train": [e for e in examples if e.id not in taken], "validation": validation}
