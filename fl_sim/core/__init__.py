"""Foundations without knowledge of the project: types, errors, seeds, files, compiled kernels."""
