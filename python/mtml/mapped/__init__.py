"""From a function of one task to a batch: fused where it is a known inner loop, vmapped or in a loop where not."""
