"""Ops as Triton kernels for NVIDIA GPUs, a file or folder per op: `@triton.jit` functions and launchers, no autograd.

Nothing imports this folder until a backend named "triton" runs or is asked for by name, so that `import mtml_kernels`
does not import triton (`backends` announces them). Each op's file has its launchers, forward and backward; large
products of matrices are cuBLAS's, around the kernels. Nothing waits for the device unasked. Rules that hold for all:

- One launch policy, in one named function, with its reasons. Blocks depend on one head's (one task's) shape alone, and
  sums over blocks have a fixed order without float atomics: a head's bits do not depend on what stands beside it.
- Arithmetic is in float32 right after the load. `enable_fp_fusion` is off, so that every variant of a kernel rounds
  alike.
- Kernels also run on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): that is
  for tests, which use nothing the interpreter lacks (no libdevice functions, no scalar conditions in tensor masks).
"""
