import errno
import os
import subprocess
import sys

import pytest
import torch

from tubelet.runtime import checkpoint


def state(step):
    return {"step": step, "encoder": {"weight": torch.full((64, 64), float(step))}}


def test_newest_is_loaded_and_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000003.pt", "step-00000004.pt"]
    assert checkpoint.load_latest(tmp_path)["step"] == 4
    assert checkpoint.read(tmp_path / "latest.pt")["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_empty_folder_holds_none(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_falls_back_loudly(tmp_path, damage):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    newest = checkpoint.save(tmp_path, 2, state(2), keep=3)
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = b""
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-00000002.*damaged"):
        assert checkpoint.load_latest(tmp_path)["step"] == 1
    assert (tmp_path / "step-00000002.pt.damaged").exists()


def test_all_damaged_is_an_error_not_a_restart(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="set aside"),
        pytest.raises(checkpoint.CheckpointError, match="none of the 1 checkpoints"),
    ):
        checkpoint.load_latest(tmp_path)


def test_a_kill_while_writing_leaves_the_previous_one(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    program = f"""
import os, torch
from pathlib import Path
from tubelet.runtime import checkpoint
os.fsync = lambda fd: os.kill(os.getpid(), 9)
checkpoint.save(Path({str(tmp_path)!r}), 2, {{"step": 2}}, keep=1)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    assert checkpoint.read(tmp_path / "latest.pt")["step"] == 1


def test_a_full_disk_keeps_the_previous_one_and_nothing_of_the_new_one(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save(tmp_path, 1, {"step": 1}, keep=2)
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, {"step": 2}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.pt", "step-00000001.pt"]
    assert checkpoint.load_latest(tmp_path) == {"step": 1}


def test_mismatch_lists_what_does_not_fit():
    model = torch.nn.Linear(4, 2)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_state(model, {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, "encoder of x.pt")
    message = str(error.value)
    assert "missing: bias" in message
    assert "surplus: extra" in message
    assert "shape of weight: (2, 3) in the file, (2, 4) in the model" in message


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"step": 1, "encoder": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "touched").exists()
