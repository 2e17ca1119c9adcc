"""Compiles every GPU kernel in full, down to machine code, on a machine without a GPU; `python -m bench.compile_gate`.

Needs the extra `gate` (XLA's CUDA plugin, ptxas, nvdisasm) in an environment of its own.

- `aot.py`: a jitted function compiled for a GPU that is not there.
- `resources.py`: what its kernels take: registers, spills, shared memory, operations a weight.
- `cases.py`: what a kernel registers; `matmul.py`, `activations.py` and `attention.py` do, one list `CASES` each.
- `steps.py`: whole steps of a model, whose HLO must hold no copy of weights or cache.
- `meshes.py`: the same over four and eight GPUs, and what these exchange: `collectives.json`, committed.
- `table.py`: the committed table, and what counts as a regression.
"""
