"""Several runs on one page."""

import json
import re

import pytest
import yaml

from tests.processes import run_program
from tubelet import report
from tubelet.config import ConfigError
from tubelet.report import comparison


def make_run(folder, lr, losses, **config):
    folder.mkdir(parents=True)
    config = {"app": "vjepa", "folder": str(folder), "optimization": {"lr": lr, "epochs": 2}, "data": {}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": step, "loss": loss, "clips_per_second": 9.0} for step, loss in enumerate(losses, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "a/run", 0.1, [3.0, 2.0, 1.5], mask=[{"name": "multiblock3d", "num_blocks": 2}])
    make_run(tmp_path / "b/run", 0.2, [3.0, 1.0], mask=[{"name": "multiblock3d", "num_blocks": 4}])
    (tmp_path / "b/run/probe").mkdir()
    (tmp_path / "b/run/probe/results.json").write_text(json.dumps({"top1": 61.5, "passed": True, "name": "x"}))
    return [tmp_path / "a/run", tmp_path / "b/run"]


def test_what_differs_and_what_was_measured(runs, tmp_path):
    page = report.compare(runs, tmp_path / "out")
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert content["runs"] == ["a/run", "b/run"]
    assert content["differences"] == {"optimization.lr": [0.1, 0.2], "mask.0.num_blocks": [2, 4]}
    assert content["results"]["steps"] == [3, 2]
    assert content["results"]["loss, last"] == [1.5, 1.0]
    assert content["results"]["probe: top1"] == [comparison.NO_RESULT, 61.5]
    assert next(iter(content["results"])) == "probe: top1"  # what runs are compared by is in the first rows
    assert not any("passed" in key for key in content["results"])
    html = page.read_text()
    assert html.count("<img") == len(list((tmp_path / "out/report").glob("comparison-*.png"))) >= 2
    assert re.search(r'<th scope="row">probe: top1</th><td>–</td><td>61.5</td>', html)


def test_an_option_that_one_run_lacks(runs):
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    del config["optimization"]["epochs"]
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    differing = comparison.differences(comparison.read(runs))
    assert differing["optimization.epochs"] == [2, comparison.MISSING]


def test_curves_of_all_runs_are_in_one_figure(runs, tmp_path, monkeypatch):
    drawn = {}
    original = comparison.figures.draw_lines

    def record(curves, lines):
        drawn[curves.title] = {name: values.tolist() for name, (_, values) in lines.items()}
        return original(curves, lines)

    monkeypatch.setattr(comparison.figures, "draw_lines", record)
    report.compare(runs, tmp_path / "out")
    assert {"a/run": [3.0, 2.0, 1.5], "b/run": [3.0, 1.0]} in drawn.values()


def test_errors(runs, tmp_path):
    with pytest.raises(ConfigError, match="given twice"):
        report.compare([runs[0], runs[0]], tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        report.compare([runs[0], tmp_path], tmp_path)


def test_command_line(runs, tmp_path):
    done = run_program("tubelet.report", *runs)
    assert done.returncode == 0
    assert done.stdout == f"wrote {runs[0] / 'comparison.html'}\n"
    done = run_program("tubelet.report", *runs, tmp_path)
    assert (done.returncode, done.stdout) == (
        1,
        f"error: {tmp_path} is not a run folder: it has no config.yaml\n",
    )
