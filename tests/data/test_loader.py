import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tubelet.data import AugConfig, Batch, DataConfig, VideoError, evenly_spaced
from tubelet.data.loader import make_eval_loader, make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.data.video_dataset import Dataset
from tubelet.data.workers import Loader
from tubelet.runtime.distributed import World


class Masks:
    """Stands for a mask collator."""

    def sample_masks(self, batch_size, rng, shared):
        lengths = (shared or rng).integers(3, 9, 4)
        masks = [torch.from_numpy(rng.integers(0, 50, (batch_size, length))) for length in lengths]
        return masks[:2], masks[2:]


def train(
    videos,
    bad=(),
    *,
    first=0,
    last=5,
    batch_size=4,
    rank=0,
    world_size=1,
    workers=0,
    num_clips=2,
    mask_batch_size=None,
    mask_lengths="shared",
):
    data = DataConfig(datasets=[str(videos), *bad], sampling_rate=2, num_frames=4, num_clips=num_clips, crop_size=32)
    augmentation = AugConfig(auto_augment=True, reprob=0.5)
    dataset = Dataset(data, TrainTransform(augmentation, 32), seed=7, on_error="replace")
    stream = SampleStream(dataset.sizes, None, batch_size, seed=7)
    return list(
        make_train_loader(
            dataset,
            stream,
            Masks(),
            seed=7,
            first_step=first,
            last_step=last,
            world=World(rank, world_size),
            num_workers=workers,
            mask_batch_size=mask_batch_size,
            mask_lengths=mask_lengths,
        )
    )


def assert_equal(one: Batch, two: Batch):
    for name in ("clips", "labels", "indices", "frames"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0)
    for a, b in zip(one.masks_context + one.masks_target, two.masks_context + two.masks_target, strict=True):
        assert torch.equal(a, b)
    assert (one.paths, one.step, one.bad) == (two.paths, two.step, two.bad)


def test_same_batches_with_any_number_of_workers_and_from_any_step(videos, broken_video):
    expected = train(videos, [broken_video])
    assert [batch.step for batch in expected] == [0, 1, 2, 3, 4]
    assert not torch.equal(expected[0].clips, expected[1].clips)
    for workers, first in ((1, 0), (2, 0), (0, 3), (2, 2)):
        batches = train(videos, [broken_video], workers=workers, first=first)
        assert len(batches) == 5 - first
        for one, two in zip(expected[first:], batches, strict=True):
            assert_equal(one, two)


def test_two_processes_see_the_rows_of_one(videos):
    full = train(videos)
    halves = [train(videos, rank=rank, world_size=2) for rank in (0, 1)]
    for one, first, second in zip(full, *halves, strict=True):
        assert first.paths + second.paths == one.paths
        assert torch.equal(torch.cat([first.clips, second.clips]), one.clips)
        for mask, a, b in zip(one.masks_context, first.masks_context, second.masks_context, strict=True):
            assert torch.equal(torch.cat([a, b]), mask)
        for mask, a, b in zip(one.masks_target, first.masks_target, second.masks_target, strict=True):
            assert torch.equal(torch.cat([a, b]), mask)
    with pytest.raises(ValueError, match="4 cannot be divided among 3"):
        train(videos, world_size=3)


@pytest.mark.parametrize("lengths", ["shared", "shortest"])
def test_masks_are_drawn_in_groups_that_do_not_depend_on_the_processes(lengths, videos):
    options = {"batch_size": 8, "mask_batch_size": 4, "mask_lengths": lengths}
    by_two = [train(videos, rank=rank, world_size=4, **options) for rank in range(4)]
    by_four = [train(videos, rank=rank, world_size=2, **options) for rank in range(2)]
    of_groups = [[[mask.shape[1] for mask in batch.masks_context] for batch in batches] for batches in by_four]
    assert (of_groups[0] == of_groups[1]) == (lengths == "shared")
    for first, second, third, fourth, low, high in zip(*by_two, *by_four, strict=True):
        for halves, full in (((first, second), low), ((third, fourth), high)):
            for name in ("masks_context", "masks_target"):
                for a, b, mask in zip(*(getattr(half, name) for half in halves), getattr(full, name), strict=True):
                    assert torch.equal(torch.cat([a, b]), mask)
        one, other = (tokens.masks_context[0] for tokens in (low, high))
        assert one.shape != other.shape or not torch.equal(one, other)
    with pytest.raises(ValueError, match="mask_batch_size 3 must divide the global batch of 4"):
        train(videos, mask_batch_size=3)


def test_shapes_and_masks_for_each_clip(videos):
    batch = train(videos, last=1)[0]
    assert len(batch) == 4
    assert batch.clips.shape == (8, 3, 4, 32, 32)
    assert batch.clips.dtype == torch.uint8
    assert batch.frames.shape == (4, 2, 4)
    assert [len(mask) for mask in batch.masks_context + batch.masks_target] == [8] * 4
    moved = batch.to("meta")
    assert moved.clips.device.type == moved.masks_target[1].device.type == "meta"


class FailingTransform(TrainTransform):
    """Ends or blocks its worker at videos of 64 rows, as a decoder may: each time, or until `marker` exists."""

    def __init__(self, failure, marker=None):
        super().__init__(AugConfig(), 32)
        self.failure, self.marker = failure, marker

    def __call__(self, frames, rng):
        if frames.shape[1] == 64 and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            time.sleep(1000) if self.failure is None else os.kill(os.getpid(), self.failure)
        return super().__call__(frames, rng)


