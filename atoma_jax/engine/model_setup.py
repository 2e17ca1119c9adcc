"""A model that is about to be loaded: its shape, its weights without their values, and how they get them.

From headers alone. What a start, a plan of memory and an evaluation have in common.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx

from atoma_jax.config import CacheConfig, ModelConfig
from atoma_jax.engine.cutting import Cutting, device_spec, heads_divide, served_spec
from atoma_jax.engine.host import cpu_multiplies_bfloat16
from atoma_jax.engine.progress import loading_bar
from atoma_jax.engine.step import Weights
from atoma_jax.errors import ConfigError
from atoma_jax.loading.checkpoint import Checkpoint
from atoma_jax.loading.cut_order import in_parts
from atoma_jax.loading.model_files import ModelFiles
from atoma_jax.loading.online import quantized_on_load
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.loading.orbax.weights import Weight
from atoma_jax.loading.weight_sources import WeightSource
from atoma_jax.loading.weights import abstract_weights, load_weights
from atoma_jax.model_spec import KVDtype, ModelSpec
from atoma_jax.models.decoder import Decoder
from atoma_jax.models.params import ParamSpec, fill, specs_of
from atoma_jax.ops import Backend, Kernels, Platform, has_native_kernels
from atoma_jax.quant.qtensor import LayerVariants, QTensor
from sharding.apply import shardings, with_shardings
from sharding.mesh import MeshShape
from sharding.plan import bytes_per_device

Check = Callable[[], None]
_log = logging.getLogger(__name__)


def unchecked() -> None:
    """A check that finds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """A model on its way to a device.

    Attributes:
        spec: its shape.
        backend: where and in which arithmetic it runs.
        checkpoint: where its weights come from, as they will be read.
        wanted: every weight, by path.
        sources: where each is in the checkpoint; of weights in the engine's own layout there are none.
        planned: what `load` puts on the device, without values.
        vocab_size: tokens of the vocabulary, without what fills it up on a mesh.
        cuts: where each is cut over `backend.mesh`; None without a mesh.
        devices: of the mesh, in their places; None without a mesh, and where a model is only planned.
    """

    spec: ModelSpec
    backend: Backend
    checkpoint: Checkpoint | OrbaxModel
    wanted: Mapping[str, ParamSpec]
    sources: Mapping[str, WeightSource]
    planned: Mapping[str, jax.ShapeDtypeStruct | QTensor | LayerVariants]
    vocab_size: int
    cuts: Mapping[str, Any] | None = None
    devices: jax.sharding.Mesh | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device, or on each of a mesh."""
        return sum(self.bytes_of(path) for path in self.planned)

    def bytes_of(self, path: str) -> int:
        """Bytes of one weight on the device, or on each of a mesh."""
        mesh, value = self.backend.mesh, self.planned[path]
        if mesh is None or self.cuts is None:
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        return bytes_per_device(value, self.cuts[path], mesh)

    def graph(self) -> Any:
        """The model's `nnx.GraphDef`, which merges with `abstract` or with what `load` returns."""
        if self.backend.mesh is not None:
            return nnx.graphdef(Decoder(self.device_spec, self.backend))
        return nnx.graphdef(self._decoder(self.planned))

    @property
    def device_spec(self) -> ModelSpec:
        """The model's shape as one device computes it."""
        mesh = self.backend.mesh
        return self.spec if mesh is None else device_spec(self.spec, mesh, self.vocab_size)

    def kv_dtype(self, config: CacheConfig) -> KVDtype:
        """The type of the KV cache, decided where the configuration leaves it open."""
        return self.backend.kv_dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype

    @property
    def cutting(self) -> Cutting:
        """Where arrays are cut over `backend.mesh`, which is one."""
        assert self.backend.mesh is not None
        return Cutting(self.backend.mesh, whole_heads=self.backend.whole_heads)

    def abstract(self) -> Weights:
        """The model's state with `ShapeDtypeStruct`s as leaves, which say where they lie on a mesh."""
        planned = self.planned
        if self.devices is not None:
            planned = {path: with_shardings(planned[path], cut, self.devices) for path, cut in self._cuts.items()}
        return nnx.state(self._decoder(planned))

    def load(self, *, threads: int, progress: bool = False, check: Check = unchecked) -> Weights:
        """The model's state on the device. Arguments and errors as in `load_values`."""
        return nnx.state(self._decoder(self.load_values(threads=threads, progress=progress, check=check)))

    def load_values(self, *, threads: int, progress: bool = False, check: Check = unchecked) -> dict[str, Weight]:
        """The weights on the device by path. Errors as in `load_weights`.

        Args:
            threads: that decode or read at once.
            progress: show a bar on standard error, where that is a terminal.
            check: called now and then, from any thread; what it raises ends the loading.
        """
        total = sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())
        with loading_bar(total, "loading", shown=progress) as show:

            def on_bytes(count: int) -> None:
                check()
                show(count)

            places = None
            if self.devices is not None:
                places = {path: shardings(cut, self.devices) for path, cut in self._cuts.items()}
            if isinstance(self.checkpoint, OrbaxModel):
                where = None if places is None else partial(_array_place, places)
                return self.checkpoint.load(threads=threads, on_bytes=on_bytes, sharding_of=where)
            return load_weights(
                self.checkpoint,
                self.sources,
                self.wanted,
                self.backend,
                threads=threads,
                on_bytes=on_bytes,
                places=places,
            )

    @property
    def _cuts(self) -> Mapping[str, Any]:
        assert self.cuts is not None, "a mesh has cuts"
        return self.cuts

    def _decoder(self, values: Mapping[str, Any]) -> Decoder:
        model = Decoder(self.spec, self.backend)
        fill(model, values)
        return model


