"""Benchmarks that anyone can rerun: `fl-sim bench engine | codec | pruning`."""
