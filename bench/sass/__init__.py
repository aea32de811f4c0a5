"""Times of launches that need not run: the kernels as they are compiled, counted instruction by instruction."""
