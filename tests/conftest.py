"""What all tests have in common."""

import pytest

from tubelet import report

WRITE_REPORT = report.write_or_warn


@pytest.fixture(scope="module", autouse=True)
def _no_reports():
    """Runs end without their report, which takes longer than the tiny runs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_or_warn", lambda folder: None)
        yield


@pytest.fixture
def with_report(monkeypatch):
    """Runs of this test write their report."""
    monkeypatch.setattr(report, "write_or_warn", WRITE_REPORT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape names of files that are not UTF-8 in captured output, which pytest-xdist cannot send otherwise."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
