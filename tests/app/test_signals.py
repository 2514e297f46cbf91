"""Stop signals to a pretraining in several local processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tubelet.runtime import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["parent", "group"])
def test_sigterm_saves_the_last_step_of_two_processes(small, tmp_path, send):
    path = small(optimization={"epochs": 100_000}, logging={"checkpoint_every_steps": None, "monitor_clips": 0})
    command = [sys.executable, "-m", "app.main", "--fname", str(path), "--devices", "cpu", "--processes", "2"]
    log = tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "output", "w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not log.exists() or '"step": 3,' not in log.read_text():
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        send(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    last_step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert last_step >= 3
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == last_step
    output = (tmp_path / "output").read_text()
    assert f"SIGTERM: stopped after step {last_step} " in output
    assert "Traceback" not in output
