"""The requests of a live page without the page: `python -m fl_sim.cli.live_reader ADDRESS`, for the benchmark."""

from __future__ import annotations

import json
import sys
import time
import urllib.request

ASKS_EVERY_S = 2.0
"""Seconds between two requests of the page."""


def ask(address: str) -> None:
    """Send the requests of a page, for ever."""
    version = 0
    while True:
        with urllib.request.urlopen(f"{address}state.json?since={version}", timeout=60) as answer:
            body = answer.read()
        version = json.loads(body)["version"] if body else version
        time.sleep(ASKS_EVERY_S)


if __name__ == "__main__":
    ask(sys.argv[1])
