import pickle

import pydantic
import pytest

from tubelet.data import AugConfig, DataConfig, Decoder, VideoError


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"datasets": []}, "at least 1 item"),
        ({"sampling_rate": None}, "give one of sampling_rate, fps, clip_duration"),
        ({"fps": 5.0}, "sampling_rate and fps given; keep exactly one"),
        ({"fps": 5.0, "clip_duration": 2.0}, "sampling_rate and fps and clip_duration given"),
        ({"crop_size": 100}, "crop_size 100 is not divisible by patch_size 16; the nearest valid size is 96"),
        ({"num_frames": 15}, "num_frames 15 is not divisible by tubelet_size 2"),
        ({"datasets_weights": [1.0, 2.0]}, "2 entries for 1 datasets"),
        ({"datasets_weights": [-1.0]}, "must not be negative"),
        ({"datasets_weights": [0.0]}, "one must be positive"),
        ({"decoder": "opencv"}, "'decord', 'pyav' or 'torchcodec'"),
        ({"decoder": {"name": "pyav", "device": "cuda"}}, "device cuda is an option of torchcodec"),
        ({"decoder": {"name": "torchcodec", "device": "cuda"}}, "worker processes cannot use the GPU; set num_workers"),
        ({"max_bad_fraction": 1.5}, "less than or equal to 1"),
        ({"batch_sise": 3}, "Extra inputs"),
    ],
)
def test_invalid_combinations_of_options_are_an_error(changed, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        DataConfig(**{"datasets": ["x"], "sampling_rate": 4} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"random_resize_scale": [0.5, 0.3]}, "expected 0 < low <= high"),
        ({"random_resize_scale": [0.5, 1.3]}, "at most the whole frame"),
        ({"random_resize_aspect_ratio": [0.0, 1.0]}, "expected 0 < low <= high"),
        ({"normalize_std": [0.0, 1.0, 1.0]}, "must be positive"),
        ({"reprob": 2.0}, "less than or equal to 1"),
    ],
)
def test_invalid_augmentations_are_an_error(changed, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        AugConfig(**changed)


def test_a_decoder_is_a_name_or_a_mapping():
    plain = DataConfig(datasets=["x"], sampling_rate=4, decoder="torchcodec")
    assert plain.decoder == Decoder(name="torchcodec")
    assert plain.model_dump(mode="json")["decoder"] == "torchcodec"  # as in the files of earlier runs
    fast = DataConfig(datasets=["x"], sampling_rate=4, decoder={"name": "torchcodec", "seek_mode": "approximate"})
    assert fast.model_dump()["decoder"] == {"name": "torchcodec", "seek_mode": "approximate", "device": "cpu"}
    for data in (plain, fast):
        assert DataConfig(**data.model_dump(mode="json")) == data


def test_video_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "too short", filtered=True)))
    assert (error.path, error.reason, error.filtered, str(error)) == ("a.mp4", "too short", True, "a.mp4: too short")


def test_crops_may_be_rectangles():
    data = DataConfig(datasets=["x"], sampling_rate=4, crop_size=[64, 96])
    assert data.clip_shape.grid == (8, 4, 6)
    assert DataConfig(**data.model_dump(mode="json")) == data
    with pytest.raises(pydantic.ValidationError, match="nearest valid size is 64x96"):
        DataConfig(datasets=["x"], sampling_rate=4, crop_size=[64, 100])
