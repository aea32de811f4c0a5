"""Benchmarks of single ops on a GPU, each a command."""
