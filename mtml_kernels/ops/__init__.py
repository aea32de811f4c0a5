"""The operators `torch.ops.mtml.*`, one file per op: schema, fake, autograd and the backends that compute them.

Importing a module of this package registers its ops; every op keeps its implementations in a `Registry` (see
`mtml_kernels.registry`), by which explicit argument > MTML_BACKEND > the automatic choice selects one.
"""
