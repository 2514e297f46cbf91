import json
import subprocess

import pytest

from tubelet.config import Config, ConfigError, dump
from tubelet.runtime.run_folder import RunFolder, check_same_configuration, git_state, read_log


class Options(Config):
    lr: float = 1.0
    workers: int = 0
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
    RunFolder(tmp_path, Options(workers=3), step=0, free=("workers",)).close()
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path, Options(lr=2.0, mask=[{"scale": 0.7}]), step=0, free=("workers",))
    assert "lr: 1.0 there, 2.0 here" in str(error.value)
    assert "mask.0.scale: 0.5 there, 0.7 here" in str(error.value)
    assert "workers" not in str(error.value)


def test_what_a_submitted_job_left_open_is_no_other_configuration(tmp_path):
    class Colours(Config):
        normalize_mean: list[float] | None = None
        other: int | None = None

    open_, filled = Colours(), Colours(normalize_mean=[0.5])
    for there, here in ((open_, filled), (filled, open_)):
        (tmp_path / "config.yaml").write_text(dump(there))
        check_same_configuration(tmp_path, here, ())
    for here in (Colours(normalize_mean=[0.4]), Colours(other=1)):
        with pytest.raises(ConfigError, match="another configuration"):
            check_same_configuration(tmp_path, here, ())


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
