"""Measurements on one GPU: `python -m benchmarks.gpu --out FOLDER`. docs/gpu.md explains them."""
