import hashlib
from collections import Counter

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data.rows import Numbers, Strings
from tubelet.probing import split
from tubelet.probing.label_subset import LabelSubset

LABELS = [0] * 20 + [1] * 9 + [2] * 14


def per_class(count, seed=0):
    return split.labelled_subset(LABELS, LabelSubset(labels_per_class=count), seed)


def fraction(share, seed=0):
    return split.labelled_subset(LABELS, LabelSubset(label_fraction=share), seed)


def test_few_per_class_is_balanced_seeded_and_nested():
    chosen = per_class(5)
    assert Counter(LABELS[i] for i in chosen) == {0: 5, 1: 5, 2: 5}
    assert chosen == sorted(set(chosen)) == per_class(5)
    assert chosen != per_class(5, seed=1)
    assert set(chosen) < set(per_class(8))
    assert split.labelled_subset(LABELS, LabelSubset(), 0) == list(range(43))


def test_a_fraction_is_stratified_seeded_and_nested():
    chosen = fraction(0.3)
    assert Counter(LABELS[i] for i in chosen) == {0: 6, 1: 3, 2: 4}
    assert chosen == sorted(set(chosen)) == fraction(0.3)
    assert chosen != fraction(0.3, seed=1)
    assert set(fraction(0.001)) < set(fraction(0.1)) < set(chosen) < set(fraction(0.8)) < set(fraction(1.0))
    assert Counter(LABELS[i] for i in fraction(0.001)) == {0: 1, 1: 1, 2: 1}
    assert fraction(1.0) == list(range(43))


def test_too_few_of_a_class_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="class 1 has only 9"):
        per_class(10)


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


def test_the_fingerprint_of_rows_is_that_of_lists():
    paths, labels = ["a'b.mp4", 'ü".mp4', "c"], [3, 0, -1]
    expected = hashlib.sha256(repr((paths, labels, "x", (1.5,))).encode()).hexdigest()
    assert split.fingerprint(Strings(paths), Numbers(np.array(labels)), "x", (1.5,)) == expected
    assert split.fingerprint(Strings(paths)) == split.fingerprint(paths)
    assert split.fingerprint(Strings([])) == split.fingerprint([])
