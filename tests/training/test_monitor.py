"""The monitor on a data set of random clips, on one and several processes."""

import json
import math
import weakref

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.processes import run as run_on_processes
from tubelet.data import BadFile, Sample, to_float
from tubelet.grid import Grid
from tubelet.runtime.distributed import World
from tubelet.training.feature_statistics import TokenMoments, summarize
from tubelet.training.monitor import FeatureMonitor

COLORS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
CLIPS, WIDTH = 11, 6


class RandomClips:
    """`CLIPS` clips of 2 × 4 × 4; those whose indices are in `bad` are unreadable."""

    def __init__(self, bad=(), fails=False, labelled=True):
        self.bad, self.fails, self.labelled, self.refused = bad, fails, labelled, {}

    def __len__(self):
        return CLIPS

    def __getitem__(self, draw):
        if self.fails:
            raise ValueError("no such codec")
        frames = torch.zeros(1, 2, dtype=torch.int64)
        if draw.index in self.bad:
            return Sample({}, {}, draw.index, "", frames, (BadFile(f"{draw.index}.mp4", "broken"),))
        targets = {"label": draw.index % 2} if self.labelled else {}
        return Sample({"clip": clip(draw.index)[None]}, targets, draw.index, "", frames)


def clip(index):
    return torch.randint(0, 255, (3, 2, 4, 4), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)


class Encoder(torch.nn.Module):
    """Each frame's rows as tokens [B, 8, 12] through a linear layer; with dropout, which must not act."""

    @staticmethod
    def grid_size(num_frames, height, width):
        return Grid(num_frames, height, 1)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = torch.nn.Linear(12, WIDTH), torch.nn.Dropout(0.5)

    def forward(self, video):
        return self.dropout(self.linear(video.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)))


def monitor(dataset=None, world=None, **options):
    mean, std = COLORS
    options = {"num_clips": CLIPS, "batch_size": 4, **options}
    return FeatureMonitor(lambda: dataset or RandomClips(), mean=mean, std=std, world=world or World(), **options)


@torch.no_grad()
def expected(indices):
    clips = torch.stack([clip(index) for index in indices])
    tokens = Encoder().eval()(to_float(clips, *COLORS))
    return summarize(TokenMoments.of(tokens, slots=2), torch.tensor([index % 2 for index in indices]))


def test_figures_are_those_of_the_readable_clips(caplog):
    encoder = Encoder()
    encoder.linear.eval()  # a frozen part of a model that is trained
    watched = monitor(RandomClips(bad=(3, 10)), num_workers=1)
    for _ in range(2):
        assert watched.measure(encoder) == pytest.approx(expected([0, 1, 2, 4, 5, 6, 7, 8, 9]), abs=1e-5)
    assert (encoder.training, encoder.linear.training, encoder.dropout.training) == (True, False, True)
    assert caplog.text.count("3.mp4: broken") == 1  # the second time nothing is read


def test_fewer_clips_are_evenly_spaced():
    assert monitor(num_clips=3).measure(Encoder()) == pytest.approx(expected([0, 5, 10]), abs=1e-5)


def test_clips_without_labels_have_no_nearest_neighbors_of_their_class():
    figures = expected(range(CLIPS))
    figures.pop("knn")
    assert monitor(RandomClips(labelled=False)).measure(Encoder()) == pytest.approx(figures, abs=1e-5)


def test_the_encoder_runs_in_the_types_and_sizes_of_training():
    seen = []
    encoder = Encoder()
    encoder.linear.register_forward_hook(lambda module, args, output: seen.append((len(output), output.dtype)))
    monitor(dtype=torch.bfloat16).measure(encoder)
    assert seen == [(4, torch.bfloat16)] * 3  # 11 clips: the last batch is filled up


