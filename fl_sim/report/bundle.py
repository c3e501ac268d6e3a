"""plotly.js as a report page carries it: the vendored cartesian bundle, gzip in base64, which the page unpacks.

The Python package `plotly` ships the whole library only, 4.8 MB in every page; this is 0.7 MB. See fl_sim/report/plotly/.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files

VERSION = "4.1.1"
"""Of plotly.js."""
SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
"""Of the unpacked JavaScript, as npm has it."""
_FOLDER = files("fl_sim.report") / "plotly"


def compressed() -> bytes:
    """The bundle as a gzip file."""
    return (_FOLDER / "plotly-cartesian.min.js.gz").read_bytes()


@cache
def plotly() -> str:
    """The bundle for a text element of a page."""
    return base64.b64encode(compressed()).decode()


@cache
def licence() -> str:
    """Notice that goes with every copy of plotly.js."""
    return f"plotly.js {VERSION}\n{(_FOLDER / 'LICENSE').read_text(encoding='utf-8')}"
