from tubelet.report import study_figures

DATA = {
    "objectives": ["jepa", "mae"],
    "tasks": ["motion", "shape"],
    "accuracy": {
        "linear": {
            "jepa": {"motion": [64.0, 0.5]},
            "mae": {"motion": [30.0, None]},
            "random_best": {"motion": [40.0, 1.0]},
        },
        "attentive": {"jepa": {"motion": [70.0, 0.5], "shape": [10.0, None]}},
        "fine_tuned": {"supervised": {"motion": [80.0, None]}},
        "baseline": {"frame": {"motion": [13.0, 0.0]}, "difference": {"motion": [22.0, 0.0]}},
    },
    "cost": {"jepa": {"clips_per_second": 80.0, "gflop_per_clip": 0.2}},
    "curves": {
        "task": "motion",
        "head": "linear",
        "lines": {
            "jepa": [
                {"clips": 100, "flops": 1e12, "accuracy": [50.0, None]},
                {"clips": 400, "flops": 4e12, "accuracy": [64.0, 0.5]},
            ],
        },
    },
}


def panels(figure):
    return {axes.get_title(loc="left").replace("\n", ", "): axes for axes in figure.axes if axes.get_visible()}


def test_bars_are_the_objectives_and_lines_the_references():
    drawn = panels(study_figures.bars(DATA))
    assert drawn.keys() == {"motion, linear", "motion, attentive", "motion, fine-tuned", "shape, attentive"}
    axes = drawn["motion, linear"]
    assert [bar.get_width() for bar in axes.patches] == [64.0, 30.0]
    orange, blue = (bar.get_facecolor() for bar in axes.patches)
    assert orange[0] > orange[2]  # above the best random encoder
    assert blue[0] < blue[2]
    assert sorted(line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1) == [22.0, 40.0, 80.0]


def test_learning_curves_over_clips_and_operations():
    drawn = study_figures.curves(DATA)
    clips, operations = drawn["clips"].axes[0], drawn["flops"].axes[0]
    line = next(line for line in clips.lines if len(line.get_xdata()) == 2 and line.get_xdata()[1] == 400)
    assert line.get_xydata().tolist() == [[100, 50], [400, 64]]
    assert operations.get_xlabel() == "TFLOP"
    labels = [text.get_text() for text in drawn["flops"].legends[0].get_texts()]
    assert sorted(labels) == ["best baseline", "best random encoder", "from scratch", "jepa"]


def test_learning_curves_without_measured_operations():
    points = [{"clips": 100, "flops": None, "accuracy": [50.0, None]}]
    drawn = study_figures.curves({**DATA, "curves": {**DATA["curves"], "lines": {"jepa": points}}})
    assert drawn.keys() == {"clips"}
    assert drawn["clips"].axes[0].get_xlabel() == "clips seen"


def test_what_was_not_measured_is_not_drawn():
    empty = {**DATA, "curves": {}, "cost": {}}
    assert study_figures.curves(empty) == {}
    assert study_figures.costs(empty) is None


def test_costs_are_labelled_with_their_values():
    speed, operations = study_figures.costs(DATA).axes
    assert [text.get_text() for text in speed.texts] == [" 80"]
    assert [text.get_text() for text in operations.texts] == [" 0.2"]
