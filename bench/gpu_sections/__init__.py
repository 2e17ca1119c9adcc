"""Sections of the GPU benchmark, `python -m bench.gpu`: modules with `measure(context)`, each run in its own process.

A section yields `Measurement`s one by one, so that what was measured is kept when a later one fails. To add one: a
module here, and its line in `SECTIONS`, in the order in which they run.
"""

SECTIONS: dict[str, str] = {  # name → module
    "limits": "bench.gpu_sections.limits",
    "matmul": "bench.gpu_sections.matmul",
    "attention": "bench.gpu_sections.attention",
    "engine": "bench.gpu_sections.engine",
    "peer": "bench.gpu_sections.peer",
}
