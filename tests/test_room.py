"""Full disks and folders that may not be written: a sentence, and nothing lost."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import circuitlens as cl
from circuitlens.utils import room
from circuitlens.utils.room import writing_to
from circuitlens.utils.storage import read_json, write_json


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number, tmp_path):
    full = pytest.raises(cl.InputError, match=r"disk of .* is full: free some space and repeat")
    with full, writing_to(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_may_not_be_written_is_named(number, tmp_path):
    refused = pytest.raises(cl.InputError, match=r"cannot be written to \(.+\): choose another")
    with refused, writing_to(tmp_path):
        raise OSError(number, os.strerror(number))


def test_whatever_a_library_calls_it(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="unexpected pos"), writing_to(tmp_path / "not" / "yet"):
        raise RuntimeError("unexpected pos 373120 vs 373008")
    monkeypatch.setattr(room, "_free", lambda _: 0)
    with pytest.raises(cl.InputError, match="is full"), writing_to(tmp_path):
        raise RuntimeError("unexpected pos 373120 vs 373008")
    # Our own errors say what they mean, and a missing file is no matter of room.
    with pytest.raises(cl.InputError, match="mine"), writing_to(tmp_path):
        raise cl.InputError("mine")
    with pytest.raises(FileNotFoundError), writing_to(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_file_is_whole_or_old_when_there_is_no_room(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, "circuitlens.x/1", {"a": 1})

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(cl.InputError, match="is full"):
        write_json(path, "circuitlens.x/1", {"a": 2})
    assert read_json(path, "circuitlens.x/1")["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte, where the machine lets one be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.slow
def test_a_transfer_on_a_full_disk_resumes_when_there_is_room(
    small_disk, toy_proxy, toy_task, toy_scores, tmp_path
):
    near = toy_task.to("near")
    given = {"learning_rates": [1e-3], "epochs": 3, "quiet": True}
    whole = cl.transfer(toy_proxy, toy_scores.top(3), near, strategy="full", **given)
    filling = small_disk / "filling"
    filling.write_bytes(b"x" * 900_000)
    with pytest.raises(cl.InputError, match=r"is full: free some space and repeat the call"):
        cl.transfer(
            toy_proxy,
            toy_scores.top(3),
            near,
            strategy="full",
            checkpoints=small_disk / "c",
            **given,
        )
    filling.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = cl.transfer(
        toy_proxy, toy_scores.top(3), near, strategy="full", checkpoints=small_disk / "c", **given
    )
    assert again.target_after == whole.target_after
    assert again.model.fingerprint() == whole.model.fingerprint()
