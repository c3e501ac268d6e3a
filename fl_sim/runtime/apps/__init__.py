"""Foreign Flower apps: Flower's Grid contract, and the processes that their clients run in."""
