"""What XLA is told as it compiles a step."""

import jax

from atoma_jax.ops import Platform


def compile_options(platform: Platform) -> dict[str, str | bool]:
    """Options of this XLA, for `jax.stages.Lowered.compile`.

    On CPUs, JAX 0.10 brings two ways to make code of a fusion. The newer one, its default, compiles longer, and
    steps run no faster for it: `atoma-jax bench startup` and `bench throughput`, with this emptied, show both. From
    JAX 0.11 on there is nothing to choose.

    On GPUs, JAX 0.11 copies a layer's norms out of their stacks on streams of their own, which the layer then waits
    for. That takes longer than the copies: without it, a step of one row of Llama-3.1-8B in Q4_K takes 4.04 ms on an
    H100 instead of 4.33 (docs/kernels.md).

    The loop over layers is one CUDA graph there, not one for each run of kernels in a layer: 3.46 ms instead of 3.66 on
    an H200. Its turns written out one after the other are none: 4.82 instead of 4.30, before other changes.
    """
    if platform == "cpu" and jax.__version_info__ < (0, 11):
        return {"xla_cpu_use_fusion_emitters": False}
    if platform == "cuda" and jax.__version_info__ >= (0, 11):
        return {
            "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
            "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
        }
    return {}
