"""What YAML allows and this project does not, and files that are no YAML: each is one message with file and line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_program
from tubelet import config
from tubelet.config import Config, ConfigError
from tubelet.config.yaml_files import parse_yaml, read_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice, first in line 1"),
        ("data:\n  x: 1\n  y: 2\n  x: 3\n", "line 4: 'x' is given twice, first in line 2"),
        ("data: {x: 1}\nmeta: {}\ndata:\n  y: 2\n", "line 3: 'data' is given twice, first in line 1"),
        ('mask:\n  - {x: 1, "x": 2}\n', "line 2: 'x' is given twice, first in line 2"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n", "line 5: 'y' is given twice, first in line 4"),
    ],
)
def test_duplicate_keys_are_refused_with_the_lines(tmp_path, text, message):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"twice\.yaml, {message}"):
        config.read(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, x: 2}\n", {"a": {"x": 1}, "b": {"x": 2}}),
        ("a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: [*a, *b], z: 3}\n", {"x": 1, "y": 2, "z": 3}),
        # A merged mapping that merges another one is expanded before it is constructed.
        ("top: {b: &b {<<: &c {x: 1}, x: 2}}\nc: {<<: *b}\n", {"x": 2}),
        ("c: {'1': 1, 1: 2}\n", {"1": 1, 1: 2}),
    ],
)
def test_merged_keys_are_no_duplicates(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value or parsed["c"] == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nfolder: caf\xe9\n", "line 2: a character that is not UTF-8; save the file as UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
        (b"a: [1\nb: 2\n", r"not valid YAML: (?s:.*)x\.yaml\", line 2"),
        (b"a: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"a: !!int x\n", "not valid YAML: invalid literal"),
        (b"a: !!python/name:os.system x\n", "not valid YAML: could not determine a constructor"),
        (b"a: &x [*x]\n", r"an alias \(\*\) is within its own anchor"),
        (b"[" * 5000, "the nesting is too deep"),
        (b"- a\n", "expected a mapping"),
        (b"", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_message(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.yaml[^\n]*{message}"):
        config.read(tmp_path / "x.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_byte_order_mark_are_read(tmp_path, encoding):
    (tmp_path / "x.yaml").write_text("folder: Übung\r\nlr: 1e-3\r\n", encoding=encoding)
    assert read_yaml(tmp_path / "x.yaml") == {"folder": "Übung", "lr": 1e-3}


def test_a_path_that_is_not_utf_8_can_be_given_on_the_command_line_and_is_written_to_the_run_folder(tmp_path):
    class Options(Config):
        folder: str

    (tmp_path / "x.yaml").write_text("folder: a\n")
    options = config.load(tmp_path / "x.yaml", ["folder=" + os.fsdecode(b"caf\xe9")], Options)
    assert os.fsencode(options.folder) == b"caf\xe9"
    (tmp_path / "config.yaml").write_text(config.dump(options), encoding="utf-8")
    assert config.load(tmp_path / "config.yaml", [], Options) == options


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_that_are_not_finite_are_no_values_of_options(tmp_path, value):
    class Part(Config):
        rates: list[float]

    class Options(Config):
        lr: float | None
        part: Part

    (tmp_path / "x.yaml").write_text("lr: 1.0\npart: {rates: [1.0, 2.0]}\n")
    for key in ("lr", "part.rates.1"):
        with pytest.raises(ConfigError, match=rf"x\.yaml(?s:.)*  {key}: Input should be a finite number"):
            config.load(tmp_path / "x.yaml", [f"{key}={value}"], Options)


def test_programs_are_found_from_any_directory(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    done = run_program("app.main", "--fname", f"{ROOT}/configs/pretrain/debug.yaml", "folder=run", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        f"data.datasets: 'runs/demo/clips/pretrain': no such folder, list or file (looked in {tmp_path})" in done.stdout
    )
    command = [sys.executable, "-m", "app.main", "--fname", "pretrain/debug.yaml", "folder=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"pretrain/debug.yaml: no such file (looked in {tmp_path})" in done.stderr
