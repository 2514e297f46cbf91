"""Writing, verifying and finding checkpoints. Those of version 0.1: test_checkpoint_v1.py."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch

from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError, CheckpointState


def state(step):
    return CheckpointState(
        {"encoder": {"weight": torch.full((64, 64), float(step))}, "empty": {}},
        {"state": {"encoder.weight": {"step": torch.tensor(float(step)), "exp_avg": torch.randn(64, 64)}}},
        {"config": {"seed": 0}},
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b):
    """Bit for bit, dtypes, keys and types included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == b


# ---------------------------------------------------------------- content


def test_everything_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 8)
    tied = torch.randn(3)
    saved = CheckpointState(
        {
            "encoder": {
                **{str(dtype): base.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)},
                **{str(dtype): (100 * base).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool)},
                "blocks.0.not_contiguous": base.T,
                "view": base[2:, 3],
                "scalar": torch.tensor(3.5),
                "no elements": torch.empty(0, 4),
                "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
            },
            "tied": {"a": tied, "b": tied},
            "empty": {},
        },
        {"optimizers": [{"state": {0: {"step": torch.tensor(7.0), "exp_avg": base}}, "betas": (0.9, 0.95), "lr": 0.1}]},
        {"step": 3, "scaler": {}, "excluded": {"a b.mp4": "broken"}, "sums": [0.1, 1 / 3], "frozen": None},
    )
    path = checkpoint.save(tmp_path, 3, saved, keep=1)
    read = checkpoint.read(path)
    assert list(read.weights) == ["encoder", "tied", "empty"]
    for part in saved.weights:
        assert_same(dict(sorted(read.weights[part].items())), dict(sorted(saved.weights[part].items())))
    assert_same(read.optimizer, saved.optimizer)
    assert sorted(read.metadata.items()) == sorted(saved.metadata.items())
    # Not the memory of another tensor.
    read.weights["tied"]["a"].zero_()
    assert_same(read.weights["tied"]["b"], tied)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_continues_bit_for_bit(tmp_path, optimizer):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        return model, optimizer(model.parameters(), lr=0.1, weight_decay=0.01)

    def train(model, optimizer, steps):
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    straight = make()
    train(*straight, range(6))
    model, first = make()
    train(model, first, range(3))
    path = checkpoint.save(tmp_path, 3, CheckpointState({"model": model.state_dict()}, first.state_dict()), keep=1)
    model, second = make()
    checkpoint.load_weights(model, checkpoint.read_weights(path)["model"], "model")
    second.load_state_dict(checkpoint.read_optimizer(path))
    train(model, second, range(3, 6))
    assert_same(dict(model.state_dict()), dict(straight[0].state_dict()))
    assert_same(second.state_dict(), straight[1].state_dict())


def test_only_what_is_needed_is_read(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), keep=1)
    (path / "optimizer.safetensors").unlink()
    assert checkpoint.read_weights(path, ["encoder"])["encoder"]["weight"].eq(1).all()
    (path / "weights.safetensors").unlink()
    assert checkpoint.read_metadata(path) == {"config": {"seed": 0}, "step": 1}
    assert checkpoint.parts(path) == ["encoder", "empty"]


def test_a_part_that_is_not_there_is_an_error_that_lists_the_others(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), keep=1)
    with pytest.raises(CheckpointError, match="no predictor in it; it holds encoder, empty"):
        checkpoint.read_weights(path, ["encoder", "predictor"])


def test_no_optimizer_is_none(tmp_path):
    assert checkpoint.read_optimizer(checkpoint.save(tmp_path, 1, CheckpointState(), keep=1)) is None


def test_a_newer_format_is_refused_and_not_called_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tubelet.runtime.checkpoint_format.VERSION", 99)
        checkpoint.save(tmp_path, 1, state(1), keep=1)
    with pytest.raises(CheckpointError, match="format is version 99"):
        checkpoint.newest(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


# ---------------------------------------------------------------- the folder


def test_newest_is_found_and_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert checkpoint.find(tmp_path) == [tmp_path / "step-00000003", tmp_path / "step-00000004"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"
    assert checkpoint.read(tmp_path / "latest").metadata["step"] == 4


def test_empty_folder_holds_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "not there") is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    path = checkpoint.save(tmp_path, 1, CheckpointState(metadata={"second": True}), keep=1)
    assert checkpoint.read_metadata(path)["second"]
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_every_name_of_a_checkpoint_is_understood(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, state(1), keep=2)
    path = checkpoint.save(folder, 2, state(2), keep=2)
    for name in (tmp_path, folder, folder / "latest", folder / "latest.pt", path):
        assert checkpoint.locate(name) == path
    assert checkpoint.locate(folder / "step-00000001") == folder / "step-00000001"
    for name, message in ((tmp_path / "no", "no such file or folder"), (tmp_path.parent, "neither a run folder")):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.locate(name)


# ---------------------------------------------------------------- damage

FILES = ["weights.safetensors", "optimizer.safetensors", "optimizer.json", "metadata.json"]


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    else:
        data[int(how * (len(data) - 1))] ^= 0x01
        path.write_bytes(data)


@pytest.mark.parametrize(("name", "how"), [*itertools.product(FILES, ["cut", "empty", "missing", 0.0, 0.2, 0.6, 0.9])])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, caplog, name, how):
    first = checkpoint.save(tmp_path, 1, state(1), keep=3)
    damage(checkpoint.save(tmp_path, 2, state(2), keep=3) / name, how)
    assert checkpoint.newest(tmp_path) == first
    assert "step-00000002: damaged" in caplog.text
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002.damaged"]
    assert checkpoint.locate(tmp_path / "latest") == first


