"""Quantized weights: the block types of files, their exact decoding, and the packed form that kernels multiply."""
