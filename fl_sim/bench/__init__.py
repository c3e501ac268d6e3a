"""Benchmarks that anyone can rerun: the commands of `fl-sim bench`."""
