"""Photographs the report page of a finished run with Chromium, as the page is today: docs/figures/report.png.

    python docs/figures/photograph.py runs/picture/topk-both-ways-*

`make report-picture` trains the run and calls this.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fl_sim import Report
from fl_sim.report import write_page

PICTURE = Path(__file__).parent / "report.png"
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
SIZE = "1000,1330"
"""Pixels of the window: the head of the page and its first charts."""


def photograph(folder: Path, picture: Path) -> None:
    """Write the page of a run anew and save a picture of its top.

    Raises:
        SystemExit: there is no browser.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"photograph: no browser; install one of: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "report.html"
        write_page([Report.load(folder)], page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
        where = [f"--user-data-dir={place}/profile", f"--window-size={SIZE}", f"--screenshot={picture.resolve()}"]
        command = [browser, *options, *where, page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    photograph(Path(sys.argv[1]), PICTURE)
