"""What knows nothing of the project: types, errors, seeds, files, compiled kernels."""
