"""Writes what a finished run leaves: ledger, recorded masks, models, report page, and the summary last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.core.files import as_json
from fl_sim.models import merged
from fl_sim.models.parameters import constants, snapshot
from fl_sim.report import Report, summarise, write_report
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_facts import DensePayloads, model_facts
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.round_hooks import Row
from fl_sim.simulation.run_folder import RunFolder
from fl_sim.simulation.server import Server
from fl_sim.training.model_file import write_model


def finish(
    federation: Federation,
    server: Server,
    folder: RunFolder,
    *,
    ledger: Ledger,
    rows: Sequence[Row],
    recorder: MaskRecorder | None,
    dense: DensePayloads,
    stopped: str | None,
    training_s: float,
    wall_s: float,
) -> Report:
    """Write the results of a run, and `stopped`, why it ended before its last round; where `summary.json` is, the run is complete.

    Raises:
        OSError: the folder cannot be written.
    """
    ledger.write(folder.path / "ledger.parquet")
    if recorder is not None:
        recorder.write(folder.path / "masks.parquet")
    summary = summarise(
        folder.asked,
        precision=federation.experiment.training.precision,
        rows=rows,
        ledger=ledger,
        facts=model_facts(federation, server, dense),
        stopped=stopped,
        wall_s=wall_s,
        training_s=training_s,
    )
    _write_models(federation, server, folder)
    for track in federation.tracks:
        track.built.put_back()  # what the model's class counted is not for the next run of this process
    kept = Ledger.read(folder.path / "ledger.parquet")  # the temporary row file is deleted with the run
    report = Report(folder.path, summary, rows, kept, dict(server.models[0].params))
    write_report(report)
    folder.complete((as_json(summary, indent=2) + "\n").encode())
    return report


def _write_models(federation: Federation, server: Server, folder: RunFolder) -> None:
    for number, (track, model) in enumerate(zip(federation.tracks, server.models, strict=True)):
        completed = track.complete(model.params)
        whole = merged(snapshot(completed), model=completed)
        suffix = f"-{track.label}" if number else ""
        write_model(folder.path / f"model{suffix}.safetensors", whole, track.described, _constants(track, completed))


def _constants(track: ModelTrack, model: nn.Module) -> dict[str, Tensor]:
    """Constant buffers of a user's own plain model: gates and adapters make theirs anew."""
    return {name: value for name, value in constants(model).items() if name.removeprefix("net.") in track.contents}
