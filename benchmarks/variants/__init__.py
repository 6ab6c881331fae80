"""Variants of the Hopper attention kernels side by side: python -m benchmarks.variants --help."""
