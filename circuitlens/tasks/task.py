"""Task: examples, prompt, label words and leak-safe pools."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd
from transformers import PreTrainedTokenizerBase

from circuitlens.errors import InputError
from circuitlens.models.batch import Words
from circuitlens.models.media import digest_of
from circuitlens.models.prompt import Prompt, label_words, template_fields
from circuitlens.models.readouts import DEFAULT
from circuitlens.tasks.checking import check_examples
from circuitlens.tasks.comparing_languages import compare_languages
from circuitlens.tasks.encoding import Encoded, encode
from circuitlens.tasks.examples import POOLS, Example, Pool, Pools, split_pools
from circuitlens.utils.storage import digest

if TYPE_CHECKING:
    import datasets

    from circuitlens.models.hooked import HookedModel
    from circuitlens.tasks.files import Rows

__all__ = ["COLUMNS", "FILE_OPTIONS", "OPTIONS", "Source", "Task", "check_options"]

logger = logging.getLogger(__name__)

Splits = Mapping[str, Sequence[Example]]

# Keyword arguments that all tasks take, and those that tasks of records and files take besides.
STYLE = ("readout", "bos", "chat", "system", "choices")
OPTIONS = ("template", "labels", "seed", "share_a", "max_text_tokens", "tokenizer", *STYLE)
COLUMNS = ("label", "id", "group")
# What only files have.
FILE_OPTIONS = ("encoding",)


def check_options(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Reject a misspelt keyword argument before any data is read.

    Raises:
        InputError: naming it and the known ones.
    """
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            f"The task {where} takes no option {unknown[0]!r}; it takes {', '.join(known)}."
        )


@runtime_checkable
class Source(Protocol):
    """Where the examples of a task come from, in every language that it has."""

    @property
    def languages(self) -> Sequence[str]:
        """Names of the languages; empty if only the source knows which exist."""
        ...

    def resolve(self, language: str) -> str:
        """Return the source's own name of ``language``, or raise an InputError."""
        ...

    def splits(self, language: str) -> Splits:
        """Return the examples by split (``train``, ``validation``, ``test``)."""
        ...


