"""Speed and memory beside the peers: one command each, `python -m benchmarks.NAME --help`."""
