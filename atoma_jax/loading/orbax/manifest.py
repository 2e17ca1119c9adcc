"""`model.json` of a folder with weights in the engine's own layout: what the folder holds, and the checks of it.

Owns the file's format and the limits of every value; nothing of a weight is read or allocated for it. The weights
themselves are `checkpoint.py`'s.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.json_file import Json, Section, read_json
from atoma_jax.loading.orbax.manifest_values import choice, integers, known_keys, optional
from atoma_jax.loading.spec_json import read_spec
from atoma_jax.loading.spec_limits import MAX_LAYERS
from atoma_jax.loading.weight_forms import DenseForm, Form, QuantizedForm, Shape, VariantsForm
from atoma_jax.model_spec import ModelSpec
from atoma_jax.quant.groups import BF16, F16, F32, I8, WIDTHS, GroupFormat
from atoma_jax.quant.qtensor import PLANAR_WIDTHS, LayerVariants, Layout, tile_groups

FILE_NAME = "model.json"
FORMAT = "atoma-jax weights"
VERSION = 1  # raised when an older program would misread the folder

MAX_FILES = 1 << 14
MAX_TENSORS = 1 << 15
MAX_DIMENSION = 2**31 - 1
MAX_PLANE = 64
_FILE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,3}", re.ASCII)  # no part begins with a dot
_DTYPES = {str(dtype): dtype for dtype in (F32, BF16, F16, I8)}
_OPERANDS = ("float32", "bfloat16")
_DENSE = ("float32", "bfloat16", "float16")

SourceKind = Literal["gguf", "folder"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of the weights, as it was written."""

    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackForms:
    """A weight whose layers have several forms: a `VariantsForm` that has forgotten where it came from."""

    stacks: tuple[Form, ...]
    which: tuple[int, ...]  # stack of each layer

    def abstract(self) -> LayerVariants:
        """The weight without its values."""
        stacks: Any = tuple(form.abstract() for form in self.stacks)
        place = tuple(self.which[:layer].count(stack) for layer, stack in enumerate(self.which))
        return LayerVariants(stacks=stacks, which=self.which, place=place)


StoredForm: TypeAlias = Form | StackForms


