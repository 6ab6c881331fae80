"""Benchmarks of jax_flash: workloads, runs, figures and the README's tables."""
