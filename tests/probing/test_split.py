from collections import Counter

import pytest

from tubelet.config import ConfigError
from tubelet.probing import split

LABELS = [0] * 20 + [1] * 9 + [2] * 14


def test_few_per_class_is_balanced_seeded_and_nested():
    chosen = split.few_per_class(LABELS, 5, seed=0)
    assert Counter(LABELS[i] for i in chosen) == {0: 5, 1: 5, 2: 5}
    assert chosen == sorted(set(chosen)) == split.few_per_class(LABELS, 5, seed=0)
    assert chosen != split.few_per_class(LABELS, 5, seed=1)
    assert set(chosen) < set(split.few_per_class(LABELS, 8, seed=0))
    assert split.few_per_class(LABELS, None, seed=0) == list(range(43))


def test_too_few_of_a_class_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="class 1 has only 9"):
        split.few_per_class(LABELS, 10, seed=0)


def test_held_out_parts_are_about_equal_in_size_and_classes():
    parts = split.stratified_parts(LABELS, 5, seed=0)
    assert {part: Counter(parts)[part] for part in range(5)} == {0: 9, 1: 9, 2: 9, 3: 8, 4: 8}
    for label, size in ((0, 20), (1, 9), (2, 14)):
        counts = Counter(part for part, of in zip(parts, LABELS, strict=True) if of == label)
        assert set(counts.values()) <= {size // 5, -(-size // 5)}
    assert parts == split.stratified_parts(LABELS, 5, seed=0) != split.stratified_parts(LABELS, 5, seed=1)


@pytest.mark.parametrize(("label", "problem"), [(3, "has label 3"), (-1, "has no label")])
def test_a_label_that_is_no_class_is_named(label, problem):
    with pytest.raises(ConfigError, match=f"data.dataset_val: b.mp4 {problem}.*labels are 0 to 2"):
        split.check_labels([0, label], ["a.mp4", "b.mp4"], 3, "data.dataset_val")
