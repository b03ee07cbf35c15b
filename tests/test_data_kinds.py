"""Data as people have them: each kind of data set, file and cell that once went wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import circuitlens as cl
from circuitlens.tasks.files import sorted_labels
from circuitlens.tasks.reading import read_rows

POOLS = ("pool_a", "pool_b", "validation", "test")


def rows(n=120, labels=("bad", "good")):
    return [
        {"id": f"s{i}", "text": f"sentence number {i}", "label": labels[i % len(labels)]}
        for i in range(n)
    ]


def examples(task):
    return {e.id: (e.fields["text"], e.label) for pool in POOLS for e in task[pool]}


def expected(given):
    return {str(r["id"]): (r["text"], str(r["label"])) for r in given}


# -- data sets in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "torch", "numpy", "pandas", "arrow", "python"])
@pytest.mark.parametrize("kind", ["class", "int", "bool", "string"])
def test_a_format_that_was_set_makes_no_difference(form, kind):
    given = rows()
    features = None
    if kind == "class":
        names = datasets.ClassLabel(names=["bad", "good"])
        strings = datasets.Value("string")
        features = datasets.Features({"id": strings, "text": strings, "label": names})
        made = [{**r, "label": int(r["label"] == "good")} for r in given]
        wanted = expected(given)
    else:
        change = {"int": lambda x: int(x == "good"), "bool": lambda x: x == "good"}.get(kind, str)
        made = [{**r, "label": change(r["label"])} for r in given]
        wanted = expected(made)
    dataset = datasets.Dataset.from_list(made, features=features).with_format(form)
    assert examples(cl.Task.from_dataset(dataset)) == wanted


@pytest.mark.parametrize("split", [False, True])
def test_streamed_data_sets_without_features_are_read(split):
    def generate(start, stop):
        yield from rows(200)[start:stop]

    def stream(start, stop):
        arguments = {"start": start, "stop": stop}
        return datasets.IterableDataset.from_generator(generate, gen_kwargs=arguments)

    if split:
        parts = {"train": (0, 120), "validation": (120, 160), "test": (160, 200)}
        dataset = datasets.IterableDatasetDict({k: stream(*v) for k, v in parts.items()})
    else:
        dataset = stream(0, 200)
    assert examples(cl.Task.from_dataset(dataset)) == expected(rows(200))


@pytest.mark.parametrize(
    "label", [np.int64, np.float64, np.float32, torch.tensor, float, np.str_, str]
)
def test_labels_of_any_scalar_type_are_named_as_they_look(label):
    made = [{**r, "label": label(i % 3)} for i, r in enumerate(rows())]
    task = cl.Task.from_records(made)
    assert list(task.labels) == ["0", "1", "2"]


def test_categorical_columns_and_columns_with_gaps():
    frame = pd.DataFrame(rows())
    frame["label"] = frame["label"].astype("category")
    assert examples(cl.Task.from_records(frame)) == expected(rows())
    # With a missing cell pandas turns whole numbers into floating-point ones.
    frame = pd.DataFrame([{**r, "label": i % 2, "id": i} for i, r in enumerate(rows())])
    frame.loc[0, "id"] = None
    frame = frame.dropna()
    assert frame["id"].dtype == float
    assert "1" in examples(cl.Task.from_records(frame))


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, np.nan])
def test_a_missing_label_is_named_with_the_remedy(missing):
    made = rows()
    made[7]["label"] = missing
    with pytest.raises(cl.InputError, match=r"no 'label' in row 8.*keep_default_na=False"):
        cl.Task.from_records(made)


@pytest.mark.parametrize("nested", [["a", "b"], {"en": "a"}, np.array(["a", "b"])])
def test_nested_columns_are_refused_by_name(nested):
    made = rows()
    made[3]["text"] = nested
    with pytest.raises(cl.InputError, match=r"Column 'text' of records holds a .* in row 4"):
        cl.Task.from_records(made)


def test_frames_that_give_dictionaries_are_read():
    class Frame:
        """As polars has them."""

        def __iter__(self):
            raise AssertionError("its columns are of no use")

        def to_dicts(self):
            return rows()

    assert examples(cl.Task.from_records(Frame())) == expected(rows())


# -- files -----------------------------------------------------------------------------------------


def csv(path: Path, given, separator=",", before="", **options):
    frame = pd.DataFrame(given)
    text = before + frame.to_csv(index=False, sep=separator)
    path.write_bytes(text.encode(options.get("encoding", "utf-8")))
    return path


def test_long_numbers_are_read_as_written(tmp_path):
    made = [{**r, "id": 12345678901234567890 + i} for i, r in enumerate(rows())]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    assert examples(cl.Task.from_file(path)) == expected(made)


def test_a_cell_may_be_long_and_an_open_quote_is_named(tmp_path):
    made = rows()
    made[5]["text"] = "long " * 28_000
    found = read_rows(csv(tmp_path / "data.csv", made))
    assert found[5]["text"] == made[5]["text"]
    broken = tmp_path / "broken.csv"
    broken.write_text('id,text,label\n1,fine,good\n2,"never closed,good\n3,fine,bad\n')
    with pytest.raises(cl.InputError, match=r"A quote in line 3 of .*broken\.csv is never closed"):
        read_rows(broken)
    broken.write_text('id,text,label\n1,fine,good\n2,"he said" so,good\n')
    with pytest.raises(cl.InputError, match=r"line 3 of .* quotes are doubled"):
        read_rows(broken)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("before", ["", "sep={}\n", "sep={}\r\n"])
def test_other_separators_are_found_and_said(separator, before, tmp_path, caplog):
    path = csv(tmp_path / "data.csv", rows(), separator, before.format(separator))
    with caplog.at_level(logging.INFO):
        assert examples(cl.Task.from_file(path)) == expected(rows())
    assert before or "are separated by" in caplog.text


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-16", True), ("utf-32", True), ("utf-8-sig", False)]
)
def test_byte_order_marks_are_followed(encoding, said, tmp_path, caplog):
    made = [{**r, "text": f"ñandú {r['id']}"} for r in rows()]
    path = csv(tmp_path / "data.csv", made, encoding=encoding)
    with caplog.at_level(logging.INFO):
        assert examples(cl.Task.from_file(path)) == expected(made)
    assert ("byte order mark" in caplog.text) is said


def test_other_encodings_are_named_by_the_caller(tmp_path):
    made = [{**r, "text": f"ñandú “{r['id']}”"} for r in rows()]
    path = csv(tmp_path / "data.csv", made, encoding="cp1252")
    with pytest.raises(cl.InputError, match=r"encoding='cp1252' \(--encoding cp1252\)"):
        cl.Task.from_file(path)
    assert examples(cl.Task.from_file(path, encoding="cp1252")) == expected(made)
    with pytest.raises(cl.InputError, match="is not in ascii"):
        cl.Task.from_file(path, encoding="ascii")
    with pytest.raises(cl.InputError, match="no encoding 'klingon'"):
        cl.Task.from_file(path, encoding="klingon")


def test_a_file_without_header_shows_its_first_row(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("".join(f"{r['text']}\t{r['label']}\n" for r in rows()))
    with pytest.raises(cl.InputError, match=r"'sentence number 0', 'bad'.* no header: add one"):
        cl.Task.from_file(path)


@pytest.mark.parametrize(
    ("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)], ids=["gz", "bz2", "xz"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_files_are_read(suffix, module, kind, tmp_path):
    plain = tmp_path / f"plain.{kind}"
    if kind == "csv":
        csv(plain, rows())
    else:
        plain.write_text("".join(json.dumps(r) + "\n" for r in rows()))
    path = tmp_path / f"data.{kind}{suffix}"
    path.write_bytes(module.compress(plain.read_bytes()))
    assert examples(cl.Task.from_file(path)) == expected(rows())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(cl.InputError, match="could not be read"):
        cl.Task.from_file(path)


def test_several_files_are_one_set_or_its_splits(tmp_path):
    csv(tmp_path / "part-0.csv", rows()[:60])
    csv(tmp_path / "part-1.csv", rows()[60:])
    assert examples(cl.Task.from_file(tmp_path / "part-*.csv")) == expected(rows())
    splits = tmp_path / "splits"
    splits.mkdir()
    csv(splits / "train.csv", rows()[:80])
    csv(splits / "valid.csv", rows()[80:100])
    csv(splits / "test.csv", rows()[100:])
    task = cl.Task.from_file(splits / "*.csv")
    assert examples(task) == expected(rows())
    assert {e.id for e in task["test"]} == {r["id"] for r in rows()[100:]}
    with pytest.raises(cl.InputError, match="No file matches"):
        cl.Task.from_file(tmp_path / "none-*.csv")


def test_labels_that_are_numbers_stand_in_their_order(tmp_path):
    assert sorted_labels(["10", "9", "b", "-1", "a", "2.5"]) == ["-1", "2.5", "9", "10", "a", "b"]
    path = csv(tmp_path / "data.csv", rows(1200, labels=[str(n) for n in range(1, 13)]))
    assert list(cl.Task.from_file(path, share_a=0.5).labels) == [str(n) for n in range(1, 13)]


# -- ids and leaks ---------------------------------------------------------------------------------


def test_ids_that_begin_again_in_every_split_are_refused_with_the_remedy():
    splits = {"train": rows(80), "test": rows(40)}
    with pytest.raises(cl.InputError, match=r"'s0' occurs twice .* id=''"):
        cl.Task.from_records(splits)
    distinct = [{**r, "text": f"other {r['text']}"} for r in rows(40)]
    assert len(examples(cl.Task.from_records({**splits, "test": distinct}, id=""))) == 120


@pytest.mark.parametrize("column", ["id", "index_id", "ID", "guid"])
def test_a_column_of_ids_is_found_so_that_translations_stay_apart(column, tmp_path, caplog):
    source = [{column: r["id"], "text": r["text"], "label": r["label"]} for r in rows()]
    target = [{**r, "text": f"tulisan {r[column]}"} for r in reversed(source)]
    csv(tmp_path / "ind.csv", source)
    csv(tmp_path / "jav.csv", target)
    with caplog.at_level(logging.DEBUG):
        task = cl.Task.from_file(tmp_path / "{language}.csv", language="ind")
        other = task.to("jav")
    assert f"column {column!r}" in caplog.text
    assert "0 examples were left out" in caplog.text
    held_out = {e.id for pool in ("validation", "test") for e in task[pool]}
    assert not held_out & {e.id for pool in ("pool_a", "pool_b") for e in other[pool]}


def test_shared_ids_with_other_labels_are_reported(tmp_path, caplog):
    csv(tmp_path / "ind.csv", rows())
    turned = [{**r, "text": f"x{r['text']}", "id": f"s{119 - i}"} for i, r in enumerate(rows())]
    csv(tmp_path / "jav.csv", turned)
    cl.Task.from_file(tmp_path / "{language}.csv", language="ind").to("jav")
    assert "120 of the 120 ids" in caplog.text


def test_a_target_that_is_the_source_is_reported(tmp_path, caplog):
    csv(tmp_path / "ind.csv", rows())
    csv(tmp_path / "jav.csv", [{**r, "id": f"j{r['id']}"} for r in rows()])
    cl.Task.from_file(tmp_path / "{language}.csv", language="ind").to("jav")
    assert "% of the texts of" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: t.replace(" ", " \u200b"),
        lambda t: t.upper(),
        lambda t: f"\u2066{t}\u2069 ",
        lambda t: t.replace("fi", "ﬁ"),
        lambda t: t.replace("ss", "ß"),
    ],
    ids=["NFD", "zero width", "case", "isolates", "ligature", "sharp s"],
)
def test_a_text_that_only_looks_different_does_not_leave_its_side(change):
    training = [{**r, "text": f"ñandú fin grösser {r['text']}"} for r in rows()]
    same = [{**r, "id": f"t{r['id']}", "text": change(r["text"])} for r in training[:60]]
    task = cl.Task.from_records({"train": training, "test": same})
    left = {e.id for pool in ("pool_a", "pool_b", "validation") for e in task[pool]}
    assert not left & {r["id"] for r in training[:60]}
    assert len(task["test"]) == 60
