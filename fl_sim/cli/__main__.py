"""`python -m fl_sim.cli`."""

from fl_sim.cli import main

main()