def test_every_flipped_bit_of_the_metadata_is_noticed_or_harmless(tmp_path):
    path = checkpoint.save(tmp_path, 12, CheckpointState(metadata={"loss": 0.5}), keep=1) / "metadata.json"
    data, expected = path.read_bytes(), checkpoint.read_metadata(path.parent)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            assert checkpoint.read_metadata(path.parent) == expected


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    for step in (1, 2):
        damage(checkpoint.save(tmp_path, step, state(step), keep=3) / "weights.safetensors", 0.5)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"all checkpoints are damaged \(step-00000001.damaged, step-00000002"
        ):
            checkpoint.newest(tmp_path)
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 1


def test_removed_checkpoints_are_an_error_until_their_link_is_removed(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), keep=3)
    damage(path / "weights.safetensors", 0.5)
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        checkpoint.newest(tmp_path)
    shutil.rmtree(tmp_path / "step-00000001.damaged")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="latest names step-00000001, which is not there, nor is another"):
            checkpoint.newest(tmp_path)
    (tmp_path / "latest").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_folder_on_a_disk_that_is_not_mounted_is_an_error(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(CheckpointError, match="checkpoints names .*scratch, which is not there"):
        checkpoint.newest(tmp_path / "checkpoints")


def test_metadata_that_lacks_something_is_explained(tmp_path, caplog):
    with pytest.raises(CheckpointError, match="x: its metadata has no step, scaler, so the run cannot be continued"):
        checkpoint.check_complete({"global_batch": 4}, ("step", "scaler"), tmp_path / "x")
    checkpoint.check_same_batch_size({}, 8, "data.batch_size")
    assert "does not say how many samples a step takes; the run continues with 8" in caplog.text
    with pytest.raises(CheckpointError, match="take 4 samples, data.batch_size times the number of processes is 8"):
        checkpoint.check_same_batch_size({"global_batch": 4}, 8, "data.batch_size")


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    for _ in range(2):
        damage(checkpoint.save(tmp_path, 2, state(2), keep=3) / "metadata.json", "cut")
        checkpoint.newest(tmp_path)
    assert names(tmp_path)[1:] == ["step-00000001", "step-00000002.damaged", "step-00000002.damaged2"]


def test_only_the_kind_that_is_read_needs_to_be_verified(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), keep=3)
    damage(path / "optimizer.safetensors", 0.5)
    checkpoint.check_intact(path, "weights")
    with pytest.raises(CheckpointError, match="wrong checksum of optimizer.safetensors"):
        checkpoint.check_intact(path)


# ---------------------------------------------------------------- kills and full disks


def save_and_die(folder, last_call):
    """Save step 2 in a process that kills itself at its `last_call`-th call that changes a file system."""
    calls = itertools.count(1)

    def counted(original):
        def call(*args, **kwargs):
            if next(calls) == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "symlink", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save(folder, 2, state(2), keep=1)


def test_a_kill_at_any_system_call_leaves_a_complete_checkpoint(tmp_path):
    """The process kills itself at its first, second, … call that changes a folder, until none is left."""
    steps = []
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        checkpoint.save(folder, 1, state(1), keep=1)
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(folder, call))
        process.start()
        process.join()
        path = checkpoint.newest(folder)
        step = checkpoint.step_of(path)
        steps.append(step)
        assert checkpoint.locate(folder / "latest").exists()
        assert checkpoint.read_weights(path, ["encoder"])["encoder"]["weight"].eq(step).all()
        checkpoint.save(folder, 3, state(3), keep=1)
        assert names(folder) == ["latest", "step-00000003"]  # nothing is left of the killed one
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert steps == sorted(steps)
    assert steps.count(1) >= 5
    assert steps.count(2) >= 3


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_full_disk_keeps_the_previous_one_and_nothing_of_the_new_one(tmp_path, monkeypatch, after):
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    calls = itertools.count()
    fsync = os.fsync

    def full(descriptor):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 1


# ---------------------------------------------------------------- loading


def test_mismatch_lists_what_does_not_fit():
    model = torch.nn.Linear(4, 2)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, "encoder of x")
    message = str(error.value)
    assert "encoder of x does not match the model" in message
    assert "missing: bias" in message
    assert "unexpected: extra" in message
    assert "shape of weight: (2, 3) in the file, (2, 4) in the model" in message


def test_names_of_parts_have_no_dots(tmp_path):
    with pytest.raises(ValueError, match="must not have dots: a.b"):
        checkpoint.save(tmp_path, 1, CheckpointState({"a.b": {}}), keep=1)


def test_metadata_is_plain_json(tmp_path):
    path = checkpoint.save(tmp_path, 7, CheckpointState(metadata={"config": {"lr": 1e-3}}), keep=1)
    content = json.loads((path / "metadata.json").read_text())
    assert content["format_version"] == 2
    assert content["metadata"] == {"config": {"lr": 1e-3}, "step": 7}
