"""Benchmarks of mtml-kernels: workloads, providers (ours and the peers), a match gate, timings, records and verdicts.

Run from a checkout, with the packages installed: ``python -m bench --help``.
"""
