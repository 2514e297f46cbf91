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


def test_each_fold_leaves_out_two_sequences_with_or_without_labels(copy_of_the_set, tmp_path):
    lists = tmp_path / "lists"
    write_lists(copy_of_the_set, lists)
    tested = []
    for fold in range(NUM_FOLDS):
        train, test, pretrain = (read_list(lists / f"fold{fold}_{part}.csv") for part in ("train", "test", "pretrain"))
        held_out = {str(fold + 1), str(fold + 11)}
        assert sequences(test.paths) == held_out
        assert not sequences(train.paths) & held_out
        assert not sequences(pretrain.paths) & held_out
        assert set(train.paths) <= set(pretrain.paths)
        assert (len(train.paths), len(test.paths)) == (36, 4)
        assert len(pretrain.paths) == 36 + {0: 2, 1: 3, 9: 3}.get(fold, 4)
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
    tests = [read_list(tmp_path / f"fold{fold}_test.csv") for fold in range(NUM_FOLDS)]
    assert sum(len(test.paths) for test in tests) == 120
    for fold, test in enumerate(tests):
        pretrain = read_list(tmp_path / f"fold{fold}_pretrain.csv")
        assert not set(test.paths) & set(pretrain.paths)
        held_out = {Path(path).stem.split("_")[1] for path in test.paths}
        unlabelled = {sequence_of(Path(path)) for path in pretrain.paths if "unlabelled" in path}
        assert unlabelled
        assert not unlabelled & held_out
