"""Difficult files from other projects' test suites: each gives a clip of the right size or a reason, quickly."""

import json
import subprocess
import sys

import pytest

# Files without a usable frame; every other file must give clips.
UNUSABLE = {
    "decord_corrupted.mp4",
    "made_audio_only_named.mp4",
    "made_empty.mp4",
    "made_text.mp4",
    "made_truncated_tail_demo.mp4",
}

READ_ALL = """
import json, sys, time
import numpy as np
import torch
from tubelet.data import AugConfig, DataConfig, Draw
from tubelet.data.transforms import TrainTransform
from tubelet.data.video_dataset import Dataset

folder, decoder = sys.argv[1:]
data = DataConfig(datasets=[folder], decoder=decoder, sampling_rate=4, num_clips=2, crop_size=64)
dataset = Dataset(data, TrainTransform(AugConfig(), 64), on_error="exclude")
for index, path in enumerate(dataset.paths):
    start = time.monotonic()
    sample = dataset[Draw(0, 0, index, 0)]
    shape, dtype = ([0], None) if sample.excluded else (list(sample.clips.shape), str(sample.clips.dtype))
    reason = sample.bad[0].reason if sample.bad else ""
    print(json.dumps([path, shape, dtype, reason, time.monotonic() - start]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["decord", "pyav", "torchcodec"])
def test_each_file_gives_a_clip_or_a_reason(decoder, shared_data):
    folder = shared_data / "hard_videos"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    # In a process of its own, so that a crash of the decoder fails this test only.
    command = [sys.executable, "-c", READ_ALL, str(folder), decoder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if "torchcodec finds no FFmpeg" in result.stderr:
        pytest.skip("torchcodec finds no FFmpeg libraries (apt install ffmpeg)")
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == 22
    for path, shape, dtype, reason, seconds in outcomes:
        name = path.rsplit("/", 1)[1]
        print(f"{name}: {reason or 'clips'} ({seconds:.2f} s)")
        if reason:
            assert name in UNUSABLE
        else:
            assert (shape, dtype) == ([2, 3, 16, 64, 64], "torch.uint8")
            assert name not in UNUSABLE - {"decord_corrupted.mp4"}
        assert seconds < 20
