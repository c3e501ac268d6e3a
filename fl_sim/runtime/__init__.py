"""Runtimes: Flower Grids over this process, Ray actors, and what Flower's own runtimes need."""
