"""Flower Grids: inline, worker processes, a vectorised cohort, Ray."""
