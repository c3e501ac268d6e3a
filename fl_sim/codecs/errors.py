"""The one exception that bad bytes can raise."""

from __future__ import annotations


class CorruptPayload(ValueError):
    """The bytes are no payload of this schema."""
