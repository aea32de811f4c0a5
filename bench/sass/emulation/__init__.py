"""Compiled kernels run instruction by instruction, so that what a chip would issue is counted and not guessed."""
