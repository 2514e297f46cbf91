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


PROBE = {
    "top1": 61.5,
    "train_loss": 56123.5,
    "best_head": {"index": 1, "lr": 0.01},
    "heads": [{"lr": 0.001, "holdout_top1": 50.0}, {"lr": 0.01, "holdout_top1": 60.0, "val_top1": 61.5}],
    "num_train": 1234567,
    "seconds": {"heads": 34.67},
}


def test_accuracies_come_first_and_the_grid_of_heads_is_folded(runs, tmp_path):
    for name in ("a", "b"):
        (runs[1] / name).mkdir()
        (runs[1] / name / "results.json").write_text(json.dumps(PROBE))
    html = report.compare(runs, tmp_path / "out").read_text()
    table, _, folded = html.partition("<summary>Heads of the grid</summary>")
    shown = re.findall(r'<th scope="row">(.*?)</th>', table)
    assert shown[:5] == ["a: top1", "a: train_loss", "b: top1", "b: train_loss", "probe: top1"]
    assert not any("heads.0" in key or "heads.1" in key or "best_head" in key for key in shown)
    folded = re.findall(r'<th scope="row">(.*?)</th>', folded.partition("</details>")[0])
    assert folded[:4] == ["a: best_head.index", "a: best_head.lr", "a: heads.0.lr", "a: heads.0.holdout_top1"]
    assert len(folded) == 14
    assert shown.index("b: train_loss") < shown.index("loss, last") < shown.index("a: num_train")
    assert json.loads((tmp_path / "out/comparison.json").read_text())["results"]["a: heads.1.val_top1"][1] == 61.5


def test_numbers_have_no_exponents(runs, tmp_path):
    values = {
        56123.5: "56123.5",
        1234567: "1234567",
        2e6: "2000000",
        61.5123: "61.51",
        0.00012: "0.00012",
        3e-5: "3e-05",
    }
    (runs[0] / "results.json").write_text(json.dumps({f"x{i}": value for i, value in enumerate(values)}))
    html = report.compare(runs, tmp_path / "out").read_text()
    assert re.findall(r'<th scope="row">x\d</th><td>(.*?)</td>', html) == list(values.values())


def test_results_of_tasks_and_seeds_are_shown_once(runs):
    tasks = {"linear": {**PROBE, "seeds": {"0": PROBE}}}
    for place, content in {"": {"tasks": tasks}, "linear": tasks["linear"], "other": {"top1": 3.0}}.items():
        (runs[0] / place).mkdir(exist_ok=True)
        (runs[0] / place / "results.json").write_text(json.dumps(content))
    measured = comparison.results(comparison.read(runs))
    assert measured["tasks.linear.top1"] == [61.5, comparison.NO_RESULT]
    assert measured["other: top1"] == [3.0, comparison.NO_RESULT]
    assert not any(key.startswith("linear: ") for key in measured)


@pytest.mark.parametrize("content", ['{"x', "[1.0]", b"\xff"])
def test_damaged_results(runs, tmp_path, content):
    path = runs[1] / "probe/results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"{path}: it is damaged"):
        report.compare(runs, tmp_path / "out")


CONFIGURATIONS = ("", "[1, 2]", "objective: 3", "{objective: {name: 3}}", "{app: vjepa, model: 3}", "a: [")


@pytest.mark.parametrize("content", CONFIGURATIONS)
def test_damaged_configuration(runs, tmp_path, content):
    path = runs[1] / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^{path}: (it is damaged|not valid YAML)"):
        report.compare(runs, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"^{path}: (it is damaged|not valid YAML)"):
        report.write(runs[1])


@pytest.mark.parametrize("content", ["app: vjepa", "data: 3", "{data: {}, mask: 3}", "{data_aug: 3, mask: [3]}"])
def test_the_report_of_one_run_says_what_is_wrong_with_its_data(runs, content):
    path = runs[1] / "config.yaml"
    path.write_text(content)
    assert f"{path}: " in report.write(runs[1]).read_text()


@pytest.mark.parametrize("content", ['{"x', "[1.0]"])
def test_damaged_study(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ConfigError, match="study.json: it is damaged"):
        report.write(tmp_path)


@pytest.mark.parametrize("out", ["/proc/x", "file", "file/below", "taken"])
def test_a_folder_that_cannot_be_written(runs, tmp_path, out):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/comparison.json").mkdir()
    with pytest.raises(ConfigError, match=f"^--out: {tmp_path / out} cannot be written: "):
        report.compare(runs, tmp_path / out)


def test_a_single_run_has_no_other_folder(runs, tmp_path):
    done = run_program("tubelet.report", runs[0], "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error: --out is for a comparison of several runs" in done.stdout
    assert not (tmp_path / "out").exists()


def test_command_line(runs, tmp_path):
    done = run_program("tubelet.report", *runs)
    assert done.returncode == 0
    assert done.stdout == f"wrote {runs[0] / 'comparison.html'}\n"
    done = run_program("tubelet.report", *runs, tmp_path)
    assert (done.returncode, done.stdout) == (
        1,
        f"error: {tmp_path} is not a run folder: it has no config.yaml\n",
    )
