"""Decoders in Flax NNX. Layers read no files, no environment and no mesh; weights come from `atoma_jax/loading`."""
