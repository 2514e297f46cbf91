"""A checkpoint holds the state as it was when it was begun, whatever training does meanwhile."""

import pytest
import torch

from tubelet.runtime import checkpoint, checkpoint_format
from tubelet.runtime.checkpoint import CheckpointState
from tubelet.runtime.checkpoint_writer import Saver
from tubelet.runtime.distributed import World


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    weight, moments, grows = torch.zeros(300, 300), [torch.zeros(5), torch.zeros(7)], torch.zeros(2)
    saver = Saver(tmp_path, keep=3, world=World(), sharded=False)
    for step in (1, 2, 3):
        for tensor in (weight, *moments, grows):
            tensor.fill_(step)
        state = CheckpointState({"model": {"weight": weight}}, {"moments": moments, "grows": grows})
        saver.start(step, lambda state=state: state)
        for tensor in (weight, *moments, grows):
            tensor.fill_(-1)
        grows = torch.zeros(len(grows) + 1, dtype=torch.float64 if step == 2 else torch.float32)
    saver.finish()
    saver.close()
    for step, shape, dtype in ((1, 2, torch.float32), (2, 3, torch.float32), (3, 4, torch.float64)):
        saved = checkpoint.read(tmp_path / f"step-{step:08d}")
        grows = saved.optimizer["grows"]
        assert (saved.metadata["step"], grows.shape, grows.dtype) == (step, (shape,), dtype)
        for tensor in (saved.weights["model"]["weight"], *saved.optimizer["moments"], grows):
            assert (tensor == step).all()


def test_error_of_a_checkpoint_says_what_went_wrong(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_format, "save_tensors", full_disk)
    saver = Saver(tmp_path, keep=3, world=World(), sharded=False)
    saver.start(1, CheckpointState)
    with pytest.raises(checkpoint.CheckpointError, match=r"could not be written \(No space left on device\)"):
        saver.finish()
    saver.close()
