"""Model files: bounded parsers that import no JAX, names of weights, and the way from a file to sharded arrays."""
