"""Token pruning on small real data, over seeds: `python -m benchmarks.experiment -o OUT`."""
