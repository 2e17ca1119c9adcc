"""Largest dimensions that a model file may ask for: far above any model, and small enough to multiply."""

MAX_LAYERS = 1024
MAX_DIM = 1 << 20  # hidden, feed-forward, or all heads together
MAX_HEAD_DIM = 1024
MAX_EXPERTS = 4096
MAX_POSITIONS = 1 << 30  # contexts and windows: twice as many fit into an int32
