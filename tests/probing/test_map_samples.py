"""Results for each sample of an evaluation do not depend on the number of processes."""

import json

import pytest
import torch
from torch import nn

from tests.processes import run
from tubelet.data import BadFile, Sample
from tubelet.data.loader import make_eval_loader
from tubelet.probing.map_samples import map_samples
from tubelet.runtime.distributed import ONE_PROCESS
from tubelet.runtime.watchdog import Watchdog

BROKEN = (2, 5)


class Numbers:
    """Seven samples whose clips hold their number; two of them cannot be read."""

    unreadable = {}

    def __len__(self):
        return 7

    def __getitem__(self, draw):
        clips = torch.full((1, 3, 2, 4, 4), draw.index, dtype=torch.uint8)
        bad = (BadFile(f"{draw.index}.mp4", "broken"),) if draw.index in BROKEN else ()
        return Sample({} if bad else {"clip": clips}, {}, draw.index, f"{draw.index}.mp4", torch.zeros(1, 2), bad)


def doubled(folder, world):
    model = nn.Dropout()
    loader = make_eval_loader(Numbers(), batch_size=2, world=world)

    def compute(batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        return (2 * batch.clips.float().mean((1, 2, 3, 4))).tolist()

    results, bad = map_samples(compute, model, loader, torch.float32, Watchdog(world, 60.0))
    assert model.training
    (folder / f"{world.rank}.json").write_text(json.dumps([sorted(results.items()), sorted(bad.items())]))


@pytest.mark.parametrize("processes", [1, 2])
def test_all_processes_get_all_results(processes, tmp_path):
    if processes == 1:
        doubled(tmp_path, ONE_PROCESS)
    else:
        run(doubled, tmp_path, processes)
    expected = [[i, 2.0 * i] for i in range(7) if i not in BROKEN], [[f"{i}.mp4", "broken"] for i in BROKEN]
    for rank in range(processes):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == list(expected)
