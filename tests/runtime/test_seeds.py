"""Draws are pinned: a run must continue bit for bit, also with a newer version of this code."""

import torch

from tubelet.runtime.seeds import Purpose, numpy_generator, seed_for, torch_generator


def test_draws_are_those_of_every_version():
    assert seed_for(3, 7, "noise") == 5733865137998187275
    assert numpy_generator(3, Purpose.MASKS, 7, 1).integers(10**6, size=3).tolist() == [609716, 852942, 400002]
    assert numpy_generator(0, Purpose.CLIP, 2, 5).integers(10**6, size=3).tolist() == [560543, 463201, 967918]
    assert torch.randperm(8, generator=torch_generator(3, "order", 2)).tolist() == [5, 1, 4, 6, 3, 7, 2, 0]


def test_another_purpose_or_key_gives_other_draws():
    keys = [(0, Purpose.CLIP, 1, 2), (0, Purpose.CLIP, 2, 1), (0, Purpose.REPLACEMENT, 1, 2), (1, Purpose.CLIP, 1, 2)]
    assert len({int(numpy_generator(*key).integers(2**60)) for key in keys}) == 4
    assert len({seed_for(0, 1, "a"), seed_for(0, 1, "b"), seed_for(1, 0, "a"), seed_for(0, "1", "a")}) == 4
