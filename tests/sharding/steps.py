"""What a model on a mesh says of a text: the distributions that one scoring step gives, as the engine runs it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atoma_jax.config import ModelConfig
from atoma_jax.engine.buckets import Buckets, Program
from atoma_jax.engine.mesh_config import resolved_mesh
from atoma_jax.engine.mesh_step import MeshStep
from atoma_jax.engine.model_setup import ModelSetup, set_up_model
from atoma_jax.engine.plan import SlicedPlan, StepPlan, Work
from atoma_jax.engine.runner import Runner
from atoma_jax.engine.sampler_state import SamplerShape
from atoma_jax.engine.sampling_rows import encode_score
from atoma_jax.engine.sequence import Sequence
from atoma_jax.engine.step import StepSizes
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.sampling_params import SamplingParams

PAGE = 8


def set_up(path: Path, mesh: str | None, **options: Any) -> tuple[ModelSetup, Any]:
    """A model on its mesh, and its weights."""
    shape = resolved_mesh(mesh, len(jax.devices()))
    config = ModelConfig(model=str(path), **{"dtype": "float32", "kernels": "xla", **options})
    with open_model(resolve(str(path), progress=False)) as files:
        setup = set_up_model(config, files, mesh=shape)
        if shape is not None:
            setup = replace(setup, devices=shape.build(jax.devices()))
        return setup, setup.load(threads=2)


def log_probabilities(
    path: Path, mesh: str | None, texts: list[list[int]], *, most: int | None = None, **options: Any
) -> list[np.ndarray]:
    """[T, V] of each text behind each of its tokens but the last. As many texts as the mesh has slices run at once.

    `most`: as many of the likeliest tokens alone; NaN stands for the others.
    """
    setup, weights = set_up(path, mesh, **options)
    shape, count = setup.backend.mesh, max(map(len, texts)) - 1
    pages = -(-count // PAGE)
    runner = Runner(
        setup.graph(),
        setup.spec,
        SamplerShape(slots=1, vocab_size=setup.spec.vocab_size, max_model_len=count + 1),
        setup.backend,
        Buckets(decode=(), mixed=(), score=Program("score", count, 1)),
        StepSizes(table_width=pages, page_size=PAGE, max_logprobs=most or setup.vocab_size, fixed_parts=False),
        num_pages=pages + 1,
        kv_dtype="float32",
        split_prefill=False,
        mesh=None if shape is None or setup.devices is None else MeshStep(setup.cutting, setup.devices),
    )
    with runner.compile(setup.abstract(), threads=1):
        runner.start(weights)
    slices = 1 if shape is None else shape.num_slices
    found: list[np.ndarray] = []
    for start in range(0, len(texts), slices):
        together = texts[start : start + slices]
        plans = [_scoring(text, pages) for text in together]
        for home in range(len(together)):
            runner.take_slot(0, encode_score(1), None, [], [], home)
        idle = [StepPlan((), ())] * (slices - len(together))
        output = runner.launch(SlicedPlan((*plans, *idle)) if slices > 1 else plans[0]).read()
        assert output.top_ids is not None
        assert output.top_logprobs is not None
        whole = np.full((len(output.top_ids), setup.vocab_size), np.nan, np.float32)
        np.put_along_axis(whole, output.top_ids, output.top_logprobs, axis=1)
        assert output.ok.all()
        assert most or not np.isnan(whole).any(), "every token of the vocabulary is there, and none of what fills it up"
        found += np.split(whole, np.cumsum([len(text) - 1 for text in together])[:-1])
    return found


def _scoring(text: list[int], pages: int) -> StepPlan:
    params = SamplingParams(temperature=0, prompt_logprobs=1)
    seq = Sequence(request_id="text", index=0, tokens=list(text), params=params)
    seq.slot, seq.pages = 0, list(range(1, pages + 1))
    return StepPlan((), (Work(seq, 0, len(text) - 1, False, True, False, True, 0),))
