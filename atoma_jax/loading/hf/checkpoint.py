"""Opens a folder in HF layout: config.json, generation_config.json and safetensors.

Owns which quantization methods are implemented. Files are read by `safetensors.py`; how a format's parts become one
weight is the business of the other `hf_*` modules. Opening reads of the tensors only shapes and the order of groups of
act-order checkpoints. Nothing here imports JAX or runs code that comes with a model.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeAlias

from atoma_jax.errors import UnsupportedModelError, WeightFileError
from atoma_jax.loading.hf.bitnet import BitNet
from atoma_jax.loading.hf.compressed import CompressedTensors
from atoma_jax.loading.hf.fp8 import FP8
from atoma_jax.loading.hf.gptq import AWQ, GPTQ
from atoma_jax.loading.hf.safetensors import RawTensor, open_weights
from atoma_jax.loading.hf.tensors import ActivationScheme, DenseTensor, Module, QuantizedTensor, Scheme
from atoma_jax.loading.json_file import Json, Section, read_json

HFTensor: TypeAlias = DenseTensor | QuantizedTensor

SCHEMES: Mapping[str, Callable[[Section], Scheme]] = MappingProxyType(
    {
        "awq": AWQ.of,
        "gptq": GPTQ.of,
        "compressed-tensors": CompressedTensors.of,
        "fp8": FP8.of,
        "bitnet": BitNet.of,
    }
)


class HFCheckpoint:
    """A `Checkpoint` in HF layout, checked as a whole before it is handed out.

    Attributes:
        path: the folder.
        config: config.json.
        generation_config: generation_config.json, empty where there is none.
        activation_scheme: how the inputs of quantized layers are quantized; None for not at all.
        tensors: by name, a quantized weight as `X.weight` whatever its parts are called.
    """

    def __init__(
        self,
        path: Path,
        config: Json,
        generation_config: Json,
        activation_scheme: ActivationScheme,
        tensors: dict[str, HFTensor],
    ):
        """Use `open`."""
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self.activation_scheme: ActivationScheme = activation_scheme
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | PathLike[str]) -> "HFCheckpoint":
        """Opens a folder.

        Raises:
            ModelNotFoundError: config.json or weights are missing, or a shard is.
            WeightFileError: a file is damaged, truncated, or contradicts itself or others.
            UnsupportedModelError: a quantization method, one of its features or a tensor's type is not implemented, or
                the model needs code of its own.
        """
        folder = Path(path)
        config = read_json(folder / "config.json")
        root = Section(f"{folder / 'config.json'}: config", config)
        if not _names_only_its_own(root):
            root.refuse("auto_map", "code that comes with a model is never run, and trust_remote_code cannot help")
        scheme = _scheme(root)
        generation = folder / "generation_config.json"
        generation_config = read_json(generation) if generation.exists() else {}
        tensors = _assemble(open_weights(folder), scheme)
        return cls(folder, config, generation_config, None if scheme is None else scheme.activation_scheme, tensors)

    def close(self) -> None:
        """Forgets all tensors. The files stay mapped until the last tensor is gone."""
        self.tensors = {}

    def __enter__(self) -> "HFCheckpoint":
        """The checkpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def _names_only_its_own(config: Section) -> bool:
    """Whether auto_map names nothing but the model's architecture, which then is implemented here or refused by name.

    Checkpoints of architectures that were new once, such as Phi-3, still carry the code of that time. It is not run.
    """
    named, architectures = config.values.get("auto_map"), config.values.get("architectures")
    if not isinstance(named, dict) or not isinstance(architectures, list):
        return False
    own = {f"{str(name).removesuffix('ForCausalLM')}{end}" for name in architectures for end in _ENDINGS}
    return all(isinstance(value, str) and value.rpartition(".")[2] in own for value in named.values())


_ENDINGS = ("ForCausalLM", "Model", "Config")


def _scheme(config: Section) -> Scheme | None:
    """How weights are quantized; None for a model of plain floats."""
    if config.values.get("quantization_config") is None:
        return None
    section = config.section("quantization_config")
    method = section.text("quant_method")
    if method not in SCHEMES:
        problem = f"is not implemented; those that are: {', '.join(SCHEMES)}, and models without quantization_config"
        raise UnsupportedModelError(section.field("quant_method"), method, problem)
    return SCHEMES[method](section)


def _assemble(raw: dict[str, RawTensor], scheme: Scheme | None) -> dict[str, HFTensor]:
    """Logical tensors: the quantized weights of all modules, and what is left as it is."""
    if scheme is None:
        return {name: DenseTensor(tensor) for name, tensor in raw.items()}
    modules: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in raw.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    tensors: dict[str, HFTensor] = {}
    for name, parts in modules.items():
        module = Module(name, parts)
        weight = scheme.assemble(module)
        if weight is not None:
            if weight.name in raw and "weight" in module:
                raise WeightFileError(weight.where, weight.name, "is stored twice, quantized and plain")
            tensors[weight.name] = weight
        tensors |= {tensor.name: DenseTensor(tensor) for tensor in module.parts.values()}
    return tensors
