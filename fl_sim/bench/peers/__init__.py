"""Other federated libraries on a workload that the benchmark wrote into a folder: one script each, run by the peer's own Python.

A script imports nothing of fl_sim and gets the folder's path. It reads `work.json`, `data.npz` and `initial.npz`
(`fl_sim.bench.peer_folder`), prints a line `ROUND {"fits": ..., "seconds": ...}` after each round, and leaves the final
parameters in `answer.npz`.
"""
