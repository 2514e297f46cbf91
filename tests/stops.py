"""Runs that end in the middle, as a crash ends them."""

import contextlib

import pytest

from tubelet.training.trainer import Trainer


class Stopped(Exception):
    """Raised in place of an update."""


@contextlib.contextmanager
def stopped_at(step):
    """The run within ends with an exception instead of taking the step after `step` steps."""
    update = Trainer.update

    def stop(trainer, clip_grad):
        if trainer.step == step:
            raise Stopped
        return update(trainer, clip_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", stop)
        with pytest.raises(Stopped):
            yield
