"""GGUF: the bounded reader, what metadata says of a model, what its tensors are called, and the writer."""
