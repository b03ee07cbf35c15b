"""Evaluation by class, and labels for new texts."""

from __future__ import annotations

import contextlib
import json
from inspect import unwrap

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

import circuitlens as cl
from circuitlens.cli import main
from circuitlens.tasks.evaluation import Evaluation, summarise
from circuitlens.tasks.streams import Table, stream_rows


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_classes_are_measured_as_scikit_learn_does(pairs):
    gold = torch.tensor([g for g, _ in pairs])
    logits = torch.eye(4)[[p for _, p in pairs]]
    found = summarise(logits, gold, ("a", "b", "c", "d"))
    table = found.per_class()
    expected = precision_recall_fscore_support(
        gold, logits.argmax(1), labels=[0, 1, 2, 3], zero_division=0
    )
    for column, values in zip(("precision", "recall", "f1", "examples"), expected, strict=True):
        assert table[column].to_numpy() == pytest.approx(values)
    assert int(np.diag(found.confusion()).sum()) == round(found.accuracy * found.n)
    # scikit-learn's own: over the labels that occur.
    expected = f1_score(gold, logits.argmax(1), average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(expected)
    assert Evaluation(**json.loads(json.dumps(found.to_dict()))) == found


def test_an_evaluation_of_an_older_version_still_loads():
    old = Evaluation(n=5, accuracy=0.4, macro_f1=0.3, margin=1.0, calibration_error=0.1)
    assert "accuracy 40.0%" in old._repr_html_()
    for ask in (old.confusion, old.per_class, lambda: cl.view.confusion_matrix(old)):
        with pytest.raises(cl.InputError, match="is from an older version"):
            ask()


def test_the_confusion_matrix_is_drawn_as_it_is(toy_proxy, toy_task):
    found = cl.evaluate(toy_proxy, toy_task, "test", quiet=True)
    assert list(found.confusion().index) == list(toy_task.labels)
    assert "right label" in found._repr_html_()
    (trace,) = cl.view.confusion_matrix(found).data
    assert np.array(trace.text).tolist() == found.confusion().to_numpy().tolist()
    assert np.array(trace.z).sum(1) == pytest.approx(1.0)


# -- new texts -----------------------------------------------------------------------------------


def test_predictions_are_the_evaluations(toy_proxy, toy_task):
    examples = toy_task["test"][:40]
    texts = [e.fields["text"] for e in examples]
    found = cl.predict(toy_proxy, texts, quiet=True)
    right = np.mean(found["label"] == [e.label for e in examples])
    assert right == pytest.approx(cl.evaluate(toy_proxy, toy_task, examples, quiet=True).accuracy)
    for other in (
        cl.predict(toy_proxy, [{"text": t} for t in texts], toy_task, batch_size=7, quiet=True),
        cl.predict(toy_proxy, pd.DataFrame({"text": texts, "x": 1}), toy_task.prompt, quiet=True),
    ):
        assert other["label"].equals(found["label"])
        shares = other.filter(like="p(").to_numpy()
        assert shares == pytest.approx(found.filter(like="p(").to_numpy(), abs=1e-5)
    assert cl.predict(toy_proxy, texts[0], quiet=True)["label"][0] == found["label"][0]


def test_what_cannot_be_labelled_is_named(toy_proxy, toy_task):
    for texts, words in (
        ([], "There are no texts"),
        (["a", " "], "The text of text 2 is empty"),
        ([{"words": "a"}], "Text 1 has no field 'text'.*it has words"),
        ([3], "Text 1 is a int"),
    ):
        with pytest.raises(cl.InputError, match=words):
            unwrap(cl.predict)(toy_proxy, texts, toy_task, quiet=True)
    unknown = toy_proxy.clone()
    unknown.prompt = None
    with pytest.raises(cl.InputError, match="does not say what it was asked"):
        cl.predict(unknown, ["bada"], quiet=True)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_of_texts_are_labelled_row_by_row(tmp_path, toy_proxy, toy_task, suffix):
    toy_proxy.save(tmp_path / "model")
    rows = [
        {"id": n, "text": e.fields["text"], "label": "?"}
        for n, e in enumerate(toy_task["test"][:30])
    ]
    frame = pd.DataFrame(rows)
    path = tmp_path / f"new{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    out = tmp_path / ("out.csv" if suffix == ".parquet" else f"out{suffix}")
    command = ["predict", str(tmp_path / "model"), "--in", str(path), "--out", str(out), "-q"]
    from typer.testing import CliRunner

    from circuitlens.cli import app

    found = CliRunner().invoke(app, [*command, "--batch-size", "1"])
    assert found.exit_code == 0, found.output
    table = list(stream_rows(out))
    expected = cl.predict(toy_proxy, [row["text"] for row in rows], quiet=True)
    # The column of this name is the user's own.
    assert [row["predicted label"] for row in table] == expected["label"].tolist()
    assert [str(row["id"]) for row in table] == [str(n) for n in range(30)]


def test_a_failed_labelling_leaves_no_half_file(tmp_path):
    table = Table(tmp_path / "out.csv")
    table.__enter__()
    table.add([{"a": 1}])
    error = RuntimeError("the power went")
    with contextlib.suppress(RuntimeError):
        table.__exit__(RuntimeError, error, None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(cl.InputError, match=r"must end in \.csv"):
        Table(tmp_path / "out.xlsx")
    with pytest.raises(cl.InputError, match="not a known kind of text file"):
        next(stream_rows(tmp_path / "new.docx"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(cl.InputError, match=r"line 2 of .* is not a JSON object"):
        list(stream_rows(tmp_path / "bad.jsonl"))


def test_the_command_says_what_a_folder_is_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "new.csv").write_text("text\nbada\n")
    (tmp_path / "empty").mkdir()
    out = ["--in", str(tmp_path / "new.csv"), "--out", str(tmp_path / "o.csv")]
    monkeypatch.setattr("sys.argv", ["circuitlens", "predict", str(tmp_path / "empty"), *out])
    with pytest.raises(SystemExit):
        main()
    assert "has no config.json" in capsys.readouterr().err
