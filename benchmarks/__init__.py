"""One script a claim: `python -m benchmarks.NAME` takes `-o json` and prints peer, ratio and spread."""
