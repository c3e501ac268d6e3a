"""A complete summary for tests that need a few of its numbers and no run."""

from __future__ import annotations

from collections.abc import Mapping

from fl_sim.config.toml import Json
from fl_sim.report.schema import Accuracy, Density, Macs, Summary

SUMMARY = Summary(
    name="tiny",
    id="00000000",
    seed=0,
    engine="inline",
    rounds=2,
    num_clients=6,
    accuracy=Accuracy(final=0.5, last10_mean=0.5, best_by_validation=0.5),
    uplink_bytes=1_000,
    downlink_bytes=1_000,
    total_bytes=2_000,
    dense_total_bytes=2_000,
    saving=0.0,
    bytes_to_accuracy={},
    time_to_accuracy={},
    simulated_s=None,
    mask_bytes=0,
    mask_floor_bytes=0,
    protocol_bytes=2_000,
    estimates={},
    density=Density(prunable=1.0, model=1.0, uplink_mean=1.0),
    macs=Macs(dense=1, mean=1),
    params=1,
    trainable_params=1,
    disabled_features={},
    params_sha256="",
    wall_s=1.0,
    client_fits_per_s=1.0,
    failures={},
    precision="float32",
    versions={},
)


def summary(**changed: object) -> Mapping[str, Json]:
    """The content of a summary.json with these keys changed."""
    return Summary.model_validate({**SUMMARY.model_dump(), **changed}).model_dump()