@dataclass(frozen=True)
class Task:
    """A classification task in one language.

    A language model is asked by a prompt and answers with a word; a model with a classification
    head is given the texts.

    Make one with :func:`circuitlens.load_task` or one of the ``from_`` methods.

    Attributes:
        name: name of the task or data set.
        language: language of the examples.
        template: prompt template; its fields are those of the examples.
        labels: the word that answers the prompt, by label, or several words that mean the same.
            Labels are strings, and what is given otherwise, such as a number, is turned into one.
        pools: pool A, pool B, validation and test.
        max_text_tokens: texts are cut beyond this many tokens.
        seed: seed of the pools.
        share_a: share of the training examples in pool A.
        readout, bos, chat, system, choices: how it is asked and answered (:class:`Prompt`).
        origin: the task that this one is the translation of, if :meth:`to` made it.
    """

    name: str
    language: str
    template: str
    labels: Mapping[str, Words]
    pools: Pools
    max_text_tokens: int = 96
    seed: int = 0
    share_a: float = 0.5
    source: Source | None = field(default=None, repr=False, compare=False)
    origin: Task | None = field(default=None, repr=False, compare=False)
    readout: str = "auto"
    bos: bool | None = None
    chat: bool = False
    system: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", label_words(self.labels))
        object.__setattr__(self, "choices", self.prompt.choices)
        if len(self.labels) < 2:
            raise InputError(f"A task needs at least two labels, but has {list(self.labels)}.")
        fields = template_fields(self.template)
        if not fields:
            raise InputError(
                f"The prompt template {self.template!r} has no field in braces for the text."
            )
        for name in POOLS:
            self._check(name, self[name])

    def _check(self, pool: str, examples: Sequence[Example]) -> None:
        check_examples(examples, self.prompt, self.labels, f"{self.full_name}, {pool}")
        # Of a target language there may be a handful of sentences, and nothing reads its pool A.
        enough = self.origin is not None and (examples or pool == "pool_a")
        if (absent := self._absent(pool)) and not enough:
            raise InputError(
                f"No example has the label {absent[0]!r} in {pool} of {self.full_name} "
                f"({len(examples)} examples): every class must occur in every pool; add examples, "
                "or change seed or share_a."
            )

    def _absent(self, pool: str) -> list[str]:
        there = {example.label for example in self[pool]}
        return [label for label in self.labels if label not in there]

    # -- making tasks ----------------------------------------------------------------------

    @classmethod
    def from_source(
        cls,
        source: Source,
        language: str,
        *,
        name: str,
        template: str,
        labels: Mapping[Any, Any],
        seed: int = 0,
        share_a: float = 0.5,
        max_text_tokens: int = 96,
        tokenizer: PreTrainedTokenizerBase | None = None,
        origin: Task | None = None,
        **style: Any,
    ) -> Task:
        """Make a task from a source of examples in several languages."""
        words = label_words(labels)
        language = source.resolve(language)
        pools = split_pools(source.splits(language), seed=seed, share_a=share_a)
        task = cls(
            name,
            language,
            template,
            words,
            pools,
            max_text_tokens,
            seed,
            share_a,
            source,
            origin=origin,
            **style,
        )
        if tokenizer is not None:
            task.prompt.readout_of(DEFAULT, tokenizer)
        return task

    @classmethod
    def from_records(
        cls,
        records: Rows | Mapping[str, Rows],
        *,
        name: str = "records",
        language: str = "unnamed",
        template: str = "{text} label:",
        labels: Mapping[Any, Any] | None = None,
        label: str = "label",
        id: str | None = None,  # noqa: A002 (the column's usual name)
        group: str | None = None,
        **options: Any,
    ) -> Task:
        """Make a task from records in memory.

        Args:
            records: mappings with the template's fields and a label, or a data frame with these
                columns; either one (the splits are made by id) or one by ``train``,
                ``validation``, ``test``.
            name, language: what to call it.
            template: prompt template; its fields are the names of the text columns.
            labels: answer word by label; by default a space and the label itself.
            label, id, group: names of the columns. If no id column is named, one called ``id``,
                ``index_id``, ``idx`` or the like is used; if there is none, or with ``id=""``,
                rows are numbered. A group column names what pools must not split.
            options: ``seed``, ``share_a``, ``max_text_tokens``, ``tokenizer``.

        Raises:
            InputError: for missing columns, missing or unknown labels, empty texts, classes without
                example, unknown options.
        """
        from circuitlens.tasks.files import RecordSource

        check_options(options, ("name", "language", *COLUMNS, *OPTIONS), name)
        source = RecordSource(
            records,
            fields=[*template_fields(template), *options.get("choices", ())],
            label=label,
            id=id,
            group=group,
            where=name,
            language=language,
        )
        words = {value: f" {value}" for value in source.labels()} if labels is None else labels
        return cls.from_source(
            source,
            language,
            name=name,
            template=template,
            labels=words,
            **options,
        )

    @classmethod
    def from_file(cls, path: str | Path, *, language: str = "unnamed", **options: Any) -> Task:
        """Make a task from a CSV, TSV, JSONL or Parquet file, or a folder of such splits.

        Args:
            path: a file (the splits are made by id), a pattern of several such as
                ``data/*.csv``, or a folder with ``train``, ``valid`` and ``test`` files; they may
                be compressed (``.csv.gz``). ``{language}`` in it stands for the language, which
                lets :meth:`to` find the other languages.
            language: language of the examples.
            options: as of :meth:`from_records`, and ``encoding`` of text files, if it is neither
                UTF-8 nor given by a byte order mark.

        Raises:
            InputError: for files that cannot be read, and as :meth:`from_records`.
        """
        from circuitlens.tasks.files import FileSource, name_of_files

        check_options(options, ("name", *FILE_OPTIONS, *COLUMNS, *OPTIONS), str(path))
        template = options.pop("template", "{text} label:")
        columns = {key: options.pop(key, None) for key in ("id", "group", *FILE_OPTIONS)}
        source = FileSource(
            str(path),
            fields=[*template_fields(template), *options.get("choices", ())],
            label=options.pop("label", "label"),
            language=language,
            **columns,
        )
        words = options.pop("labels", None)
        if words is None:
            words = {value: f" {value}" for value in source.labels(language)}
        name = options.pop("name", None) or name_of_files(Path(path))
        return cls.from_source(
            source, language, name=name, template=template, labels=words, **options
        )

    from_csv = from_file

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset | datasets.DatasetDict,
        *,
        label: str = "label",
        **options: Any,
    ) -> Task:
        """Make a task from a ``datasets.Dataset`` or ``DatasetDict``; options as from_records.

        Integer labels of a ``ClassLabel`` column are read by their names. A format that was set
        (``with_format("torch")``) makes no difference, and streamed data sets are read in full.
        """
        from circuitlens.tasks.files import dataset_records

        options.setdefault("name", "dataset")
        return cls.from_records(dataset_records(dataset, label), label=label, **options)

    def to(self, language: str) -> Task:
        """Return the same task in another language.

        Pools stay leak-safe: an example whose id is on the other side in this language is
        left out, and the log says how many were.

        Raises:
            InputError: for an unknown language (the known ones are listed) or a task that has
                only one.
        """
        if self.source is None:
            raise InputError(f"The task {self.name} has no language other than {self.language}.")
        other = Task.from_source(
            self.source,
            language,
            name=self.name,
            template=self.template,
            labels=self.labels,
            seed=self.seed,
            share_a=self.share_a,
            max_text_tokens=self.max_text_tokens,
            origin=self,
            **{name: getattr(self, name) for name in STYLE},
        )
        compare_languages(self.full_name, self.pools, other.full_name, other.pools)
        pools = other.pools
        ancestor: Task | None = self
        while ancestor is not None:
            pools = pools.apart_from(ancestor.pools)
            ancestor = ancestor.origin
        found = replace(other, pools=pools)
        for pool in POOLS[1:]:
            if absent := found._absent(pool):
                said = (absent[0], pool, found.full_name)
                logger.warning("No example has the label %r in %s of %s.", *said)
        return found

    # -- using tasks -----------------------------------------------------------------------

    def __getitem__(self, pool: Pool | str) -> tuple[Example, ...]:
        """Return the examples of a pool.

        Raises:
            InputError: for an unknown name.
        """
        if pool not in POOLS:
            raise InputError(f"There is no pool {pool!r}; use one of {', '.join(POOLS)}.")
        examples: tuple[Example, ...] = getattr(self.pools, pool)
        return examples

    @property
    def full_name(self) -> str:
        """Name and language, such as ``nusax/indonesian``."""
        return f"{self.name}/{self.language}"

    @property
    def held_out(self) -> tuple[Example, ...]:
        """Examples that competence and discovery never see: pool B and validation.

        Faithfulness is measured on these. Pool B of the *source* language is used for nothing else.
        """
        return (*self.pools.pool_b, *self.pools.validation)

    @property
    def prompt(self) -> Prompt:
        """What a model is asked, and what its answers mean."""
        return Prompt(
            self.template,
            self.labels,
            self.max_text_tokens,
            **{name: getattr(self, name) for name in STYLE},
        )

    def encode(self, model: HookedModel, examples: Sequence[Example] | Pool | str) -> Encoded:
        """Encode examples, or the pool of that name, for a model.

        See :mod:`circuitlens.tasks.encoding`.

        Raises:
            InputError: if there are no examples; for an unknown pool; if something is not an
                example, lacks a field that the template needs, or has a label that the task
                does not have.
        """
        examples = self[examples] if isinstance(examples, str) else tuple(examples)
        if not examples:
            raise InputError(
                f"There are no examples of {self.full_name} to encode: give at least one."
            )
        if other := [e for e in examples if not isinstance(e, Example)]:
            raise InputError(
                f"{other[0]!r} is not an example of {self.full_name}: make one with "
                "circuitlens.tasks.Example(id, fields, label)."
            )
        check_examples(examples, self.prompt, self.labels, self.full_name)
        return encode(
            examples,
            model.tokenizer,
            self.prompt,
            readout=model.readout,
            context=model.context,
            n_embeddings=model.n_embeddings,
            where=self.full_name,
            media=model,
        )

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of template, labels and all examples with their pools."""
        parts = [self.template, str(dict(self.labels)), str(self.max_text_tokens)]
        plain = Prompt(self.template, self.labels, self.max_text_tokens)
        if self.prompt != plain:
            parts += [f"{name}={getattr(self, name)}" for name in STYLE]
        for pool in POOLS:
            parts.append(pool)
            for e in self[pool]:
                both = (*e.fields.items(), *e.counterfactual.items())
                texts = (v if isinstance(v, str) else digest_of(n, v) for n, v in both)
                parts += [e.id, *texts, e.label]
        return digest(*parts)

    def to_frame(self) -> pd.DataFrame:
        """Return all examples as a data frame with their pool."""
        rows = [
            {"id": e.id, "pool": pool, **e.fields, "label": e.label}
            for pool in POOLS
            for e in self[pool]
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{pool}={len(self[pool])}" for pool in POOLS)
        return (
            f"Task(name={self.name!r}, language={self.language!r}, labels={list(self.labels)}, "
            f"{sizes})"
        )

    def _repr_html_(self) -> str:
        counts = self.to_frame().groupby(["pool", "label"], sort=False).size().unstack()
        title = html.escape(f"{self.full_name}: {self.template}")
        return f"<p><b>Task</b> {title}</p>{counts.to_html()}"
