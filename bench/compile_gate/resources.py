"""What compiled kernels take, from XLA's dump: registers and spills by ptxas, shared memory by the list of launches,
operations of the main loop by nvdisasm. Mosaic GPU assembles its kernels itself, for a newer version of PTX than ptxas
may know: it leaves the assembler's report and its passes, and of matrix operations the PTX is counted."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Machine operations of the integer and half-width pipes that unpacking a weight competes for, and the conversions and
# multiplications that scaling one takes. Operations of the uniform path and of addresses in memory are not among them.
_ARITHMETIC = frozenset(
    [
        *("LOP3", "SHF", "PRMT", "IADD3", "IADD", "IMAD", "VIADD", "VIADDMNMX", "LEA", "ISETP", "SEL", "MOV"),
        *("HADD2", "HFMA2", "HMUL2", "HSETP2", "I2F", "I2FP", "F2F", "F2FP"),
        *("FADD", "FMUL", "FFMA", "FSETP", "FSEL"),
    ]
)
_REPORTED = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg", re.DOTALL
)
_TENSOR_CORE = frozenset(["HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCIMMA"])


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResources:
    """What one kernel takes.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spill_bytes: stored to local memory because registers ran out.
        shared_memory: bytes of a block.
        threads: of a block.
        loop_operations: arithmetic operations of a thread in one turn of the longest loop.
        tensor_core: matrix operations in it.
    """

    kernel: str
    registers: int
    spill_bytes: int
    shared_memory: int
    threads: int
    loop_operations: int
    tensor_core: int


def kernel_resources(dump: Path, pattern: str) -> list[KernelResources]:
    """Of all kernels in XLA's dump whose names match.

    Raises:
        ValueError: none does, so the pattern or the dump is wrong.
    """
    launches = _launches(dump)
    found: list[KernelResources] = []
    for path in sorted(dump.glob("*.ptx")):
        ptx = path.read_text(encoding="utf-8")
        names = re.findall(r"\.entry (\w+)\(", ptx)
        if any(re.search(pattern, name) for name in names):
            report = path.with_suffix(".ptxas")
            kernels = [_by_mosaic(path, ptx, report)] if report.exists() else _assembled(path, ptx, launches)
            found += [one for one in kernels if re.search(pattern, one.kernel)]
    if not found:
        raise ValueError(f"no kernel matches {pattern!r}; there are {', '.join(launches)}")
    return found


def _assembled(path: Path, ptx: str, launches: dict[str, tuple[int, int]]) -> list[KernelResources]:
    match = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert match is not None, path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [_tool("ptxas"), "-v", f"-arch={match[1]}", str(path), "-o", str(cubin)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        listing = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True)
    found: list[KernelResources] = []
    for name, stores, loads, registers in _REPORTED.findall(report):
        loop = _longest_loop(_function(listing.stdout, name))
        threads, shared = launches.get(name, (0, 0))
        found.append(
            KernelResources(
                kernel=name,
                registers=int(registers),
                spill_bytes=int(stores) + int(loads),
                shared_memory=shared,
                threads=threads,
                loop_operations=sum(count for name, count in loop.items() if name in _ARITHMETIC),
                tensor_core=sum(count for name, count in loop.items() if name in _TENSOR_CORE),
            )
        )
    return found


def _by_mosaic(path: Path, ptx: str, report: Path) -> KernelResources:
    [(name, stores, loads, registers)] = _REPORTED.findall(report.read_text(encoding="utf-8"))
    launch = re.compile(r"gpu\.launch .* threads\(.*?\) in \(\S+ = %c(\d+),.*? dynamic_shared_memory_size %c(\d+)_")
    with path.with_suffix(".mlir-passes.log").open(encoding="utf-8", errors="replace") as passes:
        [threads, shared] = next(found.groups() for line in passes if (found := launch.search(line)))
    return KernelResources(
        kernel=name,
        registers=int(registers),
        spill_bytes=int(stores) + int(loads),
        shared_memory=int(shared),
        threads=int(threads),
        loop_operations=0,
        tensor_core=ptx.count("wgmma.mma_async"),
    )


def _launches(dump: Path) -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of a block, by kernel."""
    line = re.compile(r"(\w+) grid: \[.*?\] threads: \[(\d+), .*?shared_memory: (\d+) bytes")
    found: dict[str, tuple[int, int]] = {}
    for path in dump.glob("*.thunk_sequence.txt"):
        for name, threads, shared in line.findall(path.read_text(encoding="utf-8")):
            found[name] = (int(threads), int(shared))
    return found


def _function(listing: str, name: str) -> str:
    """One function of nvdisasm's listing."""
    start = listing.index(f".text.{name}:")
    end = listing.find("//--------------------- .text.", start)
    return listing[start:] if end < 0 else listing[start:end]


def _longest_loop(listing: str) -> Counter[str]:
    """Operations between a label and the branch back to it, of the pair that holds the most."""
    places: dict[str, int] = {}
    operations: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x?\w+):", line):
            places[label[1]] = len(operations)
        if operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9_.]+)(.*)", line):
            operations.append(operation[1].split(".")[0])
            back = re.search(r"`\((\.L_x?\w+)\)", operation[2])
            if operations[-1] == "BRA" and back and back[1] in places:
                loops.append((places[back[1]], len(operations)))
    if not loops:
        return Counter()
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return Counter(operations[start:end])


def _tool(name: str) -> str:
    """A program of the CUDA tool chain: out of this environment's wheels, else from the path."""
    found = sorted(Path(sys.prefix).glob(f"lib/python3*/site-packages/nvidia/**/bin/{name}"))
    path = str(found[0]) if found else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not here: install the extra `gate`")
    return path
