"""Kernels in C, for CPUs; compiled where the server first starts.

They decode, and of reading and learning do what lies between the products.

A step of a few rows takes the time to read the weights. Checkpoints that come from a quantised file
(GGUF) hold few different values per group of 32 weights, so they can be read as codes of 4 or 8
bits and be decoded to the same float32 weights in registers, with float32 arithmetic throughout.
A checkpoint whose weights don't come from codes has its products from the float32 weights.
Where there is no gcc, or the machine has no AVX-512, everything runs as without this package.
"""
