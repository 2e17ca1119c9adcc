"""`model.json`: what is written is read again, and nothing else passes."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.loading.orbax.manifest import Manifest, StackForms, StoredFile, StoredForm, read_manifest
from atoma_jax.loading.weight_forms import DenseForm, QuantizedForm
from atoma_jax.model_spec import ExpertSpec, ModelSpec, RopeSpec
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import specs_of
from atoma_jax.ops import Backend
from atoma_jax.quant.ggml import GROUP_FORMATS
from atoma_jax.quant.groups import GroupFormat
from atoma_jax.quant.merging import widened
from atoma_jax.quant.qtensor import planar_plane, planar_width

L, D, V, F = 2, 512, 40, 1024
MUTATIONS = 4000


def spec(**changes: Any) -> ModelSpec:
    """A spec whose every field differs from its default."""
    values: dict[str, Any] = {
        "architecture": "made-up",
        "family": "gemma",
        "vocab_size": V,
        "dim": D,
        "num_layers": L,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "ffn_dim": F,
        "context_length": 4096,
        "norm_eps": 1e-6,
        "rope": RopeSpec(frequencies=(1.0, 0.1), local_frequencies=(1.0, 0.01), magnitude=1.25),
        "windows": (512, None),
        "attention_scale": 0.125,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "embedding_scale": 22.5,
        "activation": "gelu_tanh",
        "tied_embeddings": True,
        "qkv_bias": True,
        "qk_norm": True,
        "sub_norms": True,
        "int8_activations": True,
        "experts": None,
    }
    return ModelSpec(**{**values, **changes})


EXPERTS = ExpertSpec(count=8, used=2, ffn_dim=F, normalized=True, shared_ffn_dim=256)


def manifest_of(model: ModelSpec, kind: GroupFormat, layout: Any = "planar") -> Manifest:
    """Every weight that may be quantized is, in one format."""
    forms: dict[str, StoredForm] = {}
    for path, want in specs_of(
        Decoder(model, Backend(platform="cpu", operands="float32", weight_layout=layout))
    ).items():
        lead = (L,) if want.stacked else ()
        if path == "layers.down" and layout == "planar":  # a layer in each of two formats
            one = DenseForm(shape=(1, *want.shape), dtype=np.dtype(ml_dtypes.bfloat16))
            two = DenseForm(shape=(1, *want.shape), dtype=np.dtype(np.float32))
            forms[path] = StackForms(stacks=(one, two), which=(1, 0))
            continue
        if not want.quantizable:
            forms[path] = DenseForm(shape=(*lead, *want.shape), dtype=np.dtype(np.float32))
            continue
        N, K = want.shape[-2:]
        plane: int | None = 0
        if layout == "planar":
            kind = widened(kind, planar_width(kind.bits))
            plane = planar_plane(K, kind.group, kind.bits)
        assert plane is not None
        forms[path] = QuantizedForm(
            layout=layout, lead=(*lead, *want.shape[:-2]), shape=(N, K), format=kind, plane=plane, permuted=want.stacked
        )
    return Manifest(
        engine="1.2.3",
        source="some/model",
        source_kind="gguf",
        source_bytes=10**12,
        quantization=None,
        spec=model,
        rope_tokens=4096,
        layout=layout,
        operands="float32",
        forms=forms,
        tensors={"token_embd.weight": (V, D), "output_norm.weight": (D,)},
        files={"manifest.ocdbt": StoredFile(nbytes=1 << 40, crc32=0xFFFFFFFF), "d/0a1b": StoredFile(nbytes=0, crc32=0)},
    )


FORMATS = {kind.name: form for kind, form in GROUP_FORMATS.items()}
MODELS = {
    "gemma": spec(),
    "llama": spec(
        family="llama", tied_embeddings=False, windows=(), attention_softcap=None, rope=RopeSpec(frequencies=(1.0,))
    ),
    "mixture": spec(family="mixture", experts=EXPERTS, sub_norms=False),
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Manifest]:
    """What the reader makes of a file's content."""

    def read(content: Any) -> Manifest:
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "model.json").write_bytes(encoded)
        return read_manifest(tmp_path)

    return read


@pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_quantized_type_is_read_as_it_was_written(read: Any, kind: str, layout: str) -> None:
    written = manifest_of(MODELS["llama"], FORMATS[kind], layout)
    assert read(written.encode()) == written


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_read_as_it_was_written(read: Any, tmp_path: Path, model: str) -> None:
    written = manifest_of(MODELS[model], FORMATS["Q4_K"])
    found = read(written.encode())
    assert found == written
    wanted = specs_of(Decoder(found.spec, Backend(platform="cpu", operands="float32", weight_layout="planar")))
    assert set(OrbaxModel(tmp_path, found).abstract(wanted)) == set(wanted)


def test_float8_codes_are_read_as_they_were_written(read: Any) -> None:
    kind = GroupFormat(bits=8, group=32, scale_dtype=np.dtype(np.float32), float_codes=True)
    written = manifest_of(MODELS["llama"], kind, "rows")
    assert read(written.encode()) == written
    form = read(written.encode()).forms["layers.qkv"]
    assert isinstance(form, QuantizedForm)
    assert form.codes.dtype == np.uint8


def test_the_spec_above_changes_every_field() -> None:
    """So that a field which the reader forgets cannot pass."""
    plain = {entry.name: entry.default for entry in fields(ModelSpec)}
    assert [name for name, value in asdict(MODELS["gemma"]).items() if value == plain[name]] == ["experts"]
    assert MODELS["mixture"].experts is not None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


EDGES = (
    *(
        None,
        True,
        False,
        "",
        "x",
        "rows",
        "planar",
        "int8",
        "bfloat16",
        [],
        {},
        [0],
        [None],
        {"a": 1},
        "../x",
        "/etc/x",
    ),
    *(-1, 0, 1, 2, 3, 4, 8, 16, 32, 255, 256, 1025, 2**20, 2**31 - 1, 2**31, 2**63, 10**30),
    *(0.0, -0.0, 0.5, -1.0, 1e308, float("inf"), float("nan")),
)


def mutated(written: bytes, rng: random.Random) -> bytes:
    """The file with one to three changes of its values, or of its bytes."""
    values = json.loads(written)
    for _ in range(rng.randint(1, 3)):
        *above, key = rng.choice(list(places(values)))
        holder = values
        for step in above:
            holder = holder[step]
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("more", "codes", "", "embed2"))] = holder[key]
            case 1 | 2 if isinstance(holder[key], int | float):
                holder[key] = holder[key] * rng.choice((-1, 0, 2, 3)) + rng.choice((-1, 0, 1))
            case _:
                holder[key] = copy.deepcopy(rng.choice(EDGES))
    content = bytearray(json.dumps(values).encode())
    if rng.random() < 0.2:
        at = rng.randrange(len(content))
        match rng.randrange(3):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:]
            case _:
                content[at:at] = content[at : at + 20]
    return bytes(content)


