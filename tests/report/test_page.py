import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tubelet import report
from tubelet.masks import Grid
from tubelet.report import clips, figures

STUDY = {
    "probe": {"pretrained": {"motion": [70.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
    "linear": {"pretrained": {"motion": [66.6, 2.0]}},
    "random_scales": {"probe": {"0.02": {"motion": [50.0, 1.0]}}, "linear": {}},
    "verdict": ["It <beats> & wins."],
    "notes": ["a note"],
    "settings": {"Study": {"folder": "runs/x"}},
    "seconds": {"pretrain": 90.0},
}


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects text and what is referred to."""

    EMPTY = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def study_folder(run_folder, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(run_folder, folder)
    (folder / "study.json").write_text(json.dumps(STUDY))
    return folder


def read_page(folder):
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page, " ".join(page.text)


def test_page_of_a_study_is_self_contained_and_complete(study_folder):
    assert report.write(study_folder) == study_folder / "report.html"
    text, page, words = read_page(study_folder)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "@import" not in text
    assert "url(" not in text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.sources]
    assert len(pictures) == 7  # table, loss, rank, spread, speed, masks, features
    assert min(picture.width for picture in pictures) > 300
    for expected in (
        "70.0 ± 1.0",
        "66.6 ± 2.0",
        "It <beats> & wins.",
        "a note",
        "the log of this run has no knn",
        "1.5 min",
    ):
        assert expected in words


def test_json_holds_the_tables_and_the_curves(study_folder):
    report.write(study_folder)
    found = json.loads((study_folder / "report.json").read_text())
    assert found["probe"] == STUDY["probe"]
    assert found["pretraining"]["steps"] == 40
    assert found["pretraining"]["curves"]["rank_uncentered"] == [[10, 20, 30, 40], [6, 7, 8, 9]]
    assert found["pretraining_settings"]["model"]["model_name"] == "vit_tiny"
    assert sorted(p.name for p in (study_folder / "report").iterdir()) == [
        "features.png", "loss.png", "masks.png", "rank.png", "speed.png", "spread.png", "table.png",
    ]  # fmt: skip


def test_plain_run_has_no_table(run_folder):
    report.write(run_folder)
    text, page, words = read_page(run_folder)
    assert "Does pretraining help?" not in words
    assert len(page.sources) == 6


def test_run_that_has_only_begun_says_what_is_missing(run_folder, tmp_path):
    shutil.copy(run_folder / "config.yaml", tmp_path)
    report.write(tmp_path)
    _, page, words = read_page(tmp_path)
    assert "The log has no step yet." in words
    assert "neither a run folder" in words  # no features, for want of a checkpoint
    assert len(page.sources) == 1  # the masks need none


def test_pictures_of_an_earlier_report_stay_when_the_data_are_gone(study_folder):
    report.write(study_folder)
    before = (study_folder / "report" / "features.png").read_bytes()
    config = study_folder / "config.yaml"
    config.write_text(re.sub(r"- /\S*videos", "- /gone/videos", config.read_text()))
    report.write(study_folder)
    text, _, words = read_page(study_folder)
    assert base64.b64encode(before).decode() in text
    assert "No new picture could be made" in words
    assert "/gone/videos" in words


def test_command_line_names_what_is_no_run_folder(tmp_path):
    command = [sys.executable, "-m", "tubelet.report", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "has no config.yaml" in done.stderr


def test_masks_are_drawn_on_the_frames_that_their_tokens_cover():
    """Slot τ of a clip shows frame τ · tubelet_size, and its row the tokens of that slot."""
    grid = Grid(3, 2, 2)
    frames = np.zeros((1, 6, 32, 32, 3), np.uint8) + (np.arange(6, dtype=np.uint8) * 40)[None, :, None, None, None]
    roles = np.full((1, *grid), figures.CONTEXT)
    roles[0, 1] = figures.TARGET
    shown = clips.Clips(frames, (roles,), grid)
    assert shown.shown(0)[:, 0, 0, 0].tolist() == [0, 80, 160]
    picture = np.asarray(clips.draw_masks(shown)).astype(int)
    mask_row = picture[3 * len(picture) // 4]
    orange = (mask_row[:, 0] - mask_row[:, 2]) > 100
    starts = np.flatnonzero(np.diff(orange.astype(int)) == 1)
    assert len(starts) == 1
    width = (picture.shape[1] - 100) / 3
    assert 100 + width - 3 <= starts[0] <= 100 + width + 3


def test_study_without_pretraining_has_its_table(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    report.write(tmp_path)
    _, _, text = read_page(tmp_path)
    assert "70.0" in text
    assert "What is hidden" not in text
