"""A small BitNet b1.58 model, trained from nothing: its arithmetic, its text, and the files it is written to."""
