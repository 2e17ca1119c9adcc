"""The reader of collectives: every form in which XLA writes who takes part, what is sent, and how often."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from bench.collectives import Collective, Piece, collectives, differences, listed
from sharding.mesh import parse_mesh

MESH = parse_mesh("fsdp=2,tensor=4")


def read(*lines: str) -> list[Collective]:
    """Of a program that holds these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return collectives(f"HloModule step\n\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n", MESH)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
        ("[2,4]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("fsdp",)),
        ("{{0,1,2,3,4,5,6,7}}", ("fsdp", "tensor")),
        ("{}", ("fsdp", "tensor")),
        ("mesh['data'=1,'fsdp'=2,'tensor'=4,'expert'=1] {'fsdp'}", ("fsdp",)),
    ],
)
def test_axes_are_found_from_every_form_of_groups(groups: str, axes: tuple[str, ...]) -> None:
    (found,) = read(f"%a = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert found.axes == axes
    assert found.devices == {"tensor": 4, "fsdp": 2}[axes[0]] * (4 if len(axes) == 2 else 1)


def test_groups_along_no_axes_are_an_error() -> None:
    with pytest.raises(ValueError, match="along no axes of fsdp=2,tensor=4"):
        read("%a = f32[8]{0} all-reduce(%p), replica_groups={{0,5},{1,4},{2,7},{3,6}}, to_apply=%add")


TENSOR = "replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "pieces", "sent", "waits"),
    [
        (f"%a = f32[8,16]{{1,0}} all-reduce(%p), {TENSOR}, to_apply=%add", ["f32[8,16]"], 2 * 512 * 3 // 4, True),
        (f"%g = bf16[8,16]{{1,0}} all-gather(%p), {TENSOR}, dimensions={{0}}", ["bf16[8,16]"], 256 * 3 // 4, True),
        (f"%s = f32[2,16]{{1,0}} reduce-scatter(%p), {TENSOR}, to_apply=%add", ["f32[2,16]"], 128 * 3, True),
        (
            f"%t = (f32[2,16]{{1,0}}, f32[2,16]{{1,0}}, f32[2,16]{{1,0}}, /*index=3*/f32[2,16]{{1,0}}) "
            f"all-to-all(%p, %q, %r, %s), {TENSOR}",
            ["f32[8,16]"],
            512 * 3 // 4,
            True,
        ),
        (
            f"ROOT %g.1 = ((s8[2,16]{{1,0}}, u16[2]{{0}}), (s8[8,16]{{1,0:T(8)}}, u16[8]{{0}})) "
            f'all-gather-start(%p, %q), {TENSOR}, backend_config={{"collective_backend_config":{{"is_sync":false}}}}',
            ["s8[8,16]", "u16[8]"],
            (128 + 16) * 3 // 4,
            False,
        ),
        (
            f"%r = ((f32[8,16]{{1,0}}), f32[2,16]{{1,0}}) reduce-scatter-start(%p), {TENSOR}, "
            'backend_config={"collective_backend_config":{"is_sync":true}}',
            ["f32[2,16]"],
            128 * 3,
            True,
        ),
        (
            "%c = s32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            ["s32[4]"],
            16,
            True,
        ),
    ],
)
def test_what_is_sent(line: str, pieces: list[str], sent: int, waits: bool) -> None:
    (found,) = read(line)
    assert [str(piece) for piece in found.pieces] == pieces
    assert (found.step_bytes, found.axes, not found.asynchronous) == (sent, ("tensor",), waits)


def test_sizes_of_types() -> None:
    assert [Piece(dtype, (8,)).nbytes for dtype in ("pred", "s4", "f8e4m3fn", "bf16", "u64")] == [8, 4, 8, 16, 64]


def test_a_loop_and_a_condition_of_a_real_program() -> None:
    """Five turns, three of an inner loop in each; branches and loops of unknown length are not for certain."""
    mesh = parse_mesh("fsdp=2,tensor=2")

    def step(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return jnp.sin(lax.psum(x, "tensor")), None

            x, _ = lax.scan(inner, x, length=3)
            return x + lax.all_gather(x, "fsdp").sum(0), None

        x, _ = lax.scan(layer, x, length=5)
        x = lax.while_loop(lambda x: x[0, 0] > 0.0, lambda x: lax.pmean(x, ("fsdp", "tensor")) - 1.0, x)
        return lax.cond(x[0, 1] > 1.0, lambda x: lax.psum(x, "fsdp"), lambda x: x, x)

    devices = mesh.build(jax.devices())
    cut = PartitionSpec("fsdp", "tensor")
    program = jax.jit(jax.shard_map(step, mesh=devices, in_specs=cut, out_specs=cut, check_vma=False))
    hlo = program.lower(jax.ShapeDtypeStruct((4, 6), jnp.float32)).compile().as_text() or ""
    assert listed(collectives(hlo, mesh)) == [
        "all-gather over fsdp: f32[2,2,3], 5 times, 120 bytes",
        "all-reduce over fsdp+tensor: f32[2,3], once where asked for, 36 bytes",
        "all-reduce over fsdp: f32[2,3], once where asked for, 24 bytes",
        "all-reduce over tensor: f32[2,3], 15 times, 360 bytes",
    ]


def test_what_is_more_and_what_is_less_than_the_list_is_told() -> None:
    assert differences(["a", "b"], ["b", "c"]) == [
        "exchanges what is not listed: a",
        "does not exchange what is listed: c",
    ]
