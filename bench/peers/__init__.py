"""Engines that `bench/compare.py` runs side by side, one module each, which imports its engine at once."""
