"""The report page of a foreign Flower app: one self-contained HTML file without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fl_sim.core.files import write_atomically

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class AppPage:
    """What the page shows.

    Attributes:
        title: name of the app.
        facts: name -> text, in order.
        config: the run config.
        curves: metric -> round -> value.
        traffic: rows of (phase, direction, messages, arrays, configs, metrics, protocol), bytes from the fourth on.
        failures: reason of an error reply -> how often.
    """

    title: str
    facts: Mapping[str, str]
    config: Mapping[str, object]
    curves: Mapping[str, Mapping[int, float]]
    traffic: Sequence[Sequence[object]]
    failures: Mapping[str, int]

    def write(self, path: Path) -> None:
        """Write the page. Jinja2 escapes every string of the run."""
        from jinja2 import Environment

        template = files("fl_sim.report").joinpath("flower_page.html").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        rounds = sorted({number for values in self.curves.values() for number in values})
        text = environment.from_string(template).render(page=self, rounds=rounds, policy=POLICY)
        # A file name that is no UTF-8 may stand in an error's text, and must not cost the page.
        write_atomically(path, text.encode(errors="backslashreplace"))
