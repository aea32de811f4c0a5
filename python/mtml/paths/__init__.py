"""From a call of an algorithm to what runs it: fused, in the Gram matrix, over a shared trunk, or general."""
