import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from tubelet.config import ConfigError
from tubelet.data import AugConfig, ViewOptions, to_float
from tubelet.data.transforms import (
    EvalTransform,
    MultiViewTransform,
    ShuffledFrames,
    TrainTransform,
    crop,
    erase,
    random_window,
)

PLAIN = {"horizontal_flip": False}


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 90, 120, 3), dtype=np.uint8)


def still(frames):
    """The same picture in every frame."""
    return np.ascontiguousarray(np.broadcast_to(frames[:1], frames.shape))


@pytest.mark.parametrize(
    "window", [(3, 5, 80, 100), (0, 0, 90, 120), (40, 60, 20, 24), (10, 10, 64, 64), (0, 7, 64, 9)]
)
def test_cropping_before_resizing_on_uint8_is_the_float64_result_rounded(frames, window):
    top, left, height, width = window
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).double()[:, :, top : top + height, left : left + width]
    exact = functional.resize(pixels, [64, 64], antialias=True)
    result = crop(frames, window, 64)
    assert result.dtype == torch.uint8
    assert (
        result.double() - exact
    ).abs().max() <= 1.001  # torch's uint8 kernel rounds after each of the two directions
    assert (result.double() - exact).abs().mean() <= 0.35  # rounding once would give 0.25


def test_training_clip_is_one_window_of_all_frames(frames):
    transform = TrainTransform(AugConfig(**PLAIN), 64)
    clip = transform(still(frames), np.random.default_rng(4))
    assert clip.shape == (1, 3, 5, 64, 64)
    assert clip.is_contiguous()
    assert (clip == clip[:, :, :1]).all()
    window = random_window(90, 120, (0.3, 1.0), (0.75, 1.35), np.random.default_rng(4))
    torch.testing.assert_close(clip[0].transpose(0, 1), crop(still(frames), window, 64))


