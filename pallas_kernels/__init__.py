"""Kernels of the engine, each beside its plain `jax.numpy` twin. Imports JAX and nothing of the engine."""
