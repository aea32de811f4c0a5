"""`inner_loop` as one launch of a CUDA kernel: a schedule as the program of a thread block, a block a task."""
