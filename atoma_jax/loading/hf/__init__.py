"""Folders in Hugging Face layout: config.json, safetensors, schemes of quantized checkpoints, names of tensors."""