def set_up_model(
    config: ModelConfig,
    files: ModelFiles | OrbaxModel,
    platform: Platform | None = None,
    mesh: MeshShape | None = None,
) -> ModelSetup:
    """What `config` makes of an open model.

    Args:
        config: checked settings.
        files: the model.
        platform: to plan for; None: of this process's devices.
        mesh: to cut it over, more than one device; None: one device.

    Raises:
        ConfigError: the platform has no kernels, or the weights cannot be quantized as asked.
        WeightFileError: a tensor is missing or misshapen.
        UnsupportedModelError: a tensor has no place in the model, or cannot be laid out.
    """
    backend, spec = _backend(config, platform or _own_platform(), mesh), files.spec
    if isinstance(files, OrbaxModel):
        backend = files.backend(config, backend)
        wanted = specs_of(Decoder(spec, backend))
        setup = ModelSetup(
            spec=spec,
            backend=backend,
            checkpoint=files,
            wanted=wanted,
            sources={},
            planned=files.abstract(wanted),
            vocab_size=spec.vocab_size,
        )
        if mesh is None:
            return setup
        if mesh.tensor > 1:
            problem = "must be 1: a converted folder has its rows in the order of one device; serve what it was made of"
            raise ConfigError("mesh.tensor", mesh.tensor, problem)
        return replace(setup, spec=served_spec(spec, mesh), cuts=Cutting.of(spec, mesh).weights(setup.planned, wanted))
    if config.quantization == "w8a8":
        if config.weight_layout == "planar":
            problem = "contradicts --quantization w8a8, whose integer products read rows; leave one of them out"
            raise ConfigError("weight_layout", config.weight_layout, problem)
        spec = replace(spec, int8_activations=True)
        if backend.weight_layout == "planar":
            backend = replace(backend, weight_layout="rows")
    wanted = specs_of(Decoder(spec, backend))
    sources = files.sources(wanted)
    checkpoint: Checkpoint = files.checkpoint
    if config.quantization is not None:
        checkpoint = quantized_on_load(checkpoint, sources, wanted, config.quantization)
    if mesh is not None:
        served = served_spec(spec, mesh)
        if not heads_divide(spec, mesh):
            backend = replace(backend, whole_heads=True)
            _log.warning(
                "%d heads, %d of keys and values, do not divide over tensor=%d: each of its devices has all of them",
                *(spec.num_heads, spec.num_kv_heads, mesh.tensor),
            )
        sources = in_parts(sources, wanted, spec, served, mesh.tensor)
        spec, wanted = served, specs_of(Decoder(served, backend))
    planned = abstract_weights(checkpoint, sources, wanted, backend)
    return ModelSetup(
        spec=spec,
        backend=backend,
        checkpoint=checkpoint,
        wanted=wanted,
        sources=sources,
        planned=planned,
        vocab_size=files.spec.vocab_size,
        cuts=None if mesh is None else Cutting.of(spec, mesh).weights(planned, wanted),
    )


