"""Chooses the tiles of kernels offline, `python -m bench.tune`: what is tuned (`subjects.py`), how the best are looked
for (`search.py`), and the processes that do it (`worker.py`).
"""
