"""The experiment of the demo at a size for a GPU, with its report."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import Session

STUDY = "configs/study/demo_gpu.yaml"
TINY = [
    *("clips={clips: 16, train: 16, test: 16}", "devices=[cpu]", "processes=2", "threads=1"),
    "pretrain.overrides=[\"data.datasets=['{folder}/clips/pretrain']\", data.batch_size=8, optimization.ipe=2, "
    "logging.monitor_clips=0]",
    *("random.init_stds=[0.12]", "probe.heads=[linear]", "probe.per_head={}"),
    "probe.overrides=[optimization.num_epochs=1, optimization.min_steps=0, optimization.warmup=0.0]",
    "tasks.motion_few.labels_per_class=1",
]
READOUT_SECONDS = 60  # of clips, probes and report together
STOP_SECONDS = 30  # in which jobs save, and the results are collected
EPOCH_SECONDS = 10.0  # assumed, for 125 steps of 128 clips


def demo(session: Session) -> None:
    """Run the study as a program of its own; what it has reached when the time is over is recorded as well."""
    session.attempt("demo at GPU size", lambda: _study(session), 0 if session.tiny else READOUT_SECONDS)


def _study(session: Session) -> dict[str, Any]:
    import av  # noqa: F401  # the clips are mp4 files

    folder = session.scratch / "demo"
    epochs = max(2, int((session.seconds_left - READOUT_SECONDS) / EPOCH_SECONDS))
    overrides = [f"objectives.vjepa.overrides=[optimization.epochs={epochs}]", *(TINY if session.tiny else [])]
    command = [sys.executable, "-m", "app.study", "--fname", STUDY, f"folder={folder}", *overrides]
    log = session.scratch / "demo.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(5.0, session.seconds_left - STOP_SECONDS))
            end = "" if process.returncode == 0 else f"exit code {process.returncode}; "
        except subprocess.TimeoutExpired:
            process.terminate()  # it forwards the signal to its jobs, which save
            try:
                process.wait(STOP_SECONDS / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            end = "stopped when the time was over; "
    if (page := folder / "report.html").exists():
        shutil.copy(page, session.out / "demo_report.html")
    if (table := folder / "table.md").exists():
        shutil.copy(table, session.out / "demo_table.md")
    last_lines = log.read_text(errors="replace").splitlines()[-40:]
    return {**_pretraining(folder, end), "details": {"epochs": epochs, "log": last_lines}}


def _pretraining(folder: Path, note: str) -> dict[str, Any]:
    """Return the speed of the last steps that the pretraining has logged."""
    logs = sorted(folder.rglob("log.jsonl"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    steps = [line for line in lines if "clips_per_second" in line]
    if not steps:
        return {"note": f"{note}no step of the pretraining"}
    last = steps[-1]
    return {
        "milliseconds": last["step_seconds"] * 1e3,
        "clips_per_second": last["clips_per_second"],
        "note": f"{note}{last['step']} steps, loss {last['loss']:.3f}; demo_report.html has the accuracies",
    }
