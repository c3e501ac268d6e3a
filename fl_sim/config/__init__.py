"""An experiment as a TOML file: sections, overrides, the reference of all keys."""

from fl_sim.config.experiment import INDIFFERENT, Experiment
from fl_sim.config.target import Target

__all__ = ["INDIFFERENT", "Experiment", "Target"]