@pytest.mark.parametrize("model", MODELS)
def test_a_hostile_file_is_an_error_that_names_it_or_a_model(read: Any, tmp_path: Path, model: str) -> None:
    written = manifest_of(MODELS[model], FORMATS["Q4_K"]).encode()
    refused = 0
    for seed in range(MUTATIONS // len(MODELS)):
        try:
            found = read(mutated(written, random.Random(seed)))
            backend = Backend(platform="cpu", operands="float32", weight_layout=found.layout)
            OrbaxModel(tmp_path, found).abstract(specs_of(Decoder(found.spec, backend)))
        except (WeightFileError, UnsupportedModelError) as error:
            if str(tmp_path) not in error.field:
                raise AssertionError(f"seed {seed} does not name the file") from error
            refused += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    assert refused > MUTATIONS // len(MODELS) // 2


REFUSED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "format": (("format",), "someone else's"),
    "format_version": (("format_version",), 2),
    "a key that means something to others": (("spec", "clip"), 1.0),
    "rope.frequencies": (("spec", "rope", "frequencies"), [1.0] * 33),
    "rope": (("spec", "rope", "frequencies"), [float("nan")]),
    "num_layers": (("spec", "num_layers"), 1025),
    "num_kv_heads": (("spec", "num_kv_heads"), 3),
    "num_heads": (("spec", "num_heads"), 2**20),
    "windows": (("spec", "windows"), [1]),
    "family": (("spec", "family"), "mamba"),
    "experts": (("spec", "experts"), asdict(EXPERTS)),
    "norm_eps": (("spec", "norm_eps"), -1),
    "forms.embed": (("forms", "embed"), []),
    "bits": (("forms", "embed", "format", "bits"), 7),
    "bits that the layout has no room for": (("forms", "embed", "format", "bits"), 5),
    "group": (("forms", "embed", "format", "group"), 33),
    "supergroup": (("forms", "embed", "format", "supergroup"), 16),
    "table": (("forms", "embed", "format", "table"), [1, 2]),
    "min_dtype": (("forms", "embed", "format", "min_dtype"), "float64"),
    "plane": (("forms", "embed", "plane"), 64),
    "layout": (("layout",), "columns"),
    "which": (("forms", "layers.down", "which"), [0, 2]),
    "stacks": (("forms", "layers.down", "stacks"), [1, 2]),
    "files": (("files",), {}),
    "files above the folder": (("files", "../x"), {"nbytes": 1, "crc32": 1}),
    "hidden files": (("files", ".x"), {"nbytes": 1, "crc32": 1}),
    "crc32": (("files", "d/0a1b", "crc32"), 2**32),
    "tensors": (("tensors", "token_embd.weight"), [1] * 5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_outside_its_limits_is_named(read: Any, name: str) -> None:
    values = json.loads(manifest_of(MODELS["gemma"], FORMATS["Q4_K"]).encode())
    (*above, key), value = REFUSED[name]
    holder = values
    for step in above:
        holder = holder[step]
    holder[key] = value
    with pytest.raises((WeightFileError, UnsupportedModelError)) as caught:
        read(values)
    assert "model.json" in caught.value.field
    assert ".".join(str(step) for step in above) in caught.value.field


def test_a_table_of_codes_that_no_kernel_looks_up_is_named(read: Any) -> None:
    values = json.loads(manifest_of(MODELS["gemma"], FORMATS["IQ4_NL"], "tiles").encode())
    values["forms"]["embed"]["format"]["bits"] = 5
    with pytest.raises(WeightFileError, match="4 or 8 bits") as caught:
        read(values)
    assert caught.value.field.endswith("forms.embed.format.table")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"{}" + b" " * (1 << 20), b"\xff"])
def test_what_is_no_small_json_object(read: Any, content: bytes) -> None:
    with pytest.raises(WeightFileError, match=r"model\.json"):
        read(content)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda forms: forms.pop("embed"), "embed"),
        (lambda forms: forms.update(head=forms["embed"]), "head"),
        (lambda forms: forms["layers.qkv"].update(lead=[3]), "layers.qkv.shape"),
        (lambda forms: forms["layers.qkv"].update(lead=[]), "layers.qkv.shape"),
        (lambda forms: forms["embed"].update(permuted=True), "embed.permuted"),
        (lambda forms: forms.update({"layers.attn_norm": forms["layers.qkv"]}), "layers.attn_norm"),
        (lambda forms: forms["layers.attn_norm"].update(dtype="bfloat16"), "layers.attn_norm"),
        (lambda forms: forms["final_norm"].update(shape=[D + 1]), "final_norm.shape"),
        (lambda forms: forms["layers.down"].update(which=[0, 0]), "layers.down.which"),
        (lambda forms: forms["layers.down"].update(which=[0]), "layers.down.which"),
        (lambda forms: forms["layers.down"]["stacks"][0].update(shape=[2, D, F]), "layers.down.shape"),
        (lambda forms: forms.update(embed=forms["layers.down"]), "embed.which"),
    ],
)
def test_weights_that_the_model_does_not_have(read: Any, tmp_path: Path, change: Any, field: str) -> None:
    values = json.loads(manifest_of(MODELS["gemma"], FORMATS["Q4_K"]).encode())
    change(values["forms"])
    found = read(values)
    wanted = specs_of(Decoder(found.spec, Backend(platform="cpu", operands="float32", weight_layout="planar")))
    with pytest.raises(WeightFileError) as caught:
        OrbaxModel(tmp_path, found).abstract(wanted)
    assert f"{caught.value.field} {caught.value.value}".find(field) >= 0
