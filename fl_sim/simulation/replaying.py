"""Replay of a run folder: what of it is encoded again, and how (`fl_sim.communication.replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fl_sim.communication.mask_log import read_masks
from fl_sim.communication.payload_log import FOLDER, recorded_files, require_recorded
from fl_sim.communication.replay import Link, Recoding, Replayed, replay, replay_masks
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.own_codecs import codings_of

KEYS = tuple(f"wire.{way}.{key}" for way in ("uplink", "downlink") for key in ("values", "content", "masks"))
"""Keys of the config that a replay may change."""
CODECS = ("wire.codec.uplink", "wire.codec.downlink", "wire.budget")
"""Tables of the config that a replay may change, with the keys below."""


def asked(
    report: Report, overrides: Sequence[str] = (), *, values: str | None = None, mask: str = "fl_sim"
) -> Recoding:
    """The codecs that shall take the place of a run's.

    Args:
        report: the run.
        overrides: `key=value` for keys of `KEYS`.
        values: value type of both directions; None = the run's.
        mask: mask codec.

    Raises:
        UserError: another key, or no such codec.
    """
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key not in KEYS and not key.startswith(CODECS):
            allowed = ", ".join((*KEYS, *CODECS))
            raise UserError(f"replay: {key!r} cannot change after a run; allowed: {allowed}")
    both = [] if values is None else [f'wire.{way}.values="{values}"' for way in ("uplink", "downlink")]
    experiment = Experiment.from_tree(report.config, [*both, *overrides], where="replay")
    return Recoding(*codings_of(experiment), mask)


def replay_run(report: Report, recoding: Recoding) -> Replayed:
    """Encode again what a finished run recorded.

    Raises:
        UserError: nothing was recorded, files are damaged, or the codec needs what was not recorded.
    """
    experiment = Experiment.from_tree(report.config, where=f"config {report.folder / 'config.toml'}")
    require_recorded(report.folder / FOLDER, experiment.wire.record_payloads, report.ledger)
    federation = Federation.build(experiment, precision=report.results.precision, quiet=True)
    if recorded_files(report.folder / FOLDER):
        links = [
            Link(track.exchange, track.initial, experiment.seed, experiment.wire.broadcast is not None)
            for track in federation.tracks
        ]
        return replay(report.ledger, report.folder / FOLDER, links, recoding)
    path = report.folder / "masks.parquet"
    if experiment.wire.record_masks and not path.exists():
        raise UserError(f"{path}: the recorded masks are missing; put the file back, or run it again with --fresh")
    masks = read_masks(path, federation.first.exchange.schema)
    if replace(recoding, mask="fl_sim") != Recoding(*codings_of(experiment)):
        raise UserError(
            f"{report.folder}: masks were recorded, values were not: only --mask can change; "
            "for other values run it with wire.record_payloads=1"
        )
    return replay_masks(report.ledger, masks, recoding.mask)
