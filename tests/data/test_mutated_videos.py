"""Damaged files give right frames or a reason: no hang, no wrong frames; crashes end a worker only."""

import collections
import json
import os
import selectors
import subprocess
import sys

import pytest

from tubelet.config import ConfigError
from tubelet.data import Decoder
from tubelet.data.decoders import DECODERS, check_decoder

NUMBER = int(os.environ.get("TUBELET_MUTATIONS", 60))
LIMIT = int(os.environ.get("TUBELET_MUTATIONS_LIMIT", 60))
"""Seconds for a file."""

VIDEOS = {
    "h264.mp4": {"options": {"g": "10", "bf": "2"}},
    "h264.mkv": {"options": {"g": "10", "bf": "2"}},
    "h264.ts": {"options": {"g": "10", "bf": "2"}},
    "h264.avi": {"options": {"g": "10", "bf": "2"}},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=10:bframes=2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"crf": "10", "cpu-used": "8", "g": "10"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "10", "qscale": "2", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "10", "qscale": "2", "bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"g": "10", "qscale": "2"}},
    "flv1.flv": {"codec": "flv", "options": {"g": "10", "qscale": "2"}},
}


def outcomes(decoder, originals, folder):
    """number -> (original, outcome, seconds) of each mutated file; a worker that ends or hangs is replaced."""
    found, todo = {}, list(range(NUMBER))
    while todo:
        command = [sys.executable, "-m", "tests.data.mutations", decoder, str(originals), str(folder)]
        worker = subprocess.Popen(
            [*command, *map(str, todo)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        last, hung = todo[0], True
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while selector.select(LIMIT):
                if not (line := worker.stdout.readline()):
                    hung = False
                    break
                last, *rest = json.loads(line)
                found[last] = rest
        if hung:
            worker.kill()
        _, errors = worker.communicate()
        if last not in found:
            raise AssertionError(errors.decode()[-2000:])
        if found[last][1] is None:
            found[last][1] = "hung" if hung else f"ended with {worker.returncode}: {errors.decode()[-300:]}"
        todo = [number for number in todo if number not in found]
    return found


@pytest.fixture(scope="module")
def originals(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for name, options in VIDEOS.items():
        make_video(folder / name, frames=40, height=64, width=80, **options)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_mutated_files_give_their_frames_or_a_reason(decoder, originals, tmp_path):
    try:
        check_decoder(Decoder(name=decoder))
    except ConfigError as error:
        pytest.skip(str(error))
    found = outcomes(decoder, originals, tmp_path)
    assert sorted(found) == list(range(NUMBER))
    kinds = collections.Counter((outcome or "right").split(":")[0] for _, outcome, _ in found.values())
    print(decoder, dict(kinds), f"slowest {max(seconds for *_, seconds in found.values()):.1f} s")
    wrong = {number: rest for number, rest in found.items() if rest[1].split(" ")[0] in ("WRONG", "hung", "ended")}
    assert not wrong
    assert kinds["right"] > NUMBER / 10
