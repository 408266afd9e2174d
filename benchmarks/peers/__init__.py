"""Other systems on workload W, each in an environment of its own: `python -m benchmarks.peers`."""
