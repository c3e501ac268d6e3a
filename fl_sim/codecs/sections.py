"""Sections of a payload: the one list from which codecs, ledger and report take their names and orders."""

from __future__ import annotations

from collections.abc import Mapping

SECTION_OF: Mapping[str, str] = {"prunable": "values", "dense": "dense", "buffers": "buffers", "auxiliary": "auxiliary"}
"""Kind of a tensor in a `Schema` -> section that carries its values; both in the order of the bytes."""
KINDS = tuple(SECTION_OF)
VALUE_SECTIONS = tuple(SECTION_OF.values())
MASK, HEADER = "mask", "header"
BODY = (MASK, *VALUE_SECTIONS)
"""Sections in the order of the bytes, after the header."""
BOOKED = (VALUE_SECTIONS[0], MASK, *VALUE_SECTIONS[1:], HEADER)
"""Sections in the order of the ledger's codes and of the report's charts: what pruning changes comes first."""
CODEC = "codec"
"""Bytes of a codec of the user's own (`fl_sim.codecs.own_coding`), in the place of `values`."""
EXTRA = "extra"
"""Extra tensors of a method (`fl_sim.communication.extra`): a payload of their own, header and all, is one section."""


def extra_section(name: str) -> str:
    """Section of the extra tensors with this name."""
    return f"{EXTRA}/{name}"


def is_extra(section: str) -> bool:
    """Whether a section is one of extra tensors."""
    return section.startswith(f"{EXTRA}/")
