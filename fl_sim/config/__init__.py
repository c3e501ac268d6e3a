"""An experiment as a TOML file: sections, overrides, the reference of all keys."""

from fl_sim.config.experiment import Experiment, Target

__all__ = ["Experiment", "Target"]
