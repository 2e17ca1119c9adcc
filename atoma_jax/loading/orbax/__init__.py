"""Folders that `atoma-jax convert` writes: the manifest, and weights that are restored as they lie."""
