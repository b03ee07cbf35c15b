from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import circuitlens as cl
from circuitlens.utils import storage
from circuitlens.utils.storage import (
    digest,
    read_json,
    read_tensors,
    replacing,
    safe_name,
    write_json,
    write_tensors,
)

SCHEMA = "circuitlens.test/1"

quick = settings(max_examples=40, deadline=None)

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
contents = st.dictionaries(st.text(max_size=6).filter(lambda k: k != "schema"), values, max_size=5)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- replacing files -----------------------------------------------------------------------


def write_half(path: Path, failure: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        # Nothing is to be seen under the file's own name before the block ends.
        assert not path.exists() or path.read_text() == "old"
        raise failure


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(failure, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(failure, match="stop"):
        write_half(path, failure("stop"))
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["result.json"]


def test_a_block_that_raises_makes_no_new_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "folder" / "result.json", KeyboardInterrupt())
    assert listing(tmp_path / "folder") == []


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "folders" / "result.json"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary != path
            temporary.write_text(text)
        assert path.read_text() == text
        assert listing(path.parent) == ["result.json"]


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match=r"result\.json"), replacing(tmp_path / "result.json"):
        pass
    assert listing(tmp_path) == ["result.json"]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, SCHEMA, {"n": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, SCHEMA, {"n": 2})
    assert read_json(path, SCHEMA) == {"n": 1}
    assert listing(tmp_path) == ["result.json"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.skipif(os.name != "posix", reason="processes are asked for by a signal")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    path = tmp_path / "a[1].json"
    gone = tmp_path / f".a[1].json.{ended}.abcd_123"
    kept = [
        tmp_path / f".a[1].json.{os.getppid()}.abcd_123",
        tmp_path / f".b.json.{ended}.abcd_123",
        tmp_path / ".a[1].json.notes",
    ]
    for file in (gone, *kept):
        file.touch()
    write_json(path, "circuitlens.x/1", {"a": 1})
    assert not gone.exists()
    assert all(file.exists() for file in kept)


def test_results_have_the_mode_of_ordinary_files(tmp_path):
    previous = os.umask(0o027)
    try:
        write_json(tmp_path / "result.json", SCHEMA, {})
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(previous)
    modes = [(tmp_path / name).stat().st_mode for name in ("result.json", "ordinary")]
    assert modes[0] == modes[1]
    assert modes[0] & 0o777 == 0o640


@pytest.mark.parametrize(
    ("value", "failure"),
    [(float("nan"), ValueError), (float("inf"), ValueError), ({1, 2}, TypeError)],
)
def test_content_that_is_no_json_leaves_the_old_file(value, failure, tmp_path):
    path = tmp_path / "result.json"
    write_json(path, SCHEMA, {"n": 1})
    with pytest.raises(failure):
        write_json(path, SCHEMA, {"n": value})
    with pytest.raises(failure):
        write_tensors(tmp_path / "t.safetensors", SCHEMA, {}, {"n": value})
    assert read_json(path, SCHEMA) == {"n": 1}
    assert listing(tmp_path) == ["result.json"]


def test_an_interrupt_while_tensors_are_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    write_tensors(path, SCHEMA, {"x": torch.ones(3)}, {})

    def interrupted(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, SCHEMA, {"x": torch.zeros(3)}, {})
    assert read_tensors(path, SCHEMA)[0]["x"].tolist() == [1, 1, 1]
    assert listing(tmp_path) == ["scores.safetensors"]


# -- JSON ----------------------------------------------------------------------------------


@quick
@given(contents)
def test_json_is_read_back_as_it_was_written(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "content.json"
    write_json(path, SCHEMA, content)
    assert read_json(path, SCHEMA) == content
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw == {"schema": SCHEMA, **content}
    assert next(iter(raw)) == "schema"


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "r.json", SCHEMA, {"name": "ñandú"})
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert '"name": "ñandú"' in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "circuitlens.test/1",', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "contains no JSON object"),
        ('"text"', "contains no JSON object"),
        ('{"n": 1}', "has schema None, but 'circuitlens.test/1' is needed"),
        ('{"schema": "circuitlens.test/2"}', "has schema 'circuitlens.test/2', but"),
        ('{"schema": 1}', "has schema 1, but"),
    ],
)
def test_json_that_is_something_else_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(cl.InputError, match=message) as caught:
        read_json(path, SCHEMA)
    assert "result.json" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for read in (read_json, read_tensors):
        with pytest.raises(cl.InputError, match=r"There is no file .*nothing"):
            read(tmp_path / "nothing", SCHEMA)
        with pytest.raises(cl.InputError, match="There is no file"):
            read(tmp_path, SCHEMA)


