import math

import numpy as np
import pytest

from tubelet.report import aggregate
from tubelet.report.aggregate import Result


def result(row, top1, *, head="attentive", task="motion", seed=0, head_seed=0, **more):
    return Result(row, head, task, seed, head_seed, top1, **{"count": 100, **more})


def accuracy(results):
    return aggregate.tables(results, default_init_std=None)["accuracy"]


def test_mean_and_std_over_pretraining_and_probe_seeds():
    results = [
        result("jepa", value, seed=seed, head_seed=head_seed)
        for (seed, head_seed), value in {(0, 0): 60.0, (0, 1): 62.0, (1, 0): 64.0, (1, 1): 70.0}.items()
    ]
    mean, std = accuracy(results)["attentive"]["jepa"]["motion"]
    assert mean == 64.0
    assert std == pytest.approx(np.std([60, 62, 64, 70], ddof=1))


def test_standard_deviation_of_a_single_run_is_none():
    assert accuracy([result("jepa", 60.0)])["attentive"]["jepa"]["motion"] == [60.0, None]


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
    tables = aggregate.tables([*results, result("jepa", 1.0, head="linear")], default_init_std=0.02)
    rows = tables["accuracy"]["attentive"]
    assert rows["random"]["motion"] == [31.0, pytest.approx(math.sqrt(2))]
    assert rows["random_best"]["motion"] == [42.0, pytest.approx(2 * math.sqrt(2))]
    assert rows["random_best"]["shape"][0] == 60.0
    assert tables["random_scales"]["attentive"]["0.1"]["shape"][0] == 60.0
    assert tables["accuracy"]["linear"].keys() == {"jepa"}


def test_folds_are_weighted_by_their_number_of_videos():
    # 9 of 10 and 30 of 90 videos correct: 39 of 100, not the mean of 90 % and 33 %.
    results = [
        result("jepa", 90.0, fold=0, count=10),
        result("jepa", 100 / 3, fold=1, count=90),
    ]
    assert accuracy(results)["attentive"]["jepa"]["motion"][0] == pytest.approx(39.0)
    errors = aggregate.standard_errors(results)
    assert errors["attentive"]["jepa"]["motion"] == pytest.approx(100 * math.sqrt(0.39 * 0.61 / 100))


def test_margin_in_standard_deviations_of_the_difference():
    rows = {"jepa": {"motion": [70.0, 3.0]}, "random_best": {"motion": [50.0, 4.0]}}
    assert aggregate.margin(rows, "motion", "jepa") == {"points": 20.0, "std": 5.0, "deviations": 4.0}
    assert aggregate.margin(rows, "shape", "jepa") is None
    assert aggregate.margin(rows, "motion", "mae") is None


def test_margins_are_over_random_encoders_and_for_fine_tuning_over_training_from_scratch():
    report = {
        "objectives": ["jepa", "mae"],
        "accuracy": {
            "linear": {"jepa": {"motion": [60.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
            "fine_tuned": {"mae": {"motion": [80.0, 1.0]}, "supervised": {"motion": [75.0, 1.0]}},
            "baseline": {"frame": {"motion": [20.0, 0.0]}},
        },
    }
    margins = aggregate.margins(report)
    assert margins.keys() == {"linear", "fine_tuned"}
    assert margins["linear"].keys() == {"jepa"}
    assert margins["linear"]["jepa"]["motion"]["points"] == 10.0
    assert margins["fine_tuned"]["mae"]["motion"]["points"] == 5.0


@pytest.mark.parametrize(
    ("pretrained", "random", "beats"),
    [
        ([70.0, 1.0], [50.0, 1.0], True),
        ([59.0, 1.0], [50.0, 1.0], False),  # fewer than 10 points
        ([70.0, 9.0], [50.0, 9.0], False),  # fewer than 3 deviations
        ([70.0, None], [50.0, 1.0], False),  # deviation unknown
        ([40.0, 1.0], [50.0, 1.0], False),
    ],
)
def test_verdict_agrees_with_the_numbers(pretrained, random, beats):
    report = {"accuracy": {"knn": {"jepa": {"motion": pretrained}, "random_best": {"motion": random}}}}
    text = aggregate.verdict(report, "motion", "jepa")
    claim = "by at least 10 points and 3 standard deviations with: kNN"
    assert (f"It beats the best random encoder {claim}" in text) == beats
    assert (f"It does not beat it {claim}" in text) != beats


def test_verdict_names_each_head_and_further_comparisons():
    report = {
        "accuracy": {
            "attentive": {"jepa": {"motion": [70.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
            "linear": {"jepa": {"motion": [52.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
            "linear_shuffled": {"jepa": {"motion": [90.0, 1.0]}, "random_best": {"motion": [50.0, 1.0]}},
            "fine_tuned": {"jepa": {"motion": [80.0, 1.0]}, "supervised": {"motion": [76.0, None]}},
            "baseline": {"frame": {"motion": [20.0, 0.0]}, "difference": {"motion": [75.0, 0.0]}},
        }
    }
    text = aggregate.verdict(report, "motion", "jepa")
    assert "linear 52.0 % (+2.0 points, 1.4 deviations), attentive 70.0 % (+20.0 points, 14.1 deviations)." in text
    assert "beats the best random encoder by at least 10 points and 3 standard deviations with: attentive." in text
    assert "does not beat it by at least 10 points and 3 standard deviations with: linear." in text
    assert "Fine-tuned 80.0 % (over training from scratch: +4.0 points)." in text
    assert "Its best probe is 5.0 points below the best baseline (difference)." in text
    assert "there are no results" in aggregate.verdict(report, "motion", "mae")
