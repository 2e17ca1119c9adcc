"""The programs of a tiny model's engine on a mesh, compiled without its weights, and what they exchange.

`python -m tests.sharding.programs` writes the list that tests compare with, `collectives.json`. LLVM has no part in
what is exchanged: `XLA_FLAGS=--xla_backend_optimization_level=0` makes that quick.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

from atoma_jax.config import ModelConfig
from atoma_jax.engine.buckets import Buckets, Program
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.model_setup import set_up_model
from atoma_jax.engine.runner import Runner
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.step import StepSizes
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.ops.residual import CUT_TOKENS
from bench.collectives import collectives, listed
from sharding.mesh import parse_mesh
from tests.tiny_model import write_tiny_llama

LIST = Path(__file__).with_name("collectives.json")
# The mixed step has so many tokens that its residual stream is cut, too.
DECODE, MIXED, SCORE = Program("decode", 4, 4), Program("mixed", CUT_TOKENS, 4), Program("score", 16, 4)
# Scores exchange what decodes do, in other sizes: on the mesh that exchanges all of it they are held to the list, too.
PROGRAMS = {
    **dict.fromkeys(["data=2", "tensor=2", "tensor=4", "tensor=8", "fsdp=2", "fsdp=4", "fsdp=8"], (DECODE,)),
    "data=2,fsdp=2,tensor=2": (DECODE,),
    "fsdp=2,tensor=2": (DECODE, MIXED, SCORE),
}


def write_model(folder: Path) -> Path:
    """A vocabulary that nothing divides, fewer kv heads than devices."""
    return write_tiny_llama(folder / "m.gguf", embedding_scale=0.35, width=256, heads=(8, 2))


def exchanged(path: Path, mesh: str, programs: tuple[Program, ...]) -> dict[str, list[str]]:
    """What the devices of a mesh exchange, by program."""
    shape = parse_mesh(mesh)
    config = ModelConfig(model=str(path), dtype="float32", kernels="xla")
    with open_model(resolve(str(path), progress=False)) as files:
        setup = replace(set_up_model(config, files, mesh=shape), devices=shape.build(jax.devices()))
    assert setup.devices is not None
    runner = Runner(
        setup.graph(),
        setup.spec,
        SamplerShape(slots=4, vocab_size=setup.spec.vocab_size, max_model_len=96),
        setup.backend,
        Buckets(decode=programs, mixed=(), score=None),
        StepSizes(table_width=12, page_size=8, max_logprobs=20, fixed_parts=False),
        num_pages=16,
        kv_dtype="float32",
        split_prefill=False,
        mesh=MeshStep(setup.cutting, setup.devices),
    )
    with runner.compile(setup.abstract(), threads=1):
        compiled = {str(program): runner._programs[program].result() for program in programs}
    return {name: listed(collectives(program.as_text(), shape)) for name, program in compiled.items()}


def _write() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder))
        found = {mesh: exchanged(path, mesh, programs) for mesh, programs in PROGRAMS.items()}
    LIST.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
