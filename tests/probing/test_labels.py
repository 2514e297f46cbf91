"""Warnings about labels that are allowed and seldom meant."""

import re

import pytest

from tubelet.probing.split import problems_of_labels

USUAL = [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("train", "val", "num_classes", "expected"),
    [
        (USUAL, USUAL, 3, []),
        (USUAL, [0, 1], 3, []),
        (USUAL, None, 3, []),
        ([1, 2, 3], [1, 2], 4, ["no video has label 0, .* subtract 1 from each, and set num_classes to 3"]),
        (
            [1, 3],
            [3],
            4,
            ["all 1 validation videos .* 3", "2 of 4 classes have no video: 0 .a., 2 .c.; see"],
        ),
        (USUAL, USUAL, 5, ["2 of 5 classes have no video: 3, 4"]),
        (USUAL, [0, 3, 3], 4, [r"2 validation videos have a class without training videos.*: 3: 2$"]),
        ([1, 1], [0, 1], 2, ["all 2 training videos have one class, 1 .b.", "1 validation videos .*: 0 .a.: 1"]),
        ([0, 1], [1, 1], 2, ["all 2 validation videos have one class, 1"]),
        (list(range(5)), [0, 1], 50, [r"45 of 50 classes have no video: 5, 6, .*14, …"]),
    ],
)
def test_what_is_unusual_is_told_with_names_and_counts(train, val, num_classes, expected):
    problems = problems_of_labels(train, val, num_classes, ["a", "b", "c"])
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem), problem
