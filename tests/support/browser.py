"""Opens pages in a real Chromium without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-headless-shell", "google-chrome") if (path := shutil.which(name))), None
)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: pages are not opened")


def dom(page: Path, profile: Path, *options: str, script: str = "", width: int = 1000) -> str:
    """The document after its scripts and `script`, which runs in the page once its charts are drawn.

    Any request that the page makes, and any error, is a line of the console: both fail here.
    """
    if script:
        text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{_later(script)}</script></body>")
        page = profile.with_suffix(".html")
        page.write_text(text, encoding="utf-8")
    return _opened(
        page.as_uri(), profile, "--virtual-time-budget=20000", "--proxy-server=127.0.0.1:9", *options, width=width
    )


def dom_at(url: str, profile: Path) -> str:
    """The document of a server of this machine after its first seconds; it may ask that server only."""
    return _opened(url, profile, "--virtual-time-budget=4000", "--proxy-server=127.0.0.1:9", width=1000)


def _opened(url: str, profile: Path, *options: str, width: int) -> str:
    assert BROWSER is not None
    basic = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    command = [BROWSER, *basic, f"--user-data-dir={profile}", *options, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


def _later(script: str) -> str:
    return (
        "const wait = setInterval(async () => { if (!document.documentElement.dataset.drawn) return;"
        f"clearInterval(wait); {script} }}, 20);"
    )
