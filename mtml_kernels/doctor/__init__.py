"""This machine's report: what is installed, built, detected and chosen, and why; with a test of the kernels it has."""

from mtml_kernels.doctor.probes import main, report

__all__ = ["main", "report"]
