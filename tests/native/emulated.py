"""Runs programs on a processor with AVX-512 that Bochs emulates, under a Linux kernel: slow, and for who has none.

What it takes, of Debian: bochs, bochs-term, bochsbios, vgabios, isolinux, syslinux-common, genisoimage, busybox-static,
cpio, and a kernel, such as that of linux-image-cloud-amd64, whose path `ATOMA_TEST_KERNEL` is. Debian 12's Bochs has
AVX-512 VNNI; one of version 3 has AVX-512 BF16, too.
"""

import gzip
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

KERNEL = "ATOMA_TEST_KERNEL"
# The first that Bochs knows, without what its kernel does not get past.
CPUS = {
    "sapphire_rapids": (
        'model=sapphire_rapids, exclude_features="la57,amx,amx_int8,amx_bf16,cet,pku,pks,uintr,xsaves,xsavec,smap,smep,'
        'fsgsbase,pcid,invpcid,rdpid,umip,sha,vaes_vpclmulqdq,vmx,waitpkg,avx512fp16"'
    ),
    "corei7_icelake_u": "model=corei7_icelake_u",
}
COMMANDS = {
    "bochs": "bochs",
    "script": "bsdutils",
    "genisoimage": "genisoimage",
    "busybox": "busybox-static",
    "cpio": "cpio",
}
LOADER = Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
# Features whose state Bochs lays out otherwise than Linux expects, or that its kernel does not get past.
LEFT_OUT = "pku,xsaves,xsavec,umip,fsrm,erms,smap,smep,fsgsbase,pcid,invpcid,rdpid,la57,sha_ni,vaes"
OPTIONS = f"console=ttyS0,115200 mitigations=off nopti acpi=off noapic lsm=yama panic=1 clearcpuid={LEFT_OUT}"
END = "that is all"
MACHINE = """
plugin_ctrl: unmapped=1, serial=1, biosdev=1
cpu: {cpu}, count=1, ips=100000000, ignore_bad_msrs=1
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={folder}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/serial
log: {folder}/log
panic: action=fatal
error: action=ignore
info: action=ignore
display_library: term
clock: sync=none
"""


def missing() -> str:
    """What this machine lacks; empty if it can emulate."""
    absent = [
        f"{command} (Debian's package {package})" for command, package in COMMANDS.items() if not shutil.which(command)
    ]
    absent += [str(path) for path in LOADER if not path.exists()]
    if not Path(os.environ.get(KERNEL, "")).is_file():
        absent.append(f"{KERNEL}, the path of a Linux kernel,")
    return f"{', '.join(absent)} is not there" if absent else ""


def said_by(programs: Sequence[Path], folder: Path, *, timeout: float) -> str:
    """What statically linked programs print, one after the other, and "ended with" their exit codes.

    Args:
        programs: to run.
        folder: empty, for what is made on the way.
        timeout: seconds for all of them.

    Raises:
        TimeoutError: they are not done; with what they have said.
    """
    _write_disc(programs, folder)
    (folder / "machine").write_text(MACHINE.format(folder=folder, cpu=CPUS[_model()]), encoding="utf-8")
    (folder / "begin").write_text("c\n", encoding="utf-8")
    begin = f"-rc {folder}/begin" if "-rc " in _help() else ""  # where Bochs has its debugger in it, as Debian's has
    # Its display wants a terminal.
    command = ["script", "-qfc", f"bochs -q -f {folder}/machine {begin}", "/dev/null"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    emulator = subprocess.Popen(command, env={**os.environ, "TERM": "xterm"}, start_new_session=True, **quiet)
    serial, end = folder / "serial", time.monotonic() + timeout
    try:
        while True:
            said = serial.read_text(encoding="utf-8", errors="replace") if serial.exists() else ""
            if END in said:
                return said
            if time.monotonic() > end or emulator.poll() is not None:
                raise TimeoutError(f"the programs did not end; the machine said: {said[-2000:]}")
            time.sleep(1)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", f"{folder}/machine"], check=False)
        emulator.wait()


def features() -> tuple[str, ...]:
    """Instructions of the emulated processor that variants of kernels are for, as Linux calls them."""
    return ("avx512_vnni", "avx512_bf16") if _model() == "sapphire_rapids" else ("avx512_vnni",)


def _model() -> str:
    known = _help("cpu").split()
    return next(model for model in CPUS if model in known)


def _help(*topic: str) -> str:
    done = subprocess.run(["bochs", "--help", *topic], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _write_disc(programs: Sequence[Path], folder: Path) -> None:
    root, disc = folder / "root", folder / "disc"
    for path in (root / "bin", root / "proc", root / "dev", disc / "isolinux"):
        path.mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    lines = ["#!/bin/busybox sh", "/bin/busybox mount -t proc proc /proc", "/bin/busybox grep -m1 flags /proc/cpuinfo"]
    for program in programs:
        shutil.copy(program, root / "bin" / program.name)
        lines.append(f"/bin/{program.name}; echo {program.name} ended with $?")
    (root / "init").write_text("\n".join([*lines, f"echo {END}", "/bin/busybox poweroff -f", ""]), encoding="utf-8")
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), capture_output=True, check=True
    )
    (disc / "programs.gz").write_bytes(gzip.compress(archive.stdout, 1))
    shutil.copy(os.environ[KERNEL], disc / "kernel")
    for path in LOADER:
        shutil.copy(path, disc / "isolinux")
    entry = f"DEFAULT l\nLABEL l\n KERNEL /kernel\n APPEND initrd=/programs.gz {OPTIONS}\n"
    (disc / "isolinux" / "isolinux.cfg").write_text(entry, encoding="utf-8")
    loader = (
        "-b",
        "isolinux/isolinux.bin",
        "-c",
        "isolinux/catalog",
        "-no-emul-boot",
        "-boot-load-size",
        "4",
        "-boot-info-table",
    )
    subprocess.run(["genisoimage", "-quiet", "-J", "-R", *loader, "-o", folder / "boot.iso", disc], check=True)
