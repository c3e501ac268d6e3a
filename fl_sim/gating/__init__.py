"""Per-sample channel gates: a convolutional model that slims itself for each input.

gated = gate(build("resnet20"), keep=0.62)
gated(x); gated.count_macs(x)
"""

from fl_sim.gating.gates import SALIENCES, Gate, Masking, backward_only, both_ways
from fl_sim.gating.model import ChannelUse, Gated, Keep, gate
from fl_sim.gating.plan import Gating, keeping

__all__ = [
    "SALIENCES",
    "ChannelUse",
    "Gate",
    "Gated",
    "Gating",
    "Keep",
    "Masking",
    "backward_only",
    "both_ways",
    "gate",
    "keeping",
]
