"""Samples with any views and targets, stacked, split and moved."""

import dataclasses

import numpy as np
import pytest
import torch

from tubelet.config import UserError
from tubelet.data import BadFile, Draw, Sample
from tubelet.data.collate import collate
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream


def sample(index, views=None, **targets):
    """Two global views of 8 x 8 pixels and three local ones of 4 x 4, which carry their sample's number."""
    views = {"global": (2, 3, 4, 8, 8), "local": (3, 3, 2, 4, 4)} if views is None else views
    return Sample(
        {name: torch.full(shape, index, dtype=torch.uint8) for name, shape in views.items()},
        targets,
        index,
        f"{index}.mp4",
        torch.zeros(1, 4, dtype=torch.int64),
    )


def excluded(index):
    return Sample({}, {"label": 0}, index, f"{index}.mp4", torch.empty(0), (BadFile(f"{index}.mp4", "broken"),))


def rows_of(view):
    return view.flatten(1)[:, 0].tolist()


def test_views_are_stacked_by_name_with_the_rows_of_a_sample_together():
    batch = collate([sample(3), sample(5)], step=7)
    assert (len(batch), batch.step, batch.num_clips) == (2, 7, 10)
    assert {name: tuple(view.shape) for name, view in batch.views.items()} == {
        "global": (4, 3, 4, 8, 8),
        "local": (6, 3, 2, 4, 4),
    }
    assert rows_of(batch.views["global"]) == [3, 3, 5, 5]
    assert rows_of(batch.views["local"]) == [3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3, -1), torch.tensor([3, -1])),
        ((np.int32(3), True), torch.tensor([3, 1])),
        ((0.5, 2), torch.tensor([0.5, 2.0])),
        ((np.float64(0.1), 0.2), torch.tensor([0.1, 0.2])),
        (("a cat", "two dogs"), ("a cat", "two dogs")),
        (([0.0, 1.0], [2.0, 3.0]), torch.tensor([[0.0, 1.0], [2.0, 3.0]])),
        ((np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)), torch.tensor([[[0] * 3] * 2, [[1] * 3] * 2]).byte()),
        ((torch.tensor(1.5), torch.tensor(2.5)), torch.tensor([1.5, 2.5])),
    ],
    ids=["class", "numpy class", "number", "numpy number", "text", "vector", "dense", "scalar tensor"],
)
def test_targets_are_stacked_by_kind(values, expected):
    target = collate([sample(i, target=value) for i, value in enumerate(values)], step=0).targets["target"]
    if isinstance(expected, tuple):
        assert target == expected
    else:
        torch.testing.assert_close(target, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (sample(1, {"clip": (1, 3, 4, 8, 8)}, vector=[1.0]), r"1.mp4 has the views clip, 0.mp4 has global, local"),
        (
            sample(1, {"global": (2, 3, 4, 8, 9), "local": (3, 3, 2, 4, 4)}, vector=[1.0]),
            r"view 'global' of 1.mp4 is \[2, 3, 4, 8, 9\] uint8, of 0.mp4 \[2, 3, 4, 8, 8\] uint8",
        ),
        (sample(1, label=3), "1.mp4 has the targets label, 0.mp4 has vector"),
        (sample(1), r"1.mp4 has the targets \(none\), 0.mp4 has vector"),
        (sample(1, vector=[1.0, 2.0]), r"target 'vector' of 1.mp4 is \[2\] float32, of 0.mp4 \[1\] float32"),
        (sample(1, vector=[1]), r"target 'vector' of 1.mp4 is \[1\] int64, of 0.mp4 \[1\] float32"),
        (sample(1, vector="one"), "target 'vector' of 1.mp4 is a str, of 0.mp4 a list"),
        (sample(1, vector=None), "target 'vector' of 1.mp4 is a NoneType, of 0.mp4 a list"),
    ],
)
def test_samples_that_differ_are_an_error_that_names_them(second, message):
    with pytest.raises(UserError, match=message):
        collate([sample(0, vector=[0.0]), second], step=0)


