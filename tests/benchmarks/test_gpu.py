"""The benchmark for a GPU runs on the CPU with tiny sizes, keeps its deadline, and writes what it has measured."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import results, sections, steps
from benchmarks.gpu.results import Record
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.session import Session

ROOT = Path(__file__).parents[2]
FAST = sorted(set(SECTIONS) - {"demo", "vjepa_vitl16_compiled", "vjepa2_vitl16_compiled", "vjepa2_vitl16"})


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cpu, deadline = torch.device("cpu"), time.monotonic() + 1000
    return Session("section", cpu, True, deadline, tmp_path / "records.jsonl", tmp_path / "scratch", tmp_path / "out")


def by_name(session):
    assert not session.failed
    return {record.name: record for record in results.read(session.records)}


def check_speeds(records):
    assert records
    for record in records.values():
        if "skipped" not in record.note and "not available" not in record.note:
            assert record.milliseconds is None or record.milliseconds > 0


@pytest.mark.parametrize("name", FAST)
def test_section(name, session):
    SECTIONS[name].run(session)
    check_speeds(by_name(session))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SECTIONS) - set(FAST)))
def test_slow_section(name, session):
    session.scratch.mkdir()
    session.out.mkdir()
    SECTIONS[name].run(session)
    records = by_name(session)
    check_speeds(records)
    if name == "demo":
        assert records["demo at GPU size"].clips_per_second > 0
        assert (session.out / "demo_report.html").exists()


def test_operations_are_those_that_torch_counts(session):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    options, batches, _ = steps.prepare(session, sections.VJEPA)
    step = steps.tubelet_step(session, options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(batches[0])
    assert steps.operations(options, batches[:1]) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_masks_by_themselves_give_the_same_loss(session):
    options, batches, _ = steps.prepare(session, sections.VJEPA)
    losses = [steps.tubelet_step(session, options, packed=packed)(batches[0])["loss"] for packed in (True, False)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_errors_and_missing_packages_are_recorded_and_the_section_goes_on(session):
    def without_package():
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    session.attempt("a", without_package)
    session.attempt("b", lambda: 1 / 0)
    session.attempt("c", lambda: {"milliseconds": 2.0})
    session.attempt("d", lambda: {"milliseconds": 2.0}, seconds=1e9)
    notes = {record.name: record.note for record in results.read(session.records)}
    assert "peer is not installed" in notes["a"]
    assert "ZeroDivisionError" in notes["b"]
    assert notes["c"] == ""
    assert notes["d"].startswith("skipped: ")
    assert session.failed


@pytest.fixture
def fake_sections(monkeypatch, tmp_path):
    """Sections that are small programs: one that measures, one that hangs, and one that fails."""
    programs = {
        "measures": "r.append(path, r.Record('measures', 'x', milliseconds=1.0))",
        "hangs": "r.append(path, r.Record('hangs', 'before', milliseconds=1.0)); time.sleep(1000)",
        "fails": "sys.exit('no such kernel')",
        "late": "r.append(path, r.Record('late', 'x'))",
    }
    needs = {"measures": (0, 60), "hangs": (0, 14), "fails": (0, 60), "late": (1e6, 1e6)}
    monkeypatch.setattr(bench, "SECTIONS", {name: Section(lambda s: None, *needs[name]) for name in programs})
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "python"
    lines = [f"#!{sys.executable}", "import sys, time", "from pathlib import Path", f"sys.path[:0] = {sys.path}"]
    lines += ["import benchmarks.gpu.results as r", "path = Path(sys.argv[sys.argv.index('--records') + 1])"]
    lines += [f"if sys.argv[3] == {name!r}: {program}" for name, program in programs.items()]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(script))
    return list(programs)


def test_sections_that_hang_or_fail_do_not_stop_the_others(fake_sections, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GRACE_SECONDS", 1)
    out, start = tmp_path / "out", time.monotonic()
    arguments = bench._parser().parse_args(["--device", "cpu", "--size", "tiny", "--out", str(out), "--seconds", "100"])
    out.mkdir()
    bench.run(arguments)
    assert time.monotonic() - start < 60
    written = json.loads((out / "results.json").read_text())
    notes = {(record["section"], record["name"]): record["note"] for record in written["records"]}
    assert notes.pop(("measures", "x")) == ""
    assert notes.pop(("hangs", "before")) == ""
    assert notes.pop(("hangs", "")).startswith("stopped after")
    assert notes.pop(("fails", "")).startswith("failed with exit code 1")
    assert notes.pop(("late", "")).startswith("skipped")
    assert not notes
    assert written["environment"]["torch"] == torch.__version__.partition("+")[0]
    table = (out / "results.md").read_text()
    assert "| measures | x | 1.00 |" in table
    assert "stopped after" in table


def test_table_has_a_cell_for_each_column():
    text = results.markdown({"GPU": "none"}, [Record("a", "b", share=0.5, note="x | y\nz")])
    header, rule, row = text.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == len(results.COLUMNS) + 1
    assert row == "| a | b |  |  |  |  |  | 50% | x \\| y z |"