def test_tokens_of_a_batch_are_dropped_before_the_next_one():
    """Only their statistics are kept: memory does not grow with clips times tokens."""
    outputs = []

    def check(module, args, output):
        assert all(previous() is None for previous in outputs)
        outputs.append(weakref.ref(output))

    encoder = Encoder()
    encoder.register_forward_hook(check)
    monitor().measure(encoder)
    assert len(outputs) == 3


def test_without_clips_nothing_is_read():
    watched = FeatureMonitor(None, num_clips=0, batch_size=4, mean=(), std=(), world=World())
    assert watched.measure(Encoder()) == {}


@pytest.mark.parametrize("readable", [0, 1])
def test_unreadable_clips_turn_it_off_with_a_warning(readable, caplog):
    watched = monitor(RandomClips(bad=range(readable, CLIPS)))
    assert watched.measure(Encoder()) == {}
    assert f"only {readable} of 11 clips can be read" in caplog.text
    caplog.clear()
    assert watched.measure(Encoder()) == {}
    assert not caplog.text


def test_failures_are_warnings_with_their_traceback(caplog):
    assert monitor(RandomClips(fails=True)).measure(Encoder()) == {}
    assert "reading the clips to measure failed" in caplog.text
    assert "no such codec" in caplog.text
    watched = monitor()
    assert watched.measure(torch.nn.Linear(3, 3)) == {}
    assert "measuring the features failed" in caplog.text
    assert "mat1 and mat2" in caplog.text
    assert watched.measure(Encoder()) == pytest.approx(expected(range(CLIPS)), abs=1e-5)


def test_features_that_are_not_finite_are_a_warning(caplog):
    encoder = Encoder()
    with torch.no_grad():
        encoder.linear.bias[0] = torch.nan
    assert all(math.isnan(figure) for figure in monitor().measure(encoder).values())
    assert "not finite" in caplog.text


def test_weights_that_are_not_finite_or_overflow_never_end_the_run(caplog):
    """`eigvalsh` raises LinAlgError where an entry is not finite."""
    for scale in (1e30, math.inf):
        encoder = Encoder()
        with torch.no_grad():
            encoder.linear.weight.mul_(scale)
        figures = monitor().measure(encoder)
        assert all(math.isnan(figure) for figure in figures.values())
        assert "not finite" in caplog.text
        caplog.clear()


def test_an_error_in_the_statistics_is_a_warning(monkeypatch, caplog):
    def fail(*arguments):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr("tubelet.training.monitor.summarize", fail)
    assert monitor().measure(Encoder()) == {}
    assert "computing statistics of the features failed" in caplog.text


def test_progress_is_noted():
    notes = []
    monitor(num_clips=5).measure(Encoder(), notes.append)
    assert [note.split()[0] for note in notes] == [*["reading"] * 5, *["measuring"] * 2]


def measure(folder, world):
    """In each process: figures replicated and sharded, with a failing data set, encoder and most clips unreadable."""
    sharded = Encoder()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world.world_size,)))
    bad, few = RandomClips(bad=(3, 10)), RandomClips(bad=set(range(CLIPS)) - {1, 7})
    found = {
        "replicated": monitor(bad, world).measure(Encoder()),
        "sharded": monitor(bad, world).measure(sharded),
        "only one process has clips": monitor(few, world).measure(sharded),
        "data fails": monitor(RandomClips(fails=world.rank == 1), world).measure(sharded),
        "encoder fails": monitor(bad, world).measure(Encoder() if world.rank != 1 else torch.nn.Linear(3, 3)),
        "afterwards": monitor(bad, world).measure(sharded),
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_keep_in_step(processes, tmp_path):
    run_on_processes(measure, tmp_path, processes)
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in ("replicated", "sharded", "afterwards"):
            assert found[name] == pytest.approx(expected([0, 1, 2, 4, 5, 6, 7, 8, 9]), abs=1e-5)
        assert found["only one process has clips"] == pytest.approx(expected([1, 7]), abs=1e-5)
        assert found["data fails"] == found["encoder fails"] == {}
