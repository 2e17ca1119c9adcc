"""Program: a mixed step of attention on two devices, kv heads split over them, against the same on one device.

    python -m tests.pallas_kernels.sharded_attention

Run by test_paged_attention_pallas.py in a process with two CPU devices.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.kv_pages import KVPages
from tests.pallas_kernels.contexts import Heads
from tests.pallas_kernels.steps import mixed
from tests.pallas_kernels.test_paged_attention_pallas import program


def main() -> None:
    heads = Heads(4, 2, 64, 32)
    step = mixed(heads, "int8")
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = PartitionSpec(None, "tensor"), PartitionSpec()
    pages = KVPages(*[PartitionSpec(None, None, "tensor")] * 4)
    sharded = jax.jit(
        jax.shard_map(
            program(Heads(2, 1, 64, 32), None, True),
            mesh=mesh,
            in_specs=(split, split, split, pages, *[everywhere] * 6),
            out_specs=(split, pages),
            check_vma=False,  # Pallas calls do not say over which axes their results vary
        )
    )
    both, one = step.run(sharded, step.contexts.pages()), step.run(program(heads, None, True), step.contexts.pages())
    assert len(both[1].k.sharding.device_set) == 2
    # Not bit-equal: XLA:CPU compiles another shape to other sums.
    np.testing.assert_allclose(both[0], one[0], rtol=2e-6, atol=2e-6)
    for left, right in zip(jax.tree.leaves(both[1]), jax.tree.leaves(one[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    print("2 devices, equal")


if __name__ == "__main__":
    main()
