"""Meta-learning algorithms, one a file."""
