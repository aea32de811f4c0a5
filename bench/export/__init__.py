"""The workloads in the formats of other projects' benchmarks."""