@pytest.mark.parametrize(
    "changed",
    [
        {"auto_augment": True},
        {"color_jitter": 0.4},
        {"reprob": 1.0},
        {"motion_shift": True},
        {"horizontal_flip": True},
        {"vertical_flip": True},
        {"rotate90": True},
    ],
)
def test_each_augmentation_changes_the_clip_repeatably_and_leaves_the_global_generator(frames, changed):
    transform, plain = TrainTransform(AugConfig(**PLAIN | changed), 32), TrainTransform(AugConfig(**PLAIN), 32)
    before = torch.get_rng_state()
    clips = [transform(still(frames), np.random.default_rng(seed)) for seed in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    again = [transform(still(frames), np.random.default_rng(seed)) for seed in range(6)]
    assert all(torch.equal(one, two) for one, two in zip(clips, again, strict=True))
    assert all(clip.dtype == torch.uint8 and clip.shape == (1, 3, 5, 32, 32) for clip in clips)
    unchanged = [plain(still(frames), np.random.default_rng(seed)) for seed in range(6)]
    assert any(not torch.equal(one, two) for one, two in zip(clips, unchanged, strict=True))
    same_in_all_frames = all((clip == clip[:, :, :1]).all() for clip in clips)
    assert same_in_all_frames == ("motion_shift" not in changed and "reprob" not in changed)


def test_flip_comes_half_of_the_time(frames):
    flipping, plain = TrainTransform(AugConfig(), 16), TrainTransform(AugConfig(**PLAIN), 16)
    flipped = 0
    for seed in range(200):
        one = flipping(frames[:1], np.random.default_rng(seed))
        other = plain(frames[:1], np.random.default_rng(seed))
        assert torch.equal(one, other) or torch.equal(one, other.flip(-1))
        flipped += not torch.equal(one, other)
    assert 70 < flipped < 130


def test_clips_from_above_are_seen_in_all_eight_orientations(frames):
    whole = {"random_resize_scale": (1.0, 1.0), "random_resize_aspect_ratio": (1.0, 1.0)}
    square = np.ascontiguousarray(frames[:, :90, :90])
    original = TrainTransform(AugConfig(**whole, **PLAIN), 90)(square, np.random.default_rng(0))
    turned = [original.rot90(turns, (-2, -1)) for turns in range(4)]
    orientations = turned + [clip.flip(-1) for clip in turned]

    def drawn(**options):
        transform = TrainTransform(AugConfig(**whole, **options), 90)
        clips = [transform(square, np.random.default_rng(seed)) for seed in range(60)]
        return {next(i for i, clip in enumerate(orientations) if torch.equal(clip, other)) for other in clips}

    assert drawn(horizontal_flip=True, rotate90=True) == set(range(8))
    assert drawn(horizontal_flip=False, rotate90=True) == {0, 1, 2, 3}
    assert drawn(horizontal_flip=False, vertical_flip=True) == {0, 6}  # 6: turned by half and mirrored
    with pytest.raises(ValueError, match="rotate90 needs a square crop_size"):
        TrainTransform(AugConfig(rotate90=True), (32, 48))


def test_views_are_crops_of_their_own_windows_of_frames(frames):
    frames = frames.copy()
    frames[:, :, :, 2] = 50 * np.arange(5)[:, None, None]  # the blue channel is the time
    views = {
        "global": ViewOptions(count=2, data_aug={"random_resize_scale": [0.9, 1.0]}),
        "local": ViewOptions(count=3, crop_size=(16, 24), num_frames=2),
        "none": ViewOptions(count=0),
    }
    transform = MultiViewTransform(AugConfig(random_resize_scale=(0.1, 0.2)), 64, views)
    crops = transform(frames, np.random.default_rng(0))
    assert {name: crop.shape for name, crop in crops.items()} == {
        "global": (2, 3, 5, 64, 64),
        "local": (3, 3, 2, 16, 24),
    }
    assert not torch.equal(*crops["global"])
    again = transform(frames, np.random.default_rng(0))
    assert all(torch.equal(again[name], crop) for name, crop in crops.items())
    starts = set()
    for seed in range(40):
        times = transform(frames, np.random.default_rng(seed))["local"][:, 2].float().mean((2, 3)) / 50
        assert ((times[:, 1] - times[:, 0]).round() == 1).all()
        starts |= set(times[:, 0].round().int().tolist())
    assert starts == {0, 1, 2, 3}


def test_single_view_is_the_training_clip(frames):
    """A crop of a view draws what `TrainTransform` draws, with the augmentation of the view."""
    view = ViewOptions(data_aug={"random_resize_scale": [0.2, 0.3], "color_jitter": 0.3})
    crops = MultiViewTransform(AugConfig(reprob=1.0), 32, {"global": view})(frames, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.integers(1, size=1)  # the start of the window of frames
    own = AugConfig(reprob=1.0, random_resize_scale=(0.2, 0.3), color_jitter=0.3)
    assert torch.equal(crops["global"], TrainTransform(own, 32)(frames, rng))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"data_aug": {"colour_jitter": 1.0}}, r"objective.views.a.data_aug.colour_jitter: unknown key. Did you mean"),
        ({"data_aug": {"random_resize_scale": [0.5, 1.5]}}, "objective.views.a.data_aug: random_resize_scale"),
        ({"data_aug": {"normalize_std": [1, 1, 1]}}, "objective.views.a.data_aug.normalize_std: all views are normal"),
        ({"data_aug": {"rotate90": True}, "crop_size": (8, 16)}, "objective.views.a.data_aug: rotate90 needs a square"),
    ],
)
def test_invalid_augmentation_of_a_view_names_the_key(view, message):
    with pytest.raises(ConfigError, match=message):
        MultiViewTransform(AugConfig(), 32, {"a": ViewOptions(**view)})


