"""Benchmarks: kernels, and later whole servers."""
