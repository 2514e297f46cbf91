"""Select the labelled videos that a probe trains on, and those that are held out to choose a head."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tubelet.config import ConfigError
from tubelet.data.rows import Rows
from tubelet.probing.label_subset import LabelSubset
from tubelet.runtime.seeds import torch_generator

MAX_SHOWN = 10
"""Classes that a warning lists."""


def labelled_subset(labels: Sequence[int], subset: LabelSubset, seed: int) -> list[int]:
    """Draw the samples that a probe trains on from `seed`.

    Args:
        labels: Label of each sample.
        subset: How many samples of each class are drawn.
        seed: Seed of the draw. The samples of a smaller number are among those of a larger one.

    Returns:
        Their indices, sorted.

    Raises:
        ConfigError: A class has too few samples.
    """
    chosen = []
    for label, members in _members(labels).items():
        count = len(members)
        if subset.label_fraction is not None:
            count = max(1, round(subset.label_fraction * count))
        if subset.labels_per_class is not None:
            count = subset.labels_per_class
        if len(members) < count:
            raise ConfigError(
                f"data.labels_per_class is {count}, but class {label} has only {len(members)} training samples"
            )
        chosen += members[_permutation(len(members), seed, label)[:count]].tolist()
    return sorted(chosen)


def stratified_parts(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """The part, 0 .. count - 1, of each sample: parts of about equal size and about equal numbers of each class."""
    parts = [0] * len(labels)
    assigned = 0
    for label, members in _members(labels).items():
        for i in _permutation(len(members), seed, label):
            parts[members[i]] = assigned % count
            assigned += 1
    return parts


def check_labels(labels: Sequence[int], paths: Sequence[str], num_classes: int, key: str) -> None:
    """Raises ConfigError, with `key` and the first such sample, where a label is not in 0 .. num_classes - 1."""
    for index, label in enumerate(labels):
        if not 0 <= label < num_classes:
            problem = "has no label" if label < 0 else f"has label {label}"
            raise ConfigError(
                f"{key}: {paths[index]} {problem}; with num_classes {num_classes} labels are 0 to {num_classes - 1}"
            )


def problems_of_labels(
    train: Sequence[int] | np.ndarray,
    val: Sequence[int] | np.ndarray | None,
    num_classes: int,
    classes: Sequence[str] = (),
) -> list[str]:
    """Return what is unusual about the classes of training and validation videos, a sentence each.

    Args:
        train, val: Labels, 0 to `num_classes` - 1; `val` is None where the training videos are validated.
        num_classes: Number of classes.
        classes: Their names, where they are known.
    """

    def shown(labels: np.ndarray, of: np.ndarray | None = None) -> str:
        texts = [f"{i} ({classes[i]})" if i < len(classes) else str(i) for i in labels[:MAX_SHOWN].tolist()]
        if of is not None:
            texts = [f"{text}: {of[i]}" for text, i in zip(texts, labels.tolist(), strict=False)]
        return ", ".join(texts) + (", …" if len(labels) > MAX_SHOWN else "")

    in_train = np.bincount(np.asarray(train), minlength=num_classes)
    in_val = in_train if val is None else np.bincount(np.asarray(val), minlength=num_classes)
    problems = []
    for kind, count in (("training", in_train), *([] if val is None else [("validation", in_val)])):
        if len(present := np.flatnonzero(count)) == 1:
            problems.append(f"all {count.sum()} {kind} videos have one class, {shown(present)}")
    absent = np.flatnonzero((in_train == 0) & (in_val == 0))
    if absent.tolist() == [0]:
        problems.append(
            f"no video has label 0, though all others to {num_classes - 1} are there; labels start at 0: subtract 1 "
            f"from each, and set num_classes to {num_classes - 1}"
        )
    elif len(absent):
        problems.append(f"{len(absent)} of {num_classes} classes have no video: {shown(absent)}; see num_classes")
    if len(only_val := np.flatnonzero((in_train == 0) & (in_val > 0))):
        problems.append(
            f"{in_val[only_val].sum()} validation videos have a class without training videos, so that they cannot be "
            f"classified correctly: {shown(only_val, in_val)}"
        )
    return problems


def fingerprint(*parts: object) -> str:
    """Hash of `parts`; a sequence of rows has the hash of a list."""
    digest = hashlib.sha256()
    for piece in _representation(parts):
        digest.update(piece.encode())
    return digest.hexdigest()


def _representation(parts: tuple[object, ...]) -> Iterator[str]:
    """Yield the pieces of `repr(parts)`, in which rows are lists, without making these lists."""
    yield "("
    for number, part in enumerate(parts):
        yield ", " if number else ""
        if isinstance(part, Rows):
            yield "["
            for index, item in enumerate(part):
                yield f", {item!r}" if index else repr(item)
            yield "]"
        else:
            yield repr(part)
    yield ",)" if len(parts) == 1 else ")"


def _members(labels: Sequence[int]) -> dict[int, np.ndarray]:
    """Label -> indices of its samples, sorted by label."""
    of_samples = np.asarray(labels)
    order = np.argsort(of_samples, kind="stable")
    values, starts = np.unique(of_samples[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _permutation(length: int, seed: int, label: int) -> list[int]:
    return torch.randperm(length, generator=torch_generator(seed, "subset", label)).tolist()
