"""What a run did, as one page: `python -m tubelet.report --folder runs/demo`, or `report.write(folder)`."""

from pathlib import Path


def write(folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report/*.png` from what is in a run folder; returns the page's path."""
    from tubelet.report import page  # matplotlib takes a second to import, and only the end of a run needs it

    return page.write(Path(folder))
