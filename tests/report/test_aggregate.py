import math

import numpy as np
import pytest

from tubelet.report import aggregate
from tubelet.report.aggregate import Result


def result(row, top1, *, head="probe", task="motion", seed=0, head_seed=0, **more):
    return Result(row, head, task, seed, head_seed, top1, **{"count": 100, **more})


def test_mean_and_std_over_pretraining_and_probe_seeds():
    results = [
        result("pretrained", value, seed=seed, head_seed=head_seed)
        for (seed, head_seed), value in {(0, 0): 60.0, (0, 1): 62.0, (1, 0): 64.0, (1, 1): 70.0}.items()
    ]
    mean, std = aggregate.tables(results, default_init_std=None)["probe"]["pretrained"]["motion"]
    assert mean == 64.0
    assert std == pytest.approx(np.std([60, 62, 64, 70], ddof=1))


def test_standard_deviation_of_a_single_run_is_none():
    table = aggregate.tables([result("pretrained", 60.0)], default_init_std=None)
    assert table["probe"]["pretrained"]["motion"] == [60.0, None]


def test_random_best_is_selected_for_each_task_and_random_is_the_default_scale():
    values = {
        (0.02, "motion"): (30, 32),
        (0.1, "motion"): (40, 44),
        (0.02, "shape"): (60, 60),
        (0.1, "shape"): (50, 70),
    }
    results = [
        result("random", float(value), task=task, head_seed=head_seed, init_std=std)
        for (std, task), pair in values.items()
        for head_seed, value in enumerate(pair)
    ]
    table = aggregate.tables([*results, result("pretrained", 1.0)], default_init_std=0.02)
    assert table["probe"]["random"]["motion"] == [31.0, pytest.approx(math.sqrt(2))]
    assert table["probe"]["random_best"]["motion"] == [42.0, pytest.approx(2 * math.sqrt(2))]
    assert table["probe"]["random_best"]["shape"][0] == 60.0
    assert table["random_scales"]["probe"]["0.1"]["shape"][0] == 60.0
    assert "random_best" not in table["linear"]


def test_folds_are_weighted_by_their_number_of_videos():
    # 9 of 10 and 30 of 90 videos correct: 39 of 100, not the mean of 90 % and 33 %.
    results = [
        result("pretrained", 90.0, fold=0, count=10),
        result("pretrained", 100 / 3, fold=1, count=90),
    ]
    assert aggregate.tables(results, default_init_std=None)["probe"]["pretrained"]["motion"][0] == pytest.approx(39.0)
    errors = aggregate.standard_errors(results)
    assert errors["probe"]["pretrained"]["motion"] == pytest.approx(100 * math.sqrt(0.39 * 0.61 / 100))


def test_margin_in_standard_deviations_of_the_difference():
    table = {"pretrained": {"motion": [70.0, 3.0]}, "random_best": {"motion": [50.0, 4.0]}}
    assert aggregate.margin(table, "motion") == {"points": 20.0, "std": 5.0, "deviations": 4.0}
    assert aggregate.margin(table, "shape") is None


@pytest.mark.parametrize(
    ("pretrained", "random", "text"),
    [
        ([70.0, 1.0], [50.0, 1.0], "beats the best"),
        ([59.0, 1.0], [50.0, 1.0], "does not beat"),  # fewer than 10 points
        ([70.0, 9.0], [50.0, 9.0], "does not beat"),  # fewer than 3 deviations
        ([70.0, None], [50.0, 1.0], "does not beat"),  # deviation unknown
        ([40.0, 1.0], [50.0, 1.0], "does not beat"),
    ],
)
def test_verdict_agrees_with_the_numbers(pretrained, random, text):
    report = {"probe": {"pretrained": {"motion": pretrained}, "random_best": {"motion": random}}}
    assert text in aggregate.verdict(report, "motion")


def test_verdict_reports_further_comparisons():
    few, difference = {"motion": [70.0, 1.0], "motion_few": [20.0, 1.0]}, {"motion": [75.0, 0.0]}
    random = {"motion": [50.0, 1.0], "motion_few": [25.0, 1.0]}
    table = {"pretrained": few, "random_best": random, "baseline_difference": difference}
    text = aggregate.verdict({"probe": table}, "motion")
    assert "below the best random encoder with few labels (-5.0 points)" in text
    assert "below the frame-difference baseline (-5.0 points)" in text


def test_results_table_is_aligned_and_complete():
    results = [result("pretrained", 64.0, head_seed=s) for s in range(2)]
    results += [result("baseline_frame", 12.5, task="shape")]
    lines = aggregate.results_table(aggregate.tables(results, default_init_std=None)).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-2:] == ["motion", "shape"]
    assert "64.0 ± 0.0" in lines[2]
    assert lines[2].endswith("    -")
    assert lines[3].endswith("12.5")
