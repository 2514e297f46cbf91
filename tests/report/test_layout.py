"""Tables of a study in plain text and Markdown, and studies of earlier versions."""

import json

from tubelet.report import layout, study_file

DATA = {
    "objectives": ["jepa", "my_mae"],
    "tasks": ["motion", "motion_few"],
    "accuracy": {
        "attentive": {
            "jepa": {"motion": [64.0, 0.5], "motion_few": [30.0, None]},
            "my_mae": {"motion": [70.0, 1.0]},
            "random_best": {"motion": [40.0, 1.0]},
        },
        "unheard_of": {"jepa": {"motion": [11.0, None]}},
        "linear_shuffled": {"jepa": {"motion": [12.0, None]}},
        "linear": {"jepa": {"motion": [50.0, None]}, "random_best": {"motion": [51.0, None]}},
        "fine_tuned": {"supervised": {"motion": [80.0, None]}},
        "baseline": {"frame": {"motion": [13.0, 0.0]}},
    },
    "random_scales": {},
    "cost": {
        "jepa": {
            "gflop_per_clip": 0.2, "clips_per_second": 72.4, "steps": 1500, "clips": 48000, "flops": 9.6e12,
            "seconds": None,
        },
    },
    "verdict": ["jepa wins."],
    "notes": ["a note"],
}  # fmt: skip


def test_columns_are_in_order_and_rows_end_with_the_references():
    header, *rows = layout.accuracy_table(DATA, "motion")
    assert header == ["motion", "linear", "attentive", "fine-tuned", "unheard of", "linear, shuffled"]
    assert [row[0] for row in rows] == [
        "jepa",
        "my_mae",
        "random, best initialization scale",
        "from scratch with labels",
    ]
    assert rows[0][1:] == ["50.0", "64.0 ± 0.5", "-", "11.0", "12.0"]
    assert rows[3][1:] == ["-", "-", "80.0", "-", "-"]
    assert layout.accuracy_table(DATA, "motion_few") == [["motion few", "attentive"], ["jepa", "30.0"]]


def test_plain_text_is_aligned_and_complete():
    text = layout.plain_text({"datasets": {"demo": DATA}})
    lines = text.split("\n")
    assert len({len(line) for line in lines[1:6]}) == 1
    assert "no network: middle frame 13.0 ± 0.0" in lines
    assert "jepa wins." in lines
    cost = next(line for line in lines if "48,000" in line).split()
    assert cost == ["jepa", "0.2", "72", "1500", "48,000", "9.6", "-"]


def test_markdown_marks_the_best_of_each_column():
    lines = layout.markdown({"datasets": {"demo": DATA}}).split("\n")
    assert lines[0] == "## demo"
    assert "| my_mae | - | **70.0 ± 1.0** | - | - | - |" in lines
    assert "| random, best initialization scale | **51.0** | 40.0 ± 1.0 | - | - | - |" in lines
    assert lines[lines.index("| motion few | attentive |") + 1] == "|---|---|"
    assert "- a note" in lines


def test_study_with_one_objective_of_an_earlier_version_is_read(tmp_path):
    cell = [50.0, 1.0]
    old = {
        "title": "old",
        "probe": {"pretrained": {"motion": cell}, "supervised": {"motion": cell}, "floor_frame": {"motion": cell}},
        "linear": {"pretrained": {"motion": cell}},
        "random_scales": {"probe": {"0.02": {"motion": cell}}, "linear": {}},
        "verdict": ["better"],
        "notes": [],
        "settings": {"Study": {}},
        "seconds": {"probe": 1.0},
    }
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(old))
    study = study_file.read(folder)
    data = study["datasets"]["demo"]
    assert data["accuracy"] == {
        "attentive": {"pretrained": {"motion": cell}},
        "fine_tuned": {"supervised": {"motion": cell}},
        "baseline": {"frame": {"motion": cell}},
        "linear": {"pretrained": {"motion": cell}},
    }
    assert data["random_scales"] == {"attentive": {"0.02": {"motion": cell}}}
    assert study["seconds"] == {"probe": 1.0}
    assert layout.accuracy_table(data, "motion")[1] == ["pretrained", "50.0 ± 1.0", "50.0 ± 1.0", "-"]


def test_folder_without_a_study(tmp_path):
    assert study_file.read(tmp_path) == {}
