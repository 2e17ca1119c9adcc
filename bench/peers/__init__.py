"""Engines that `bench/compare.py` runs side by side, one module each. A module imports its engine when it is imported."""