def stored_form(form: Form | VariantsForm) -> StoredForm:
    """What the folder keeps of a form."""
    if not isinstance(form, VariantsForm):
        return form
    return StackForms(stacks=tuple(stack for stack, _ in form.stacks), which=form.which)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder says about itself.

    Attributes:
        engine: version that wrote it.
        source: what the user called the model that was converted.
        source_kind: its container; the folder keeps what its tokenizer was read from in the same form.
        source_bytes: of its tensors.
        quantization: of dense weights while they were read; as the setting of this name.
        spec: the model's shape.
        rope_tokens: the context that the rotary frequencies hold for; None where they hold for every one.
        layout: of quantized weights, but for those with float8 codes, which have one only.
        operands: of products, that dense weights were narrowed to where the platform gains from it.
        forms: of every weight, by path.
        tensors: shapes of the source's tensors by name, in their order; empty where they have no way back.
        files: of the weights, by path below their folder.
    """

    engine: str
    source: str
    source_kind: SourceKind
    source_bytes: int
    quantization: str | None
    spec: ModelSpec
    rope_tokens: int | None
    layout: Layout
    operands: Literal["float32", "bfloat16"]
    forms: Mapping[str, StoredForm]
    tensors: Mapping[str, Shape]
    files: Mapping[str, StoredFile]

    def encode(self) -> bytes:
        """The content of `model.json`."""
        values: Json = {"format": FORMAT, "format_version": VERSION}
        values |= {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["spec"] = asdict(self.spec)
        values["forms"] = {path: _encode_form(form) for path, form in self.forms.items()}
        values["files"] = {name: asdict(file) for name, file in self.files.items()}
        return json.dumps(values, indent=1, allow_nan=False).encode()


def read_manifest(folder: Path) -> Manifest:
    """The folder's `model.json`, every value within its limits.

    Raises:
        ModelNotFoundError: there is none, or it cannot be read.
        WeightFileError: it is damaged, too large or contradicts itself.
        UnsupportedModelError: another version wrote it, or it holds a model that is not implemented.
    """
    path = folder / FILE_NAME
    top = Section(str(path), read_json(path))
    if top.text("format") != FORMAT:
        raise WeightFileError(top.field("format"), top.values["format"], f"must be {FORMAT!r}")
    version = top.integer("format_version", minimum=1)
    if version != VERSION:
        problem = f"must be {VERSION}: this program reads no other; convert the model again"
        raise UnsupportedModelError(top.field("format_version"), version, problem)
    known_keys(top, ("format", "format_version", *(entry.name for entry in fields(Manifest))))
    forms = top.section("forms")
    return Manifest(
        engine=top.text("engine"),
        source=top.text("source"),
        source_kind=choice(top, "source_kind", get_args(SourceKind)),
        source_bytes=top.integer("source_bytes", maximum=2**63 - 1),
        quantization=optional(top, "quantization", top.text),
        spec=read_spec(top.section("spec")),
        rope_tokens=optional(top, "rope_tokens", lambda key: top.integer(key, minimum=1)),
        layout=choice(top, "layout", get_args(Layout)),
        operands=choice(top, "operands", _OPERANDS),
        forms={path: _read_form(_object(forms, path)) for path in forms.values},
        tensors=_read_tensors(top.section("tensors")),
        files=_read_files(top.section("files")),
    )


def _object(section: Section, key: str) -> Section:
    if not section.values[key]:
        raise WeightFileError(section.field(key), section.values[key], "must be an object that is not empty")
    return section.section(key)


def _read_tensors(section: Section) -> dict[str, Shape]:
    if len(section.values) > MAX_TENSORS:
        raise WeightFileError(section.where, len(section.values), f"must name at most {MAX_TENSORS} tensors")
    return {name: integers(section, name, longest=4, minimum=1, maximum=MAX_DIMENSION) for name in section.values}


def _read_files(section: Section) -> dict[str, StoredFile]:
    if not 1 <= len(section.values) <= MAX_FILES:
        raise WeightFileError(section.where, len(section.values), f"must name 1 to {MAX_FILES} files")
    files: dict[str, StoredFile] = {}
    for name in section.values:
        if not _FILE.fullmatch(name):
            raise WeightFileError(section.where, name, "must name files below the folder, without links or dots")
        entry = _object(section, name)
        known_keys(entry, ("nbytes", "crc32"))
        files[name] = StoredFile(
            nbytes=entry.integer("nbytes", maximum=2**63 - 1), crc32=entry.integer("crc32", maximum=2**32 - 1)
        )
    return files


# Forms of weights


def _encode_form(form: StoredForm) -> Json:
    if isinstance(form, StackForms):
        return {"kind": "stacks", "stacks": [_encode_form(stack) for stack in form.stacks], "which": form.which}
    if isinstance(form, DenseForm):
        return {"kind": "dense", "shape": form.shape, "dtype": str(form.dtype)}
    kind = form.format
    dtypes = {
        "scale_dtype": str(kind.scale_dtype),
        "min_dtype": None if kind.min_dtype is None else str(kind.min_dtype),
    }
    return {"kind": "quantized", **asdict(form), "format": asdict(kind) | dtypes}


def _read_form(section: Section) -> StoredForm:
    return _read_stacks(section) if section.text("kind") == "stacks" else _read_one_form(section)


def _read_stacks(section: Section) -> StackForms:
    """Checks of the layers that a model has are `checkpoint.py`'s."""
    known_keys(section, ("kind", *(entry.name for entry in fields(StackForms))))
    values = section.values.get("stacks")
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_LAYERS:
        raise WeightFileError(section.field("stacks"), values, f"must be a list of 1 to {MAX_LAYERS}")
    if not all(isinstance(value, dict) for value in values):
        raise WeightFileError(section.field("stacks"), values, "must be a list of objects")
    stacks = [Section(f"{section.field('stacks')}[{index}]", value) for index, value in enumerate(values)]
    return StackForms(
        stacks=tuple(_read_one_form(stack) for stack in stacks),
        which=integers(section, "which", longest=MAX_LAYERS, minimum=0, maximum=len(stacks) - 1),
    )


