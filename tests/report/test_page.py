import base64
import html.parser
import io
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.processes import run_program
from tubelet import report
from tubelet.config import ConfigError
from tubelet.grid import Grid
from tubelet.report import clips, figures, run_config
from tubelet.report.curves import Curves

RESULTS = {
    "objectives": ["jepa"],
    "tasks": ["motion", "shape"],
    "accuracy": {
        "attentive": {"jepa": {"motion": [70.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
        "linear": {"jepa": {"motion": [66.6, 2.0], "shape": [44.4, None]}},
        "baseline": {"frame": {"motion": [13.1, 0.0]}},
    },
    "random_scales": {"attentive": {"0.02": {"motion": [50.0, 1.0]}}},
    "margin": {"attentive": {"jepa": {"motion": {"points": 20.0, "std": 1.4, "deviations": 14.3}}}},
    "verdict": ["It <beats> & wins."],
    "notes": ["a note"],
}
STUDY = {
    "datasets": {"demo": RESULTS},
    "settings": {"Study": {"folder": "runs/x"}},
    "seconds": {"pretrain": 90.0},
}


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects text and references."""

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
        "middle frame 13.1 ± 0.0",
        "+20.0 points, 14.3 deviations",
        "It <beats> & wins.",
        "a note",
        "1.5 min",
    ):
        assert expected in words


def test_json_has_the_tables_and_the_curves(study_folder):
    report.write(study_folder)
    numbers = json.loads((study_folder / "report.json").read_text())
    assert numbers["datasets"] == STUDY["datasets"]
    assert numbers["pretraining"]["steps"] == 40
    assert numbers["pretraining"]["curves"]["rank_uncentered"] == [[10, 20, 30, 40], [6, 7, 8, 9]]
    assert numbers["pretraining_settings"]["encoder"]["name"] == "vit_tiny"
    assert sorted(p.name for p in (study_folder / "report").iterdir()) == [
        "features.png", "loss.png", "masks.png", "rank.png", "speed.png", "spread.png", "table.png",
    ]  # fmt: skip


def test_report_of_a_run_has_no_results_table(run_folder):
    report.write(run_folder)
    text, page, words = read_page(run_folder)
    assert "Does pretraining help?" not in words
    assert len(page.sources) == 6


def test_report_of_a_run_without_steps(run_folder, tmp_path):
    shutil.copy(run_folder / "config.yaml", tmp_path)
    report.write(tmp_path)
    _, page, words = read_page(tmp_path)
    assert "The log has no steps yet." in words
    assert "neither a run folder" in words  # no features, as there is no checkpoint
    assert len(page.sources) == 1  # the masks need none


def test_pictures_of_an_earlier_report_are_kept_when_the_data_are_gone(study_folder):
    report.write(study_folder)
    before = (study_folder / "report" / "features.png").read_bytes()
    config = study_folder / "config.yaml"
    config.write_text(re.sub(r"- /\S*videos", "- /gone/videos", config.read_text()))
    report.write(study_folder)
    text, _, words = read_page(study_folder)
    assert base64.b64encode(before).decode() in text
    assert "No new picture could be made" in words
    assert "/gone/videos" in words


def test_command_line_refuses_other_folders(tmp_path):
    done = run_program("tubelet.report", "--folder", tmp_path)
    assert done.returncode == 1
    assert "neither config.yaml nor study.json" in done.stdout


def test_masks_are_drawn_on_the_frames_of_their_tokens():
    """Time slot τ is drawn as frame τ · tubelet_size, shaded by the tokens of that slot."""
    grid = Grid(3, 2, 2)
    frames = np.zeros((1, 6, 32, 32, 3), np.uint8) + (np.arange(6, dtype=np.uint8) * 40)[None, :, None, None, None]
    roles = np.full((1, *grid), figures.CONTEXT)
    roles[0, 1] = figures.TARGET
    batch = clips.Clips(frames, (roles,), grid)
    assert batch.slot_frames(0)[:, 0, 0, 0].tolist() == [0, 80, 160]
    picture = np.asarray(clips.draw_masks(batch)).astype(int)
    mask_row = picture[3 * len(picture) // 4]
    orange = (mask_row[:, 0] - mask_row[:, 2]) > 100
    starts = np.flatnonzero(np.diff(orange.astype(int)) == 1)
    assert len(starts) == 1
    width = (picture.shape[1] - 100) / 3
    assert 100 + width - 3 <= starts[0] <= 100 + width + 3


def test_several_data_sets_have_sections_and_figures_of_their_own(tmp_path):
    curve = {
        "task": "shape",
        "head": "linear",
        "lines": {"jepa": [{"clips": 9, "flops": None, "accuracy": [44, None]}]},
    }
    study = {"datasets": {"demo": RESULTS, "real": {**RESULTS, "curves": curve, "notes": ["another note"]}}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    report.write(tmp_path)
    _, page, words = read_page(tmp_path)
    assert words.index("Data set demo") < words.index("Data set real") < words.index("another note")
    assert len(page.sources) == 3
    assert figure_names(tmp_path) == ["demo_table", "real_curves_clips", "real_table"]


def test_report_of_a_study_without_pretraining(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    report.write(tmp_path)
    _, _, text = read_page(tmp_path)
    assert "70.0" in text
    assert "Training" not in text


@pytest.fixture
def objectives(monkeypatch):
    """Modules of objectives by name, in place of the files of tubelet/objectives."""
    modules = {}

    def find(kind, name):
        if kind == "objectives":
            if name not in modules:
                raise ConfigError(f"'{name}': not in tubelet/objectives")
            return modules[name]
        return original(kind, name)

    original = run_config.find
    monkeypatch.setattr(run_config, "find", find)
    return modules


def figure_names(folder):
    return sorted(path.stem for path in (folder / "report").iterdir())


def with_config(run_folder, folder, **changes):
    """Copy a run folder without its report, and change its configuration."""
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("report*"))
    config = yaml.safe_load((run_folder / "config.yaml").read_text()) | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_curves_of_the_objective(objectives, run_folder, tmp_path):
    toy = Curves("toy", "Toy", "", {"loss_jepa": "a", "loss_b": "b"}, "a caption")
    absent = Curves("absent", "Absent", "", {"never_logged": "c"}, "another caption")
    objectives["toy"] = types.SimpleNamespace(CURVES=(toy, absent))
    folder = with_config(run_folder, tmp_path / "run", objective={"name": "toy"})
    report.write(folder)
    text = read_page(folder)[2]
    assert "a caption" in text
    assert "Absent: no figure, as the log of this run has no never_logged." in text
    assert figure_names(folder) == ["features", "masks", "rank", "speed", "spread", "toy"]
    assert "loss_jepa" in json.loads((folder / "report.json").read_text())["pretraining"]["curves"]


def test_configuration_of_the_first_version_means_vjepa(objectives, run_folder, tmp_path):
    objectives["vjepa"] = types.SimpleNamespace(CURVES=(Curves("jepa", "", "", {"loss_jepa": ""}, ""),))
    folder = with_config(run_folder, tmp_path / "run")
    report.write(folder)
    assert "jepa" in figure_names(folder)


def test_objective_without_curves_has_a_generic_loss_figure(objectives, run_folder, tmp_path):
    objectives["plain"] = types.ModuleType("plain")
    folder = with_config(run_folder, tmp_path / "run", objective={"name": "plain"})
    report.write(folder)
    assert {"loss", "loss_jepa"} < json.loads((folder / "report.json").read_text())["pretraining"]["curves"].keys()


def test_objective_that_cannot_be_found_has_a_generic_loss_figure(objectives, run_folder, tmp_path, caplog):
    folder = with_config(run_folder, tmp_path / "run", objective={"name": "gone"})
    report.write(folder)
    assert "objective.name: 'gone': not in tubelet/objectives" in caplog.text
    assert "loss" in figure_names(folder)


def test_run_without_masks_has_no_pictures_of_masks(objectives, run_folder, tmp_path):
    folder = with_config(run_folder, tmp_path / "run", mask=[])
    report.write(folder)
    assert "<h2>Masks</h2>" not in read_page(folder)[0]
    assert "masks" not in figure_names(folder)
    assert "features" in figure_names(folder)


def test_full_disk_is_a_warning_for_a_finished_run(run_folder, monkeypatch, caplog, with_report):
    def no_space(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tubelet.report.page.write_json", no_space)
    assert report.write_or_warn(run_folder) is None
    record = caplog.records[-1]
    assert record.levelname == "WARNING"
    assert f"python -m tubelet.report --folder {run_folder}" in record.message
    assert "No space left on device" in caplog.text
    assert "Traceback" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        report.write(run_folder)


def test_broken_matplotlib_is_a_warning_for_a_finished_run(run_folder, monkeypatch, caplog, with_report):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "tubelet.report."))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("page", "figures", "clips"):
        monkeypatch.delattr(report, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write_or_warn(run_folder) is None
    assert "matplotlib" in caplog.text
    with pytest.raises(ImportError):
        report.write(run_folder)


def test_report_of_a_finished_run_returns_its_path(run_folder, with_report):
    assert report.write_or_warn(run_folder) == run_folder / "report.html"
