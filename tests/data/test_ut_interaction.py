from pathlib import Path

import pytest

from tubelet.config import ConfigError
from tubelet.data.sources import read_list
from tubelet.data.ut_interaction import NUM_FOLDS, sequence_of, write_lists


@pytest.fixture
def copy_of_the_set(tmp_path):
    """Ten sequences in each of two sets, two clips each, and unlabelled clips of sequences 1, 2 and 10."""
    lines = ["path,label,class,set,sequence,fold10,width,height,frames,fps"]
    for sequence in range(1, 21):
        part = 1 if sequence <= 10 else 2
        for label in (0, 5):
            path = f"segmented set{part}/{sequence}_{label}.mp4"
            lines.append(f"{path},{label},x,{part},{sequence},{(sequence - 1) % 10},1,1,1,1")
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
    (tmp_path / "unlabelled").mkdir()
    for number, sequence in ((60, 1), (61, 1), (73, 2), (194, 10)):
        (tmp_path / "unlabelled" / f"set1_{number}_{sequence}_6.mp4").touch()
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def sequences(paths):
    """Sequence of set 1 or 2 of each path, labelled or not."""
    return {sequence_of(Path(p)) if "unlabelled" in p else Path(p).stem.split("_")[0] for p in paths}


@pytest.mark.parametrize(("suffix", "num_folds"), NUM_FOLDS.items())
def test_each_fold_leaves_out_sequences_with_or_without_labels(copy_of_the_set, tmp_path, suffix, num_folds):
    lists = tmp_path / "lists"
    write_lists(copy_of_the_set, lists)
    size = 10 // num_folds
    tested = []
    for fold in range(num_folds):
        parts = ("train", "test", "pretrain")
        train, test, pretrain = (read_list(lists / f"fold{fold}{suffix}_{part}.csv") for part in parts)
        of_set_1 = range(fold * size + 1, (fold + 1) * size + 1)
        held_out = {str(sequence + offset) for sequence in of_set_1 for offset in (0, 10)}
        assert sequences(test.paths) == held_out
        assert not sequences(train.paths) & held_out
        assert not sequences(pretrain.paths) & held_out
        assert set(train.paths) <= set(pretrain.paths)
        assert (len(train.paths), len(test.paths)) == (40 - 4 * size, 4 * size)
        unlabelled = sum(count for sequence, count in ((1, 2), (2, 1), (10, 1)) if sequence not in of_set_1)
        assert len(pretrain.paths) == len(train.paths) + unlabelled
        assert set(pretrain.labels) == {-1}
        assert set(train.labels) == set(test.labels) == {0, 5}
        tested += test.paths
    assert len(tested) == len(set(tested)) == 40


def test_other_folders_and_names_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"labels\.csv does not exist"):
        write_lists(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="third part is the sequence"):
        sequence_of(Path("set2_1_1_6.mp4"))


def test_lists_of_the_real_set(shared_data, tmp_path):
    source = shared_data / "ut_interaction"
    if not source.is_dir():
        pytest.skip(f"{source} does not exist")
    write_lists(source, tmp_path)
    names = [f"fold{fold}{suffix}" for suffix, num_folds in NUM_FOLDS.items() for fold in range(num_folds)]
    tests = [read_list(tmp_path / f"{name}_test.csv") for name in names]
    assert sum(len(test.paths) for test in tests) == 120 * len(NUM_FOLDS)
    for name, test in zip(names, tests, strict=True):
        pretrain = read_list(tmp_path / f"{name}_pretrain.csv")
        assert not set(test.paths) & set(pretrain.paths)
        held_out = {Path(path).stem.split("_")[1] for path in test.paths}
        unlabelled = {sequence_of(Path(path)) for path in pretrain.paths if "unlabelled" in path}
        assert unlabelled
        assert not unlabelled & held_out
