"""A folder with weights in the engine's own layout: `model.json`, an Orbax checkpoint, and what its tokenizer was read
from. Opened from `model.json` alone; weights are restored straight onto devices, as they lie there.

Owns the folder's layout and what must agree before anything is read. What writes it is `engine/convert.py`.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax

from atoma_jax.config import ModelConfig
from atoma_jax.errors import ConfigError, WeightFileError
from atoma_jax.loading.generation_defaults import GenerationDefaults, read_generation_defaults, read_gguf_defaults
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.metadata import Metadata
from atoma_jax.loading.json_file import Section, read_json
from atoma_jax.loading.orbax.manifest import Manifest, StackForms, StoredForm, read_manifest
from atoma_jax.loading.orbax.weights import ShardingOf, Weight, checksums, restore
from atoma_jax.loading.weight_forms import DenseForm, Form, QuantizedForm
from atoma_jax.model_spec import ModelSpec
from atoma_jax.models.params import ParamSpec
from atoma_jax.ops import Backend
from atoma_jax.quant.qtensor import LayerVariants, QTensor

WEIGHTS = "weights"  # the Orbax checkpoint
GGUF_METADATA = "metadata.gguf"  # a GGUF file's own keys, and the tensors that are no weights


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as it lies in the folder, for plans of memory."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int


@dataclass(frozen=True)
class OrbaxModel:
    """A folder whose `model.json` is within its limits, and whose files are there in full length."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "OrbaxModel":
        """Reads no weights.

        Raises:
            ModelNotFoundError: there is no `model.json`.
            WeightFileError: it is damaged, or a file of the weights is missing, short, or not named in it.
            UnsupportedModelError: it holds a model that is not implemented.
        """
        model = cls(folder, read_manifest(folder))
        model._check_files()
        return model

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.manifest.spec

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """What the model's makers recommend. Errors as of the readers."""
        if self.metadata is not None:
            return read_gguf_defaults(self.metadata)
        path = self.path / "generation_config.json"
        if not path.exists():
            return GenerationDefaults()
        return read_generation_defaults(Section(f"{path}: generation_config", read_json(path)))

    @cached_property
    def metadata(self) -> Metadata | None:
        """Keys of the GGUF file that was converted, its tokenizer's among them; None where it came from a folder.

        Raises:
            WeightFileError: the file with them is damaged.
            ModelNotFoundError: it is missing.
        """
        if self.manifest.source_kind != "gguf":
            return None
        with GGUFFile.open(self.path / GGUF_METADATA) as file:
            return file.metadata

    @cached_property
    def tensors(self) -> dict[str, StoredWeight]:
        """The weights by path: what a plan counts."""
        return {path: _stored(path, form) for path, form in self.manifest.forms.items()}

    def backend(self, config: ModelConfig, preferred: Backend) -> Backend:
        """Where and how the stored weights can run.

        Args:
            config: what the user asked for.
            preferred: what `config` comes to on this platform.

        Raises:
            ConfigError: the weights were written for other settings, or for a platform that reads another layout.
        """
        stored = self.manifest
        if config.quantization is not None:
            self._refuse(
                "quantization", config.quantization, f"is done when a model is converted, from {stored.source}"
            )
        every = [one for form in stored.forms.values() for one in _stacks(form)]
        in_tiles = any(isinstance(form, QuantizedForm) and form.layout == "tiles" for form in every)
        readable = preferred.kernels == "native" or not in_tiles
        free = config.weight_layout == "auto" and config.kernels == "auto" and config.cpu_precision == "default"
        any_layout = preferred.platform == "cpu" and free and readable  # XLA reads the two others
        if preferred.weight_layout != stored.layout and not any_layout:
            problem = f"is what is wanted here, and the weights were written in layout {stored.layout}"
            self._refuse("weight_layout", preferred.weight_layout, problem)
        kernels = "xla" if preferred.kernels == "native" and stored.layout != "tiles" else preferred.kernels
        backend = replace(preferred, weight_layout=stored.layout, kernels=kernels)
        narrow = {str(form.dtype) for form in every if isinstance(form, DenseForm)} - {"float32"}
        if backend.platform == "cpu":
            if narrow and kernels != "native":  # XLA would widen them in every step
                problem = "is what XLA wants on a CPU, and dense weights were stored narrower"
                if stored.layout == "tiles":  # by a CPU with native kernels, which keep what a file has
                    self._refuse("weight_layout", preferred.weight_layout, problem)
                self._refuse("dtype", preferred.operands, problem)
        elif narrow and preferred.operands not in narrow:
            if config.dtype != "auto":
                self._refuse("dtype", config.dtype, f"is asked for, and dense weights were stored as {min(narrow)}")
            backend = replace(backend, operands=stored.operands)
        context = config.max_model_len or self.spec.context_length
        if stored.rope_tokens not in (None, context):
            problem = f"must be {stored.rope_tokens}, the context that the rotary frequencies were chosen for"
            raise ConfigError("max_model_len", context, f"{problem}; or convert {stored.source} again")
        return backend

    def abstract(self, wanted: Mapping[str, ParamSpec]) -> dict[str, jax.ShapeDtypeStruct | QTensor | LayerVariants]:
        """What `load` will return, with `ShapeDtypeStruct`s for arrays.

        Raises:
            WeightFileError: the folder does not hold the weights that a model of this shape has.
        """
        forms = self.manifest.forms
        differ = sorted(set(forms) ^ set(wanted))
        if differ:
            problem = f"must be the weights of a {self.spec.family} model with the features that `spec` names"
            raise WeightFileError(f"{self.path / 'model.json'}: forms", differ[0], problem)
        for path, want in wanted.items():
            self._check_form(path, forms[path], want)
        return {path: form.abstract() for path, form in forms.items()}

    def load(
        self, *, threads: int, on_bytes: Callable[[int], None], sharding_of: ShardingOf | None = None
    ) -> dict[str, Weight]:
        """The weights on their devices, nothing repacked. No weight is handed out before all checksums were compared.

        Args:
            threads: that check files at once, and as many that read them.
            on_bytes: called with the bytes of arrays as they arrive.
            sharding_of: where each array goes: its weight's path, and which of a `QTensor`'s arrays it is; None for
                the first device of this process.

        Raises:
            WeightFileError: a file or an array is not what was written.
        """
        if sharding_of is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            sharding_of = lambda path, child: here  # noqa: E731, ARG005
        planned = {path: form.abstract() for path, form in self.manifest.forms.items()}
        with ThreadPoolExecutor(threads) as pool:
            sums = checksums(self.path / WEIGHTS, list(self.manifest.files), pool)
            try:
                weights = restore(self.path / WEIGHTS, planned, sharding_of, threads=threads, on_bytes=on_bytes)
            except WeightFileError:
                self._check_sums(sums)  # a damaged file is why, as a rule
                raise
            self._check_sums(sums)
        return weights

    def _check_sums(self, sums: Mapping[str, Future[int]]) -> None:
        for name, value in sums.items():
            if value.result() != self.manifest.files[name].crc32:
                problem = "has another checksum than when it was written: damaged; copy it anew or convert again"
                raise WeightFileError(f"{self.path / WEIGHTS / name}: CRC-32", value.result(), problem)

    def _check_files(self) -> None:
        """The files are those that were written, as far as names and lengths tell."""
        folder, files = self.path / WEIGHTS, self.manifest.files
        found = {
            str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
        }
        for name in files.keys() | found.keys():
            field = f"{folder / name}"
            if name not in files:
                raise WeightFileError(field, name, "is not named in model.json; remove it or convert the model again")
            if name not in found:
                raise WeightFileError(field, None, "is missing: the folder is incomplete; copy or convert it again")
            if found[name].is_symlink() or not found[name].is_file():
                raise WeightFileError(field, name, "must be a regular file")
            nbytes = found[name].stat().st_size
            if nbytes != files[name].nbytes:
                raise WeightFileError(field, nbytes, f"must have {files[name].nbytes} bytes; copy or convert it again")
        there, needed = sum(file.nbytes for file in files.values()), sum(w.nbytes for w in self.tensors.values())
        if there < needed:  # they are not compressed
            raise WeightFileError(f"{folder}: size", there, f"must be at least the {needed} bytes of all weights")

    def _check_form(self, path: str, form: StoredForm, want: ParamSpec) -> None:
        field, layers = f"{self.path / 'model.json'}: forms.{path}", self.spec.num_layers
        counts = [layers]
        if isinstance(form, StackForms):
            counts = [form.which.count(stack) for stack in range(len(form.stacks))]
            if not want.quantizable or not want.stacked or sum(counts) != layers or 0 in counts:
                raise WeightFileError(f"{field}.which", form.which, f"must share the {layers} layers out to all stacks")
        for count, stack in zip(counts, _stacks(form), strict=True):
            shape = ((count,) if want.stacked else ()) + want.shape
            found = _shape(stack)
            if found != shape:
                raise WeightFileError(f"{field}.shape", found, f"must be {shape}")
            if isinstance(stack, QuantizedForm) and stack.permuted and not want.stacked:
                raise WeightFileError(f"{field}.permuted", True, "must be false: rows of a vocabulary have one order")
            if not want.quantizable and (isinstance(stack, QuantizedForm) or stack.dtype != "float32"):
                raise WeightFileError(field, "narrower", "must be dense and float32")

    def _refuse(self, field: Literal["quantization", "weight_layout", "dtype"], value: str, problem: str) -> None:
        flag = f"--{field.replace('_', '-')} {value}"
        command = f"atoma-jax convert {self.manifest.source} OUT {flag}"
        raise ConfigError(field, value, f"{problem} ({self.path}); leave it out where you can, or run `{command}`")


def _stacks(form: StoredForm) -> tuple[Form, ...]:
    return form.stacks if isinstance(form, StackForms) else (form,)


def _shape(form: Form) -> tuple[int, ...]:
    return form.shape if isinstance(form, DenseForm) else (*form.lead, *form.shape)


def _stored(path: str, form: StoredForm) -> StoredWeight:
    stacks = _stacks(form)
    names = [
        str(one.dtype)
        if isinstance(one, DenseForm)
        else f"{one.layout}, {8 if one.layout == 'rows' else one.format.bits} bits"
        for one in stacks
    ]
    shape = _shape(stacks[0])
    if isinstance(form, StackForms):
        shape = (len(form.which), *shape[1:])
    nbytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(form.abstract()))
    return StoredWeight(path, shape, " and ".join(dict.fromkeys(names)), nbytes)
