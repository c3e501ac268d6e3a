"""Small parameters, masks and a server state, each drawn from a seed."""

from __future__ import annotations

import torch

from fl_sim.codecs import Schema
from fl_sim.core.types import FlatParams, Mask, Params
from strategies.server_step import ServerState

SHAPES = {"conv.weight": (3, 2), "bn.weight": (3,), "bn.running_mean": (3,), "bn.running_var": (3,)}
PRUNABLE = ["conv.weight"]


def params(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    made["bn.running_var"] = made["bn.running_var"].abs()
    return made


def mask(seed: int) -> Mask:
    rng = torch.Generator().manual_seed(seed)
    return {"conv.weight": torch.rand(SHAPES["conv.weight"], generator=rng) < 0.5}


def state(seed: int = 99) -> ServerState:
    start = params(seed)
    schema = Schema.of(start, PRUNABLE)
    return ServerState(schema, FlatParams.pack({n: start[n] for n in schema.names}))
