"""Random inputs: whatever comes, a result or one of our errors, and never a wrong text.

A few of each run with the tests; ``make fuzz`` runs ten thousand (``FUZZ=2000`` of each).
"""

from __future__ import annotations

import csv
import json
import os
import string
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.tasks.files import to_examples
from circuitlens.tasks.reading import read_rows

OURS = (cl.InputError, cl.NotFiniteError, cl.UnsupportedModelError)
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", "30")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# No surrogates, which no encoding can write, and no zeros, which mark other encodings.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
CELLS = st.text(LETTERS, min_size=1, max_size=30).filter(lambda t: t.strip())
NAMES = st.text(string.ascii_letters + "äß日_", min_size=1, max_size=8)
SCALARS = st.one_of(
    CELLS,
    st.integers(),
    st.booleans(),
    st.floats(),
    st.none(),
    st.just(pd.NA),
    st.integers(-(2**31), 2**31 - 1).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(NAMES, st.integers(), max_size=2),
)


@FUZZ
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read(rows, kind, separator, encoding, ending, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("fuzz") / f"data.{kind}")
    table = [{"text": text, "label": label} for text, label in rows]
    if kind == "parquet":
        pd.DataFrame(table).to_parquet(path)
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            if kind == "jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + ending for row in table)
            else:
                usual = "," if kind == "csv" else "\t"
                writer = csv.DictWriter(
                    file,
                    ["text", "label"],
                    delimiter=separator if kind == "csv" else usual,
                    lineterminator=ending,
                    # The csv module does not quote every line end that it reads as one.
                    quoting=csv.QUOTE_ALL,
                )
                writer.writeheader()
                writer.writerows(table)
    assert read_rows(path) == table


@FUZZ
@given(content=st.binary(max_size=300), kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_bytes_are_read_or_refused(content, kind, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("fuzz") / f"data.{kind}")
    path.write_bytes(content)
    with suppress(*OURS):
        read_rows(path)


@FUZZ
@given(text=st.text(max_size=300), kind=st.sampled_from(["csv", "tsv", "jsonl"]))
def test_any_text_is_read_or_refused(text, kind, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("fuzz") / f"data.{kind}")
    path.write_text(text.encode("utf-8", "ignore").decode(), encoding="utf-8")
    with suppress(*OURS):
        read_rows(path)


@FUZZ
@given(rows=st.lists(st.fixed_dictionaries({"text": SCALARS, "label": SCALARS}), max_size=6))
def test_cells_of_any_kind_are_texts_or_refused(rows):
    options = {"fields": ["text"], "label": "label", "id": None, "group": None}
    with suppress(*OURS):
        found = to_examples(rows, split="train", where="rows", **options)
        for row, example in zip(rows, found, strict=True):
            assert isinstance(example.fields["text"], str)
            assert example.label
            if isinstance(row["label"], str):
                assert example.label == row["label"].strip()


@FUZZ
@given(
    template=st.one_of(st.text(max_size=20), st.just("{text} ->"), st.just("{text!r:>9} {x}")),
    labels=st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=4),
    texts=st.lists(CELLS, min_size=1, max_size=4),
)
def test_any_template_and_words_make_a_prompt_or_are_refused(toy_proxy, template, labels, texts):
    names = list(labels) or ["a"]
    records = [
        {"text": f"{text} {i}", "label": names[i % len(names)]}
        for i in range(60)
        for text in texts[:1]
    ]
    with suppress(*OURS):
        task = cl.Task.from_records(records, template=template, labels=labels, id="")
        encoded = task.encode(toy_proxy, task["validation"])
        assert len(encoded) == len(task["validation"])


@FUZZ
@given(
    text=st.text(LETTERS.filter(lambda c: c.isprintable()), min_size=1, max_size=200).filter(
        lambda t: t.strip()
    )
)
def test_any_text_is_classified(toy_proxy, toy_task, text):
    from circuitlens.tasks import Example

    example = Example("odd", {"text": text}, next(iter(toy_task.labels)))
    with suppress(*OURS):
        result = cl.evaluate(toy_proxy, toy_task, [example], quiet=True)
        assert np.isfinite(result.accuracy)


@FUZZ
@given(
    heads=st.lists(
        st.one_of(st.text(max_size=8), st.tuples(st.integers(-2, 5), st.integers(-2, 5)))
    ),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_heads_make_a_circuit_or_are_refused(heads, size):
    with suppress(*OURS):
        circuit = cl.Circuit.of(heads, *size)
        assert cl.Circuit.from_dict(json.loads(json.dumps(circuit.to_dict()))) == circuit
        assert (circuit & circuit.complement()).heads == ()
        assert len(circuit | circuit.complement()) == size[0] * size[1]


@FUZZ
@given(data=st.data())
def test_a_result_file_that_was_damaged_is_refused(toy_scores, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    name = data.draw(st.sampled_from(["circuit.json", "scores.safetensors"]))
    path = Path(folder / name)
    result = toy_scores.top(4) if name == "circuit.json" else toy_scores
    result.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    with suppress(*OURS):
        found = type(result).load(path)
        if name == "scores.safetensors":
            # What is read is what was written: the checksum would have told.
            assert found.method == result.method
            assert bool((found.per_example == result.per_example).all())


@FUZZ
@given(
    values=st.dictionaries(
        st.sampled_from(
            ["--size", "--curve-size", "--label", "--column", "--rate", "--replay", "--seed"]
        ),
        st.text(string.printable, max_size=8),
        max_size=3,
    )
)
def test_any_command_line_is_understood_or_refused_in_a_sentence(values, capsys):
    from typer.testing import CliRunner

    from circuitlens.cli import app

    words = [word for pair in values.items() for word in pair]
    assume("\n" not in "".join(words))
    # A folder that is no model: nothing is run.
    result = CliRunner().invoke(
        app, ["run", "--model", "/nonexistent", "--task", "toy", "--out", "/nonexistent/x", *words]
    )
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, (*OURS, SystemExit))


@pytest.mark.parametrize("name", ["circuit.json"])
def test_an_empty_object_is_no_result(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(cl.InputError):
        cl.Circuit.load(tmp_path / name)