def _array_place(places: Mapping[str, Any], path: str, child: str | None) -> jax.sharding.Sharding:
    """Where one array of a weight goes. All stacks of a weight are cut alike."""
    place = places[path]
    first: Any = place.stacks[0] if isinstance(place, LayerVariants) else place
    return first if child is None else getattr(first, child)


def served_length(config: ModelConfig, setup: ModelSetup) -> int:
    """Tokens of prompt and output together that a model is served with.

    Raises:
        ConfigError: they are more than it was trained for.
    """
    trained = setup.spec.context_length
    length = config.max_model_len or trained
    if length > trained:
        problem = f"must be at most {trained}, what {setup.checkpoint.path.name} was trained for"
        raise ConfigError("max_model_len", length, problem)
    return length


def _own_platform() -> Platform:
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        raise ConfigError("JAX_PLATFORMS", platform, "must be cpu or cuda: the engine has no kernels for others")
    return "cpu" if platform == "cpu" else "cuda"


def _backend(config: ModelConfig, platform: Platform, mesh: MeshShape | None) -> Backend:
    is_cpu, kernels = platform == "cpu", _kernels(config, platform, mesh)
    operands, layout = config.dtype, config.weight_layout
    if operands == "auto":
        operands = "float32" if is_cpu and kernels != "interpret" and not cpu_multiplies_bfloat16() else "bfloat16"
    if layout == "auto":
        layout = "tiles" if kernels == "native" else "rows" if is_cpu and kernels == "xla" else "planar"
    if (layout == "tiles") != (kernels == "native"):
        if config.kernels == "auto" and layout != "tiles":
            kernels = "xla"  # what reads the layout that is asked for
        else:
            problem = f"does not go with the kernels {kernels}: tiles are what native kernels read, and all they read"
            raise ConfigError("weight_layout", layout, problem)
    if kernels != "native" and config.cpu_precision != "default":
        problem = f"is a setting of the native kernels, and these are {kernels}; leave --cpu-precision out"
        raise ConfigError("cpu_precision", config.cpu_precision, problem)
    return Backend(
        platform=platform,
        operands=operands,
        weight_layout=layout,
        kernels=kernels,
        precision=config.cpu_precision,
        device=jax.devices()[0].device_kind if platform == _own_platform() else "",
        mesh=mesh,
    )


def _kernels(config: ModelConfig, platform: Platform, mesh: MeshShape | None) -> Kernels:
    """The kernels asked for, where they run. Who asks for float32 does not get less."""
    if mesh is not None and config.kernels == "native":
        problem = f"run on one device, and the mesh is {mesh.text}: use --kernels xla, or leave one of the two out"
        raise ConfigError("kernels", "native", problem)
    if mesh is not None and mesh.expert > 1 and (config.kernels in ("pallas", "interpret")):
        problem = f"must be xla where experts are spread over devices, as the mesh {mesh.text} does"
        raise ConfigError("kernels", config.kernels, problem)
    rounds = config.dtype == "float32" and config.cpu_precision == "default"
    if config.kernels == "native":
        if platform != "cpu":
            raise ConfigError("kernels", "native", "is for CPUs: leave --kernels out on a GPU")
        if not has_native_kernels():
            raise ConfigError("kernels", "native", "cannot run here, for the reason logged above; xla can")
        if rounds:
            problem = "contradicts --kernels native, which rounds activations: use --cpu-precision high or exact"
            raise ConfigError("dtype", config.dtype, problem)
        return "native"
    if config.kernels == "auto" and platform == "cpu":
        return "native" if mesh is None and not rounds and has_native_kernels() else "xla"
    if config.kernels == "xla":
        return "xla"
    if config.kernels == "auto":
        spread = mesh is not None and mesh.expert > 1
        return "pallas" if platform == "cuda" and config.dtype != "float32" and not spread else "xla"
    if config.kernels == "pallas" and platform == "cpu":
        raise ConfigError("kernels", "pallas", "needs an NVIDIA GPU: on a CPU use xla, or interpret for tests")
    if config.dtype == "float32":
        problem = (
            f"contradicts --kernels {config.kernels}, which multiplies in bfloat16: use bfloat16, or --kernels xla"
        )
        raise ConfigError("dtype", config.dtype, problem)
    return config.kernels