# -- tensors -------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@quick
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    meta=contents,
    seed=st.integers(0, 100),
)
def test_tensors_are_read_back_bit_by_bit(tmp_path_factory, shape, dtype, meta, seed):
    path = tmp_path_factory.getbasetemp() / "tensors.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 3).to(dtype)
    write_tensors(path, SCHEMA, {"a": tensor, "b": tensor + tensor}, meta)
    tensors, found = read_tensors(path, SCHEMA)
    assert found == meta
    assert set(tensors) == {"a", "b"}
    assert tensors["a"].dtype == dtype
    assert torch.equal(tensors["a"], tensor)
    assert torch.equal(tensors["b"], tensor + tensor)


def test_views_and_tensors_with_gradients_are_written_too(tmp_path):
    base = torch.arange(12.0, requires_grad=True)
    write_tensors(tmp_path / "t", SCHEMA, {"x": base.view(3, 4).T[1:]}, {})
    tensors, _ = read_tensors(tmp_path / "t", SCHEMA)
    assert torch.equal(tensors["x"], base.detach().view(3, 4).T[1:])
    assert not tensors["x"].requires_grad


def test_tensor_files_of_another_schema_are_refused(tmp_path):
    write_tensors(tmp_path / "t", "circuitlens.scores/2", {"x": torch.ones(1)}, {})
    with pytest.raises(cl.InputError, match=r"schema 'circuitlens\.scores/2', but .*test/1'"):
        read_tensors(tmp_path / "t", SCHEMA)
    # A checkpoint, say: safetensors, but none of ours.
    save_file({"x": torch.ones(1)}, str(tmp_path / "model"))
    with pytest.raises(cl.InputError, match="has schema None"):
        read_tensors(tmp_path / "model", SCHEMA)


def test_results_of_one_kind_are_not_read_as_another(tmp_path):
    write_json(tmp_path / "scores.json", "circuitlens.scores/1", {})
    with pytest.raises(cl.InputError, match="another kind of file"):
        cl.Circuit.load(tmp_path / "scores.json")
    write_tensors(tmp_path / "baseline", "circuitlens.baseline/1", {"mean": torch.ones(1)}, {})
    with pytest.raises(cl.InputError, match="another kind of file"):
        cl.HeadScores.load(tmp_path / "baseline")


# -- digests -------------------------------------------------------------------------------


def test_a_digest_depends_on_every_bit_type_and_shape():
    zeros = torch.zeros(2, 3)
    nudged = torch.zeros(2, 3)
    nudged[1, 2] = -0.0
    parts = [
        (zeros,),
        (nudged,),
        (zeros.view(3, 2),),
        (zeros.view(-1),),
        (zeros.to(torch.int32),),
        (zeros.to(torch.bfloat16),),
        (zeros.bool(),),
        (zeros, zeros),
        (zeros, "name"),
        ("name", zeros),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("abc", ""),
        (),
    ]
    found = [digest(*p) for p in parts]
    assert len(set(found)) == len(parts)
    assert all(len(d) == 16 and int(d, 16) >= 0 for d in found)


def test_a_digest_is_the_same_for_the_same_content():
    tensor = torch.arange(6.0).view(2, 3)
    assert digest(tensor, "x") == digest(tensor.clone(), b"x")
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor)
    assert digest("circuit") == digest("circuit")
    # SHA-256 of the bytes and a zero byte: fingerprints may not change between versions.
    assert digest("") == "6e340b9cffb37a98"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("javanese", "javanese"),
        ("toba_batak", "toba_batak"),
        ("..", "%2E%2E"),
        ("../../etc", "%2E%2E%2F..%2Fetc"),
        ("a/b", "a%2Fb"),
        ("a_b", "a_b"),
        ("con", "%63on"),
        ("español", "espa%C3%B1ol"),
    ],
)
def test_names_of_languages_name_files_in_their_folder(name, safe, tmp_path):
    assert safe_name(name) == safe
    assert (tmp_path / safe_name(name)).resolve().parent == tmp_path.resolve()


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
def test_different_names_have_different_files(names):
    files = [safe_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(len(file.encode()) <= 200 for file in files)
    assert all("/" not in f and f not in (".", "..") and not f.startswith(".") for f in files)


def test_an_empty_name_is_refused():
    with pytest.raises(cl.InputError, match="empty name"):
        safe_name("")
