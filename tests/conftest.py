"""What all tests have in common."""

import shutil

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


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
