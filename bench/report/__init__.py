"""Records of measurements, and what is made of them: comparisons, plots, tables."""