@pytest.fixture
def one_of_64_rows(make_video, tmp_path):
    for name, height in (("a", 96), ("b", 80), ("c", 64), ("d", 96)):
        make_video(tmp_path / f"{name}.mp4", height=height, frames=12)
    return tmp_path


def batches_with(folder, failure, marker=None, workers=2):
    data = DataConfig(datasets=[str(folder)], sampling_rate=1, num_frames=4, crop_size=32)
    dataset = Dataset(data, FailingTransform(failure, marker), on_error="replace")
    stream = SampleStream(dataset.sizes, None, 2, seed=0)
    return list(
        make_train_loader(
            dataset, stream, None, seed=0, first_step=0, last_step=6, num_workers=workers,
            timeout=3 if failure is None else 0,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("failure", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, None])
def test_a_video_that_crashes_or_blocks_its_worker_is_replaced_and_named(failure, one_of_64_rows, caplog):
    batches = batches_with(one_of_64_rows, failure)
    assert [batch.step for batch in batches] == list(range(6))
    bad_path = str(one_of_64_rows / "c.mp4")
    bad = [file for batch in batches for file in batch.bad]
    assert {file.path for file in bad} == {bad_path}
    assert len(bad) >= 3  # once an epoch
    assert bad[0].reason.startswith("its worker crashed or did not respond: DataLoader")
    assert "restarting the data workers without samples [2]" in caplog.text
    # a crash is the decoder's; other ends may have had another reason the first time
    assert ("samples [2] are read again" in caplog.text) == (failure in (signal.SIGKILL, None))
    assert all(len(batch) == 2 and bad_path not in batch.paths for batch in batches)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [signal.SIGKILL, signal.SIGBUS, None])
def test_a_worker_that_is_killed_once_changes_nothing(failure, one_of_64_rows, tmp_path_factory, caplog):
    marker = tmp_path_factory.mktemp("marker") / "failed"
    disturbed = batches_with(one_of_64_rows, failure, marker)
    assert marker.exists()
    assert "samples [2] are read again" in caplog.text
    for one, two in zip(disturbed, batches_with(one_of_64_rows, failure, marker, workers=0), strict=True):
        assert_equal(one, two)
        assert not one.bad


def test_a_connection_that_closes_before_the_worker_has_ended_is_its_end(monkeypatch, tmp_path):
    class Killed:
        dataset = SimpleNamespace(unreadable={})

        def __getitem__(self, step):
            if step == 1 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            return step

    def reset(self, batches, *args):
        if not (tmp_path / "reset").exists() and (tmp_path / "killed").exists():
            (tmp_path / "reset").touch()
            batches = ConnectionResets()
        return read(self, batches, *args)

    class ConnectionResets:
        def __next__(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    read = Loader._next
    monkeypatch.setattr(Loader, "_next", reset)
    assert list(Loader(Killed(), range(3), 1, False, 0)) == [0, 1, 2]
    assert (tmp_path / "reset").exists()


@pytest.mark.slow
def test_workers_that_are_always_killed_while_idle_are_an_error(videos, monkeypatch):
    class Killing:
        dataset = SimpleNamespace(unreadable={})

        def __getitem__(self, step):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("tubelet.data.workers.MAX_RESTARTS", 1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(Loader(Killing(), range(4), 1, False, 0))


def test_loaders_do_not_change_the_global_generators(videos):
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(videos, last=2)
    train(videos, last=2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_once_in_order(videos, workers):
    data = DataConfig(datasets=[str(videos)], sampling_rate=2, num_frames=4, crop_size=32, num_clips=2)
    dataset = Dataset(data, EvalTransform(32, 3), on_error="raise")
    batches = list(make_eval_loader(dataset, batch_size=4, num_workers=workers))
    assert [len(batch) for batch in batches] == [4, 2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(6))
    assert batches[0].clips.shape == (4 * 2 * 3, 3, 4, 32, 32)
    parts = [list(make_eval_loader(dataset, batch_size=4, world=World(rank, 4))) for rank in range(4)]
    seen = [index for part in parts for batch in part for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(6))
    chosen = make_eval_loader(dataset, indices=[4, 1, 5], batch_size=2, num_workers=workers)
    assert [batch.indices.tolist() for batch in chosen] == [[4, 1], [5]]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_an_unreadable_video_is_not_wrapped(videos, broken_video, workers):
    data = DataConfig(datasets=[str(videos), str(broken_video)], sampling_rate=2, num_frames=4, crop_size=32)
    batches = make_eval_loader(Dataset(data, EvalTransform(32), on_error="raise"), batch_size=4, num_workers=workers)
    began = time.monotonic()
    with pytest.raises(VideoError, match="broken.mp4: cannot decode frames"):
        list(batches)
    assert time.monotonic() - began < 4  # did not wait for a hung worker


def test_evenly_spaced_indices_are_within_the_data_set():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 4).tolist() == [0, 1, 2]
    assert evenly_spaced(22_000_000, 256)[-1] == 21_999_999


def test_the_death_of_a_worker_interrupts_nothing_even_after_another_data_loader():
    """torch's handler of SIGCHLD raises in whatever the main process does when a worker dies."""
    script = """
import signal
from types import SimpleNamespace
from torch.utils.data import DataLoader
from tubelet.data.workers import Loader

list(DataLoader(range(2), num_workers=1))

class Steps:
    dataset = SimpleNamespace(unreadable={})
    def __getitem__(self, step):
        return step

assert list(Loader(Steps(), range(3), 1, False, 0)) == [0, 1, 2]
print(repr(signal.getsignal(signal.SIGCHLD)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{signal.SIG_DFL!r}\n", done.stderr
