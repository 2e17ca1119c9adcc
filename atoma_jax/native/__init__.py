"""C++ kernels for the CPU behind `jax.ffi`: their sources, how they are built and found, and typed calls.

Whoever computes with them comes through `atoma_jax/ops`, which chooses.
"""