def test_random_windows_meet_area_and_aspect():
    rng = np.random.default_rng(0)
    windows = np.array([random_window(300, 400, (0.3, 0.6), (0.75, 1.35), rng) for _ in range(3000)])
    top, left, height, width = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, aspect = height * width / 120_000, width / height
    assert 0.295 < area.min() < 0.31
    assert 0.57 < area.max() < 0.605
    assert abs(np.log(aspect).mean() - np.log(0.75 * 1.35) / 2) < 0.02
    assert top.min() == 0
    assert (top + height).max() == 300


def test_a_window_that_never_fits_becomes_the_middle_one():
    assert random_window(10, 1000, (1.0, 1.0), (0.75, 1.35), np.random.default_rng(0)) == (0, 493, 10, 14)
    assert random_window(1, 1, (0.3, 1.0), (0.75, 1.35), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_evaluation_views_lie_along_the_long_side(frames):
    for turned in (False, True):
        pixels = frames.transpose(0, 2, 1, 3) if turned else frames
        views = EvalTransform(90, 3)(np.ascontiguousarray(pixels))
        assert views.shape == (3, 3, 5, 90, 90)
        for view, start in zip(views, (0, 15, 30), strict=True):
            part = pixels[:, start : start + 90] if turned else pixels[:, :, start : start + 90]
            np.testing.assert_array_equal(view.permute(1, 2, 3, 0), part)
    torch.testing.assert_close(EvalTransform(64, 1)(frames)[0], EvalTransform(64, 3)(frames)[1])


def test_erased_box_is_standard_normal_after_normalisation():
    clip = torch.full((3, 40, 64, 64), 255, dtype=torch.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.1, 0.12, 0.14)
    erase(clip, np.random.default_rng(0), mean, std)
    untouched = (clip == 255).all(dim=(0, 1))
    assert 0.02 < (~untouched).float().mean() < 0.34
    noise = to_float(clip, mean, std)[:, :, ~untouched]
    assert noise.mean().abs() < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_to_float_is_the_textbook_normalisation(frames):
    clips = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    column = (1, 3, 1, 1, 1)
    expected = (clips.double() / 255 - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    torch.testing.assert_close(to_float(clips, mean, std).double(), expected, atol=2e-6, rtol=0)
    assert to_float(clips, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_crops_may_be_rectangles(frames):
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)  # of 90x120
    for size, window in (((90, 120), (0, 0)), ((90, 60), (0, 30)), ((45, 120), (22, 0))):
        views = EvalTransform(size, 1)(frames)
        assert views.shape == (1, 3, 5, *size)
        top, left = window
        torch.testing.assert_close(views[0], pixels[:, :, top : top + size[0], left : left + size[1]])
    across = EvalTransform((90, 60), 3)(frames)
    torch.testing.assert_close(across[2], pixels[..., 60:])
    down = EvalTransform((45, 120), 3)(frames)
    torch.testing.assert_close(down[2], pixels[:, :, 45:])
    trained = TrainTransform(AugConfig(), (32, 48))(frames, np.random.default_rng(0))
    assert trained.shape == (1, 3, 5, 32, 48)
    assert TrainTransform(AugConfig(motion_shift=True), (32, 48))(frames, np.random.default_rng(0)).shape[-2:] == (
        32,
        48,
    )


def test_shuffled_frames_are_the_same_frames_in_an_order_drawn_from_the_generator(frames):
    transform = EvalTransform(64, views=2)
    expected = transform(frames)
    orders = set()
    for seed in range(20):
        clip = ShuffledFrames(transform)(frames, np.random.default_rng(seed))
        assert torch.equal(clip, ShuffledFrames(transform)(frames, np.random.default_rng(seed)))
        order = tuple(next(s for s in range(5) if torch.equal(expected[0, :, s], clip[0, :, t])) for t in range(5))
        assert torch.equal(clip, expected[:, :, list(order)])  # in all views
        assert sorted(order) == list(range(5))
        orders.add(order)
    assert len(orders) > 10
