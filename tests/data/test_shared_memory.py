"""Full shared memory is named, with what to do about it."""

import pytest
import torch

from tubelet.config import UserError
from tubelet.data import worker_monitor, workers
from tubelet.data.workers import Loader


class Source:
    """Batches that torch cannot pass on; the message is that of a worker's death or of an allocation."""

    dataset = None

    def __init__(self, message):
        self.message = message

    def __getitem__(self, step):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
    ],
)
def test_batches_that_do_not_fit_are_explained(monkeypatch, message):
    monkeypatch.setattr(worker_monitor, "MAX_READ_SECONDS", 0)
    with pytest.raises(UserError, match=r"/dev/shm, which is full \(\d+ MB are free now\).*num_workers=0"):
        next(iter(Loader(Source(message), range(3), 0, False, 0)))


def test_other_errors_keep_their_own_message(monkeypatch):
    monkeypatch.setattr(worker_monitor, "MAX_READ_SECONDS", 0)
    with pytest.raises(RuntimeError, match="out of memory of another kind"):
        next(iter(Loader(Source("out of memory of another kind"), range(3), 0, False, 0)))


def test_no_room_for_the_table_of_workers_is_explained(monkeypatch):
    def refuse(self):
        raise RuntimeError("unable to open shared memory object </torch_7_1_0> in read-write mode")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match="/dev/shm"):
        next(iter(Loader(Source(""), range(3), 1, False, 0)))
    assert workers._explain_memory(RuntimeError("x")).args == ("x",)
