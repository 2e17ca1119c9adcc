"""Meshes and the rules that lay arrays out over them. Imports JAX and nothing of the engine."""
