"""Small generated videos."""

import pytest

from tests.data.conftest import write_video


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Four videos of different kinds, and three files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", frames=60, options={"crf": "12", "g": "20", "keyint_min": "20", "sc_threshold": "0"})
    write_video(folder / "b.mkv", frames=30, rate=15, height=64)
    write_video(folder / "c.avi", frames=25, rate=25, codec="mpeg4", options={"g": "10"})
    (folder / "sub dir").mkdir()
    write_video(folder / "sub dir" / "d.ts", frames=40, rate=20, codec="mpeg2video", options={"g": "8", "bf": "0"})
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:3000])
    (folder / "notes.md").touch()
    return folder
