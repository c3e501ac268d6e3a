"""An experiment as a TOML file: sections, overrides, the reference of all keys."""

from fl_sim.config.experiment import Experiment

__all__ = ["Experiment"]
