import json
import subprocess
from typing import Annotated

import pytest
import yaml

from tubelet.config import RESUME_IGNORED, RESUME_NULL_MATCHES, Config, ConfigError, UserError, check, dump
from tubelet.runtime import run_folder
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


def test_a_log_with_steps_is_never_overwritten(tmp_path, caplog):
    for _ in range(2):
        run = RunFolder(tmp_path, Options(), step=0)
        run.log([{"step": 0, "rank": 3.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
        run.close()
    assert "an earlier start took 2 steps and saved none of them" in caplog.text
    RunFolder(tmp_path, Options(), step=0).close()
    expected = [{"step": 0, "rank": 3.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    for name in ("log-1.jsonl", "log-2.jsonl"):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == expected
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_damaged_lines_of_the_log_are_named_and_left_out(tmp_path, caplog):
    lines = [b'{"step": 1}', b"", b'{"step": 2, "lo', b"\xff\xfe", b"[3]", b'{"loss": 1}', b'{"step": 4}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(tmp_path) == [{"step": 1}, {"step": 4}]  # the last one is complete without its end of line
    assert "log.jsonl: left out line 2, line 3, line 4, line 5, line 6, which are no JSON objects" in caplog.text
    RunFolder(tmp_path, Options(), step=4).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"lr: [1", "expected"), (b"", "it is empty"), (b"- 1\n", "not a mapping"), (b"lr: \xff", "not UTF-8")],
)
def test_damaged_configuration_is_explained(tmp_path, content, problem):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config.yaml: it is damaged \(.*{problem}.*Restore it, remove it to"):
        check_same_configuration(tmp_path, Options())


def test_full_disk_at_the_log_is_explained(tmp_path):
    run = RunFolder(tmp_path, Options(), step=0)
    run._log.close()
    run._log = open("/dev/full", "w")
    with pytest.raises(UserError, match=r"the log cannot be written \(No space left on device\).*make room"):
        run.log([{"step": 1, "loss": 1.0}])
    run.close()


def test_new_options_have_their_defaults_also_where_others_were_removed(tmp_path):
    class Part(Config):
        depth: int = 2
        new: int = 5

    class Newer(Config):
        lr: float = 1.0
        parts: list[Part] = [Part()]
        also_new: bool = False

    (tmp_path / "config.yaml").write_text("lr: 1.0\nparts: [{depth: 2, removed: 3}]\n")
    with pytest.raises(ConfigError) as error:
        check_same_configuration(tmp_path, Newer())
    assert "parts.0.removed: 3 there, None here" in str(error.value)
    assert "new:" not in str(error.value)
    with pytest.raises(ConfigError, match=r"parts.0.new: 5 there, 6 here"):
        check_same_configuration(tmp_path, Newer(parts=[Part(new=6)]))


def test_other_code_is_mentioned_when_a_run_continues(tmp_path, monkeypatch, caplog):
    for step, state in ((0, "abc\n"), (0, "xyz\n"), (1, "xyz\n")):
        monkeypatch.setattr(run_folder, "git_state", lambda state=state: state)
        RunFolder(tmp_path, Options(), step=step).close()
    assert not caplog.text
    monkeypatch.setattr(run_folder, "git_state", lambda: "def\n M code.py\n")
    RunFolder(tmp_path, Options(), step=1).close()
    assert "continues with other code than before: revision xyz then, def now" in caplog.text
    monkeypatch.setattr(run_folder, "git_state", lambda: "def\n M other.py\n")
    RunFolder(tmp_path, Options(), step=1).close()
    assert "other uncommitted changes" in caplog.text


def test_only_options_that_a_program_has_are_recommended(tmp_path):
    class Pretraining(Options):
        init_from: str | None = None

    for options, recommended in ((Options(lr=2.0), False), (Pretraining(lr=2.0), True)):
        (tmp_path / "config.yaml").write_text(dump(type(options)()))
        with pytest.raises(ConfigError) as error:
            check_same_configuration(tmp_path, options)
        assert ("init_from" in str(error.value)) == recommended
