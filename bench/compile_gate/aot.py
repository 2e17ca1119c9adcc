"""Compiles a function for an NVIDIA GPU that this machine does not have. Import it before anything that imports JAX:
XLA reads its flags once."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="compile-gate-"))
# No GPU, so that the plugin skips its driver check. Autotuning would run kernels. PTX is dumped for the assembler, and
# the list of launches for its shared memory.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_autotune_level=0",
        f"--xla_dump_to={DUMP}",
        "--xla_dump_emitter_re=ptx",
        "--xla_dump_hlo_as_text",
    ]
)
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)  # its kernels are compiled apart from XLA's
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # it tells three times that there is no driver

# Not at the top: JAX reads what was set above when it is imported.
import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import (  # noqa: E402
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from bench.compile_gate.cases import Target  # noqa: E402

NAMES: dict[Target, str] = {"h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB", "b200": "NVIDIA B200"}


def compiled(function: Any, arguments: tuple[Any, ...], target: Target, **jit: Any) -> jax.stages.Compiled:
    """`function` compiled for one GPU; what XLA dumped meanwhile is in `DUMP`.

    Args:
        function: to be jitted.
        arguments: trees of `jax.ShapeDtypeStruct`.
        target: which GPU.
        jit: further arguments of `jax.jit`.
    """
    mesh = Mesh(devices(target, 1), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    device = AbstractDevice(NAMES[target], 1, "cuda")
    abstract = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(abstract):  # from JAX 0.11 on, Pallas asks it for the GPU that it lowers for
        lowered = jax.jit(function, **jit).trace(*placed).lower()
    return compiled_lowered(lowered)


def compiled_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Likewise what was lowered for some `devices`."""
    for path in DUMP.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return lowered.compile()


def devices(target: Target, count: int) -> Any:
    """GPUs of one host, to compile for."""
    jax.devices()  # finds the plugin, which registers a client that can only compile
    config = Path(__file__).with_name("targets") / f"{target}.txtpb"
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=config.read_text(encoding="utf-8"), topology=f"1x1x{count}"
    )
    return topology.devices[:count]
