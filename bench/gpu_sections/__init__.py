"""Sections of the GPU benchmark, `python -m bench.gpu`: modules with `measure(context)`, each run in its own process.

A section yields `Measurement`s one by one, so that what was measured is kept when a later one fails or time runs out;
it yields those with a pass mark as early as it can. To add one: a module here, and its line in `SECTIONS`, in the order
in which they run.
"""

SECTIONS: dict[str, str] = {  # name → module
    "limits": "bench.gpu_sections.limits",
    "matmul": "bench.gpu_sections.matmul",
    "attention": "bench.gpu_sections.attention",
    "engine": "bench.gpu_sections.engine",
    "peer": "bench.gpu_sections.peer",
}
SHARES: dict[str, float] = {"limits": 15, "matmul": 50, "attention": 60, "engine": 150, "peer": 35}  # of the time
