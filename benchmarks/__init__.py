"""Benchmarks against publicly available implementations: `python -m benchmarks`."""
