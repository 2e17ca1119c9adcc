"""What XLA is told as it compiles a step."""

import jax

from atoma_jax.ops import Platform


def compile_options(platform: Platform) -> dict[str, str | bool]:
    """Options of this XLA, for `jax.stages.Lowered.compile`.

    On CPUs, JAX 0.10 brings two ways to make code of a fusion. The newer one, its default, takes half as long again to
    compile a step, which then runs up to a seventh slower. From JAX 0.11 on there is nothing to choose.
    """
    if platform == "cpu" and jax.__version_info__ < (0, 11):
        return {"xla_cpu_use_fusion_emitters": False}
    return {}
