import numpy as np
import pytest
import torch

from tubelet.generation import recognition
from tubelet.generation.recognition import TEST, TRAINING, DigitClips, Recognition, crops, overlap, train_classifier


@pytest.fixture(scope="module")
def digits():
    """Ten classes: a bright square in one of ten places, with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 10
    images = rng.integers(0, 60, (40, 12, 20), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 6 * (label // 5), 4 * (label % 5)
        image[top : top + 6, left : left + 4] = 255
    return images, labels


def test_clips_tell_what_is_where(digits):
    images, labels = digits
    clips = DigitClips(images, labels, seed=5, part=TEST)
    frames, classes, corners = clips(3, 4, num_frames=6)
    assert frames.shape == (4, 1, 6, 64, 64)
    boxes = crops(frames, corners, clips.size)
    assert boxes.shape == (4, 2, 6, 12, 20)
    for clip in range(4):
        for digit in range(2):
            for t in range(6):
                y, x = corners[clip, digit, t].tolist()
                box = frames[clip, 0, t, y : y + 12, x : x + 20]
                assert torch.equal(boxes[clip, digit, t], box)
                of_class = torch.from_numpy(images[labels == int(classes[clip, digit])]).float() / 255
                assert (box >= of_class - 1e-6).flatten(1).all(1).any()  # an overlap shows the brighter one


def test_a_clip_depends_on_seed_part_and_number_alone(digits):
    clips = DigitClips(*digits, seed=5, part=TEST)
    whole, single = clips(0, 4, num_frames=3), clips(2, 1, num_frames=3)
    for a, b in zip(whole, single, strict=True):
        assert torch.equal(a[2:3], b)
    for other in (DigitClips(*digits, seed=6, part=TEST), DigitClips(*digits, seed=5, part=TRAINING)):
        assert not torch.equal(other(0, 4, num_frames=3)[0], whole[0])


def test_overlap_counts_common_pixels():
    corners = torch.randint(0, 30, (50, 2, 1, 2), generator=torch.Generator().manual_seed(0))
    for pair, found in zip(corners[:, :, 0].tolist(), overlap(corners, (12, 20))[:, 0], strict=True):
        pixels = [{(y + i, x + j) for i in range(12) for j in range(20)} for y, x in pair]
        assert found == pytest.approx(len(pixels[0] & pixels[1]) / 240)


def test_accuracy_of_each_frame_and_of_digits_apart():
    corners = torch.tensor([[0, 0], [0, 0]]).view(1, 2, 1, 2).repeat(2, 1, 3, 1)
    corners[0, 1] = 30  # the digits of the first clip are apart in all frames, those of the second never
    classes = torch.tensor([[1, 2], [1, 1]])

    class AlwaysOne(torch.nn.Module):
        def forward(self, boxes):
            return torch.nn.functional.one_hot(torch.ones(len(boxes), dtype=torch.long), 10).float()

    counts = Recognition(AlwaysOne(), (8, 8), num_frames=3)
    for clip in range(2):
        counts.update(torch.rand(1, 1, 3, 64, 64), classes[clip : clip + 1], corners[clip : clip + 1])
    assert counts.compute() == {"all": [0.75] * 3, "apart": [0.5] * 3}
    counts.gather(lambda own: 2 * own, torch.device("cpu"))
    assert counts.total.tolist() == [[8] * 3, [4] * 3]


def test_the_classifier_learns_and_is_the_same_again(digits):
    clips = DigitClips(*digits, seed=0, part=TRAINING)
    before = torch.get_rng_state()
    first, again = (train_classifier(clips, steps=60, batch_size=16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.training
    accuracy = recognition.single_digit_accuracy(first, *digits)
    assert accuracy > 0.8
    frames, classes, corners = DigitClips(*digits, seed=0, part=TEST)(0, 20, num_frames=2)
    counts = Recognition(first, clips.size, num_frames=2)
    counts.update(frames, classes, corners)
    blank = Recognition(first, clips.size, num_frames=2)
    blank.update(torch.zeros_like(frames), classes, corners)
    assert min(counts.compute()["apart"]) > 0.6 > 0.4 > max(blank.compute()["all"])
