"""Execution of clients: Flower Grids over this process, worker processes and Ray actors; client state."""
