import errno
import json
import math
import os
import stat
import uuid

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tubelet.runtime.files import (
    NotFinite,
    read_json,
    remove_leftovers,
    replacing,
    save_tensors,
    write_atomic,
    write_json,
)


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(("content", "stored"), [("grün\n", "grün\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes(tmp_path, content, stored):
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == stored
    assert names(tmp_path) == ["a"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json(tmp_path):
    path = tmp_path / "new" / "a.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None, "é"]})
    assert read_json(path) == {"a": [1, None, "é"]}
    assert path.read_text().startswith('{\n "a"')
    path.write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(path)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_number_that_is_not_finite_is_never_written_or_read_as_a_result(tmp_path, number):
    path = tmp_path / "results.json"
    write_json(path, {"top1": 5.0})
    with pytest.raises(NotFinite, match=r"results\.json is not written: heads\.1\.loss -?(nan|inf) is no result"):
        write_json(path, {"top1": 1.0, "heads": [{"loss": 0.0}, {"loss": number}]})
    assert read_json(path) == {"top1": 5.0}
    path.write_text(json.dumps({"top1": float(number)}))
    with pytest.raises(NotFinite, match=r"results\.json has -?(NaN|Infinity), which is no result; remove the file"):
        read_json(path)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, "old")

    def fill_the_disk():
        with replacing(path) as temporary:
            temporary.write_text("part of the ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_two_writers_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert names(tmp_path) == ["a"]


def test_tensors_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "x.safetensors", {"x": torch.arange(3)}, {"a": "b"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert (file.get_tensor("x").tolist(), file.metadata()) == ([0, 1, 2], {"a": "b"})


def test_what_kills_have_left_of_a_file_is_removed(tmp_path):
    for name in ("a", "b", "a.tmp"):
        (tmp_path / f"{name}.{uuid.uuid4().hex}.tmp").write_text("")
    for name in ("mine.tmp", "a"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "a")
    assert sorted(name.partition(".")[0] for name in names(tmp_path)) == ["a", "a", "b", "mine"]
    remove_leftovers(tmp_path)
    assert sorted(names(tmp_path)) == ["a", "mine.tmp"]
    remove_leftovers(tmp_path / "missing")


def test_the_names_of_temporary_files_are_known(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("")
        remove_leftovers(tmp_path, "a")
        assert not temporary.exists()
        temporary.write_text("")
