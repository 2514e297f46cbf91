import json
import subprocess
from typing import Annotated

import pytest
import yaml

from tubelet.config import RESUME_IGNORED, RESUME_NULL_MATCHES, Config, ConfigError, check, dump
from tubelet.runtime.run_folder import RunFolder, check_same_configuration, git_state, read_log


class Options(Config):
    lr: float = 1.0
    workers: Annotated[int, RESUME_IGNORED] = 0
    mask: list[dict] = [{"scale": 0.5}]


def test_log_continues_at_the_step(tmp_path):
    run = RunFolder(tmp_path, Options(), step=0)
    run.log([{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)])
    run.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill while writing
    run = RunFolder(tmp_path, Options(), step=2)
    run.log([{"step": 3, "loss": 0.25}])
    run.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert (tmp_path / "git.txt").read_text()


def test_not_finite_is_null(tmp_path):
    run = RunFolder(tmp_path, Options(), step=0)
    run.log([{"step": 1, "loss": float("nan")}])
    run.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": None}


def test_another_configuration_is_refused_with_the_differing_keys(tmp_path):
    RunFolder(tmp_path, Options(), step=0).close()
    RunFolder(tmp_path, Options(workers=3), step=0).close()
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path, Options(lr=2.0, mask=[{"scale": 0.7}], workers=4), step=0)
    assert "lr: 1.0 there, 2.0 here" in str(error.value)
    assert "mask.0.scale: 0.5 there, 0.7 here" in str(error.value)
    assert "workers" not in str(error.value)


def test_what_a_submitted_job_left_open_is_no_other_configuration(tmp_path):
    class Colors(Config):
        normalize_mean: Annotated[list[float] | None, RESUME_NULL_MATCHES] = None
        other: int | None = None

    left_open, filled = Colors(), Colors(normalize_mean=[0.5])
    for there, here in ((left_open, filled), (filled, left_open)):
        (tmp_path / "config.yaml").write_text(dump(there))
        check_same_configuration(tmp_path, here)
    for here in (Colors(normalize_mean=[0.4]), Colors(other=1)):
        with pytest.raises(ConfigError, match="another configuration"):
            check_same_configuration(tmp_path, here)


def test_ignored_sections_and_no_others_of_the_same_beginning(tmp_path):
    class Cluster(Config):
        nodes: int = 1

    class Data(Config):
        cache: Annotated[str | None, RESUME_IGNORED] = None
        cache_features: bool = False

    class Sections(Config):
        cluster: Annotated[Cluster, RESUME_IGNORED] = Cluster()
        data: Data = Data()

    (tmp_path / "config.yaml").write_text(dump(Sections()))
    check_same_configuration(tmp_path, Sections(cluster=Cluster(nodes=8), data=Data(cache="elsewhere")))
    with pytest.raises(ConfigError, match="data.cache_features: False there, True here"):
        check_same_configuration(tmp_path, Sections(data=Data(cache_features=True)))


def test_options_that_the_earlier_run_did_not_have_are_at_their_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 1.0\nmask: [{scale: 0.5}]\n")
    check_same_configuration(tmp_path, Options())
    (tmp_path / "config.yaml").write_text("lr: 1.0\nmask: [{scale: 0.5}]\nremoved: 3\n")
    with pytest.raises(ConfigError, match="removed: 3 there, None here"):
        check_same_configuration(tmp_path, Options())


def test_a_run_of_0_1_is_compared_by_the_present_names(tmp_path):
    from app.vjepa.options import Options as Pretraining

    data = {"datasets": ["videos"], "sampling_rate": 4}
    old = {
        "app": "vjepa",
        "folder": "elsewhere",
        "data": {**data, "mask_type": "multiblock3d", "dataset_type": "VideoDataset", "num_workers": 7},
        "mask": [{"num_blocks": 2}],
        "model": {"encoder": "vision_transformer", "model_name": "vit_tiny", "pred_depth": 3, "use_rope": False},
        "loss": {"loss_exp": 2.0},
        "optimization": {"ema": [0.99, 1.0]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    new = {
        "folder": str(tmp_path),
        "data": data,
        "mask": [{"name": "multiblock3d", "num_blocks": 2}],
        "encoder": {"name": "vit_tiny"},
        "objective": {"predictor": {"depth": 3}, "loss_exp": 2.0, "ema": [0.99, 1.0]},
    }
    check_same_configuration(tmp_path, check(new, Pretraining, "new.yaml"))
    new["encoder"] = {"name": "vit_tiny", "use_rope": True}
    with pytest.raises(ConfigError, match="encoder.use_rope: False there, True here"):
        check_same_configuration(tmp_path, check(new, Pretraining, "new.yaml"))


def test_state_of_the_code_is_that_of_the_checkout_or_of_its_copy(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True, capture_output=True)

    assert git_state(tmp_path) == "not a git checkout\n"
    git("init", "-q")
    (tmp_path / "code.py").write_text("first\n")
    git("add", ".")
    git("commit", "-qm", "x")
    (tmp_path / "code.py").write_bytes(b"second \xff\n")  # no UTF-8
    assert "+second" in git_state(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert "git is not installed" in git_state(tmp_path)
    (tmp_path / "git.txt").write_text("as it was copied")
    assert git_state(tmp_path) == "as it was copied"


def test_folder_that_cannot_be_created_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be created .*; choose another one"):
        RunFolder(tmp_path / "file" / "run", Options(), step=0)
