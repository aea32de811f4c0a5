"""The inner loop as a flat list of kernel calls over planes of memory, for any device, and what runs it."""
