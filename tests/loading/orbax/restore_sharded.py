"""Program: restores a folder of `atoma-jax convert` onto four devices, out-features split; prints where shards lie.

    python -m tests.loading.orbax.restore_sharded FOLDER

Checks that the shards together are what one device gets. Run by test_convert.py in a process with four CPU devices.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.quant.qtensor import QTensor


def main(folder: Path) -> None:
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    model = OrbaxModel.open(folder)
    asked: set[tuple[str, str | None]] = set()

    def sharding_of(path: str, child: str | None) -> Sharding:
        asked.add((path, child))
        is_split = path.startswith("layers.") and child in ("codes", "scales")
        return NamedSharding(mesh, PartitionSpec(None, "tensor") if is_split else PartitionSpec())

    sharded = model.load(threads=1, on_bytes=lambda _: None, sharding_of=sharding_of)
    whole = model.load(threads=1, on_bytes=lambda _: None)
    for left, right in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    weight = sharded["layers.gate_up"]
    assert isinstance(weight, QTensor)
    assert ("embed", "codes") in asked
    assert ("layers.attn_norm", None) in asked
    shards = weight.codes.addressable_shards
    assert len({shard.device for shard in shards}) == 4
    print(f"layers.gate_up.codes: {len(shards)} shards of {shards[0].data.shape}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
