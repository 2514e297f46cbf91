"""Speed against peers that anyone can install: `python -m benchmarks`."""
