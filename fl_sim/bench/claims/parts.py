"""What a run's bytes are made of, in the words in which papers count or forget them; every byte of the ledger once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fl_sim.codecs.sections import CODEC, is_extra
from fl_sim.communication.ledger import WORDS, Ledger

PARTS: Mapping[str, str] = {
    "values up": "weights that clients send",
    "masks up": "which weights they are",
    "rest up": "biases and BatchNorm that clients send",
    "extra up": "other tensors of the method that clients send",
    "values down": "weights that the server sends",
    "masks down": "which weights they are, after a client's first task",
    "rest down": "biases and BatchNorm that the server sends",
    "extra down": "other tensors of the method that the server sends",
    "first contact": "masks and frozen weights in a client's first task",
    "queries": "questions to clients between rounds, and their answers",
    "evaluation": "models sent to clients for evaluation alone, and the answers",
    "headers": "headers of all payloads",
    "failed": "messages of clients that failed or came too late",
}
"""Part -> what it is. They are disjoint, and their sum is the ledger's."""
EVALUATION = "evaluation"
OTHERS = {"query": "queries", "evaluate": EVALUATION}
FIRST = ("mask", "auxiliary")
KINDS = {"values": "values", CODEC: "values", "mask": "masks"}


def parts_of(ledger: Ledger) -> dict[str, int]:
    """Bytes of each part, in the order of `PARTS`."""
    sums = dict.fromkeys(PARTS, 0)
    met: set[int] = set()
    for message in _messages(ledger):
        row = next(iter(message.values()))
        client, direction = int(row["client"]), str(row["direction"])
        first = direction == "down" and client not in met
        if direction == "down":
            met.add(client)
        for section, own in message.items():
            part = _part(section, direction, str(own["phase"]), str(own["status"]), first=first)
            sums[part] += int(own["payload_bytes"])
    return sums


def _messages(ledger: Ledger) -> Iterator[dict[str, dict[str, int | float | str]]]:
    for phase in WORDS["phase"]:
        yield from ledger.by_message(phase=phase)


def _part(section: str, direction: str, phase: str, status: str, *, first: bool) -> str:
    if status != "ok":
        return "failed"
    if phase in OTHERS:
        return OTHERS[phase]
    if section == "header":
        return "headers"
    if first and section in FIRST:
        return "first contact"
    if is_extra(section):
        return f"extra {direction}"
    return f"{KINDS.get(section, 'rest')} {direction}"
