"""Lists for cross-validation on UT-Interaction (Ryoo & Aggarwal, SDHA 2010), for pretraining and probing.

`labels.csv` has the path, label, sequence and fold of each clip. The test clips of one of the ten folds are those of
two sequences (q of set 1 and q + 10 of set 2). All clips of a sequence have the same actors and background, so none of
them may be in a training list. Five folds of twice the size, each of two of the ten, need half as many pretrainings.

The clips in `unlabelled/` were cut from set 1, too: `set1_<number>_<sequence>_6.mp4`. Those of a held-out sequence show
the same actors and background as the test clips, so the pretraining list of the fold excludes them as well.
"""

import re
from pathlib import Path

from tubelet.config import ConfigError
from tubelet.data.sources import read_table, write_list

NUM_FOLDS = {"": 10, "_of5": 5}
"""Suffix of `fold<k>` in the names of the lists -> number of folds."""


def write_lists(source: Path, target: Path) -> None:
    """Write `fold<k>_{pretrain,train,test}.csv` for ten folds and `fold<k>_of5_….csv` for five to the folder `target`.

    Args:
        source: Folder of the data set.
        target: Folder of the lists.

    Raises:
        ConfigError: `source` is not the folder of UT-Interaction.
    """
    rows = read_table(source / "labels.csv", ("path", "label", "sequence", "fold10"), "UT-Interaction")
    unlabelled = sorted((source / "unlabelled").glob("*.mp4"))
    target.mkdir(parents=True, exist_ok=True)
    for suffix, num_folds in NUM_FOLDS.items():
        for fold in range(num_folds):
            in_test = [int(row["fold10"]) * num_folds // 10 == fold for row in rows]
            test = [row for row, held_out in zip(rows, in_test, strict=True) if held_out]
            train = [row for row, held_out in zip(rows, in_test, strict=True) if not held_out]
            test_sequences = {row["sequence"] for row in test}
            extra = [path for path in unlabelled if sequence_of(path) not in test_sequences]
            name = f"fold{fold}{suffix}"
            for part, chosen in (("test", test), ("train", train)):
                videos = [source / row["path"] for row in chosen]
                write_list(target / f"{name}_{part}.csv", videos, [int(row["label"]) for row in chosen])
            write_list(target / f"{name}_pretrain.csv", [*(source / row["path"] for row in train), *extra])


def sequence_of(unlabelled: Path) -> str:
    """The sequence of set 1 that an unlabeled clip was cut from.

    Raises:
        ConfigError: The file name has another format.
    """
    match = re.fullmatch(r"set1_\d+_(\d+)_6", unlabelled.stem)
    if match is None:
        raise ConfigError(f"{unlabelled}: expected a name like set1_100_4_6.mp4, whose third part is the sequence")
    return match[1]
