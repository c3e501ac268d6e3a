"""What `fl-sim` can be asked to do, one function a command; `fl_sim.cli` puts them together."""
