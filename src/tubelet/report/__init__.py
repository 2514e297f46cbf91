"""Report of a run or a study as one page: `python -m tubelet.report --folder runs/demo`."""

import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def write(folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report/*.png` from the files in a run folder.

    Returns:
        The path of `report.html`.
    """
    from tubelet.report import page  # imports matplotlib, which takes a second

    return page.write(Path(folder))


def write_or_warn(folder: str | Path) -> Path | None:
    """Write the report of a finished run; log a warning with the traceback where that fails.

    Programs that train call this one, so that a full disk or a broken matplotlib does not fail a run whose results are
    saved.

    Returns:
        The path of `report.html`, or None where it could not be written.
    """
    try:
        return write(folder)
    except Exception:
        logger.warning(
            "The report could not be written. The run itself is complete. To write the report: "
            "python -m tubelet.report --folder %s",
            folder,
            exc_info=True,
        )
        return None


def compare(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write `comparison.html` and `comparison.json` of several runs to the folder `out`.

    Returns:
        The path of `comparison.html`.
    """
    from tubelet.report import comparison

    return comparison.write([Path(folder) for folder in folders], Path(out))
