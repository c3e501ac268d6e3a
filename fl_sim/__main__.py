"""`python -m fl_sim`, the same as `fl-sim`."""

from fl_sim.cli import main

main()
