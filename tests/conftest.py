"""What all tests have in common."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape names of files that are not UTF-8 in captured output, which pytest-xdist cannot send otherwise."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