def test_excluded_samples_are_left_out():
    batch = collate([excluded(0), sample(1, label=4), excluded(2)], step=0)
    assert (len(batch), batch.paths, batch.labels.tolist()) == (1, ("1.mp4",), [4])
    assert [bad.path for bad in batch.bad] == ["0.mp4", "2.mp4"]
    nothing = collate([excluded(0)], step=0)
    assert (len(nothing), nothing.num_clips, nothing.views, nothing.targets) == (0, 0, {}, {})
    assert [len(part) for part in nothing.to("cpu").split(3)] == [0]


def full_batch(samples):
    batch = collate([sample(i, label=i, text=str(i), depth=np.full((2, 2), i)) for i in range(samples)], step=1)
    batch = dataclasses.replace(batch, num_global=2 * samples, bad=(BadFile("x.mp4", "broken"),))
    masks = torch.arange(samples).repeat_interleave(2)[:, None].expand(-1, 5)
    return batch.with_masks([masks], [masks + 100])


@pytest.mark.parametrize(("samples", "parts", "sizes"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (2, 4, [1, 1]), (3, 1, [3])])
def test_split_keeps_everything_of_a_sample_together(samples, parts, sizes):
    batch = full_batch(samples)
    split = batch.split(parts)
    assert [len(part) for part in split] == sizes
    first = 0
    for part, size in zip(split, sizes, strict=True):
        own = list(range(first, first + size))
        assert part.labels.tolist() == part.indices.tolist() == own
        assert part.targets["text"] == tuple(map(str, own))
        assert part.targets["depth"][:, 0, 0].tolist() == own
        assert part.paths == tuple(f"{i}.mp4" for i in own)
        assert rows_of(part.views["global"]) == [i for i in own for _ in range(2)]
        assert rows_of(part.views["local"]) == [i for i in own for _ in range(3)]
        assert part.masks_context[0][:, 0].tolist() == [i for i in own for _ in range(2)]
        assert part.masks_target[0][:, 0].tolist() == [100 + i for i in own for _ in range(2)]
        assert part.frames.shape == (size, 1, 4)
        assert (part.step, part.num_global) == (1, 2 * samples)
        first += size
    assert [len(part.bad) for part in split] == [1] + [0] * (len(split) - 1)  # counted once


def test_every_tensor_is_moved_and_text_stays():
    moved = full_batch(2).to("meta")
    tensors = [*moved.views.values(), moved.labels, moved.targets["depth"], moved.indices, moved.frames]
    tensors += [*moved.masks_context, *moved.masks_target]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets["text"] == ("0", "1")
    assert (moved.num_global, moved.paths) == (4, ("0.mp4", "1.mp4"))


class AnySamples:
    """Stands for a data set of several views and kinds of targets; sample 2 of the last batch does not fit."""

    unreadable: dict[int, str] = {}

    def __len__(self):
        return 6

    def __getitem__(self, draw: Draw):
        length = 3 if draw.index == 5 else 2
        return sample(draw.index, label=draw.index, text=f"number {draw.index}", vector=[float(draw.index)] * length)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_pass_on_views_and_targets_and_explain_samples_that_do_not_fit(workers):
    stream = SampleStream([6], None, 2, seed=0, shuffle=False)
    loader = make_train_loader(
        AnySamples(), stream, None, seed=0, first_step=0, last_step=3, num_workers=workers, pin_memory=False
    )
    batches = iter(loader)
    for expected in ([0, 1], [2, 3]):
        batch = next(batches)
        assert batch.labels.tolist() == expected
        assert batch.targets["text"] == tuple(f"number {index}" for index in expected)
        assert rows_of(batch.views["local"]) == [index for index in expected for _ in range(3)]
    with pytest.raises(UserError, match=r"target 'vector' of 5.mp4 is \[3\] float32, of 4.mp4 \[2\]"):
        next(batches)