def _read_one_form(section: Section) -> Form:
    if choice(section, "kind", ("dense", "quantized")) == "dense":
        known_keys(section, ("kind", *(entry.name for entry in fields(DenseForm))))
        shape = integers(section, "shape", longest=5, minimum=1, maximum=MAX_DIMENSION)
        return DenseForm(shape=shape, dtype=_DTYPES[choice(section, "dtype", _DENSE)])
    known_keys(section, ("kind", *(entry.name for entry in fields(QuantizedForm))))
    layout: Layout = choice(section, "layout", get_args(Layout))
    shape = integers(section, "shape", longest=2, minimum=1, maximum=MAX_DIMENSION)
    if len(shape) != 2:
        raise WeightFileError(section.field("shape"), shape, "must have two dimensions")
    kind = _read_format(section.section("format"), K=shape[1])
    plane = section.integer("plane", maximum=MAX_PLANE)
    if layout == "rows":
        fits = plane == 0
    elif layout == "tiles":
        fits = plane == 0 and tile_groups(shape[1], kind.group) is not None
        if kind.table is not None and kind.bits not in (4, 8):
            raise WeightFileError(
                section.field("format.table"), kind.table, "goes with 4 or 8 bits in the tiles layout"
            )
    else:
        if kind.bits not in PLANAR_WIDTHS:
            raise WeightFileError(section.field("format.bits"), kind.bits, "must be 2, 4 or 8 in the planar layout")
        fits = plane >= 16 and kind.group % plane == 0 and shape[1] % (plane * 16 // kind.bits) == 0
    if not fits:
        problem = f"does not fit groups of {kind.group} and {kind.bits} bits in the {layout} layout"
        raise WeightFileError(section.field("plane"), plane, problem)
    if kind.float_codes and layout != "rows":
        raise WeightFileError(section.field("layout"), layout, "must be rows where codes are float8")
    return QuantizedForm(
        layout=layout,
        lead=integers(section, "lead", longest=2, minimum=1, maximum=MAX_DIMENSION),
        shape=(shape[0], shape[1]),
        format=kind,
        plane=plane,
        permuted=section.boolean("permuted"),
    )


def _read_format(section: Section, *, K: int) -> GroupFormat:
    """The format of a weight with K inputs, which its groups divide."""
    known_keys(section, tuple(entry.name for entry in fields(GroupFormat)))
    bits = section.integer("bits", minimum=2, maximum=8)
    group = _divisor(section, "group", K)
    table = optional(section, "table", lambda key: integers(section, key, longest=256, minimum=-128, maximum=127))
    scale_dtype = _DTYPES[choice(section, "scale_dtype", tuple(_DTYPES))]
    min_dtype = optional(section, "min_dtype", lambda key: _DTYPES[choice(section, key, tuple(_DTYPES))])
    supergroup = optional(section, "supergroup", lambda key: _divisor(section, key, K))
    zero, float_codes = section.integer("zero", maximum=255), section.boolean("float_codes")
    rules = {
        "bits": (bits in WIDTHS, "must be 2, 3, 4, 5, 6 or 8"),
        "zero": (zero == 0 or table is None, "must be 0 beside a table"),
        # Codes of four bits may be stored wider, where a row's inputs fill no whole words of four-bit codes.
        "table": (table is None or len(table) in (16, 2**bits), f"must have 16 or {2**bits} numbers"),
        "scale_dtype": (
            (scale_dtype == I8) == (supergroup is not None),
            "must be int8 just where there is a supergroup",
        ),
        "min_dtype": (min_dtype != I8 or scale_dtype == I8, "must not be int8 where scales are floats"),
        "supergroup": (supergroup is None or supergroup % group == 0, f"must be a multiple of the group, {group}"),
        "float_codes": (
            not float_codes or (bits == 8 and table is None and min_dtype is None and zero == 0),
            "goes with 8 bits and neither zero, table nor mins",
        ),
    }
    for key, (holds, problem) in rules.items():
        if not holds:
            raise WeightFileError(section.field(key), section.values[key], problem)
    return GroupFormat(
        bits=bits,
        group=group,
        zero=zero,
        table=table,
        scale_dtype=scale_dtype,
        min_dtype=min_dtype,
        supergroup=supergroup,
        float_codes=float_codes,
    )


def _divisor(section: Section, key: str, K: int) -> int:
    value: Any = section.integer(key, minimum=1, maximum=K)
    if K % value:
        raise WeightFileError(section.field(key), value, f"must divide the {K} inputs")
    return value
