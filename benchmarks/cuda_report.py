"""What ptxas makes of the CUDA kernels: registers, stack, spills and shared memory of each.

Compiles every kernel for the architectures given (sm_80 and sm_90 when none are), prints a table,
and fails where a kernel keeps anything in local memory: a spill, or an array that is not indexed
by constants. A kernel may be excused in EXCUSED, with its reason.

    python benchmarks/cuda_report.py [80 90 ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90")
INSTALLED = "/usr/local/cuda"  # where CUDA's installer goes
# Part of a kernel's demangled name, and why it may use local memory.
EXCUSED: dict[str, str] = {}
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelUse:
    """What one kernel needs on one architecture; bytes but for registers."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int  # stores and loads
    shared: int  # static

    @property
    def fault(self) -> str:
        """Why it fails; empty when it does not."""
        if self.stack == 0 and self.spills == 0:
            return ""
        if any(part in self.name for part in EXCUSED):
            return ""
        return (
            f"{self.name} for sm_{self.architecture}: {self.stack} bytes of stack and "
            f"{self.spills} of spills, but a tuned kernel may have none; index its arrays by "
            "constants, or give it more registers with __launch_bounds__"
        )


def find_nvcc() -> str | None:
    """The CUDA compiler: in the PATH, in CUDA_HOME or where CUDA's installer puts it."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), INSTALLED]
    path = os.pathsep.join(f"{folder}/bin" for folder in folders if folder)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def sources() -> list[Path]:
    """Every file with CUDA kernels."""
    return sorted((ROOT / "plugins").rglob("*.cu"))


def compile_verbosely(nvcc: str, source: Path, architectures: Sequence[str]) -> str:
    """What nvcc prints for one file; raises CalledProcessError where it does not compile."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-fatbin", "-o", f"{folder}/kernels.fatbin"]
        command = [nvcc, "-std=c++17", f"-I{ROOT}", *targets, "-Xptxas", "-v", *output]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def parse(report: str) -> list[KernelUse]:
    """The kernels of one report of ptxas."""
    found = []
    for match in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            KernelUse(
                name=match["name"],
                architecture=match["architecture"],
                registers=int(match["registers"]),
                stack=int(match["stack"]),
                spills=int(match["stores"]) + int(match["loads"]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return [_demangled(use) for use in found]


def _demangled(use: KernelUse) -> KernelUse:
    """Its name as in the source, without arguments, where there is a c++filt."""
    if shutil.which("c++filt") is None:
        return use
    text = subprocess.run(
        ["c++filt", "-p", use.name], capture_output=True, text=True, check=True
    ).stdout
    name = text.strip().replace("vssm::", "").replace("(anonymous namespace)::", "")
    return KernelUse(**{**use.__dict__, "name": name.removeprefix("void ")})


def table(uses: Iterable[KernelUse]) -> str:
    """One line a kernel and architecture."""
    lines = ["    sm  registers  stack  spills  shared  kernel"]
    lines += [
        f"{u.architecture:>6} {u.registers:>10} {u.stack:>6} {u.spills:>7} {u.shared:>7}  {u.name}"
        for u in sorted(uses, key=lambda u: (u.name, u.architecture))
    ]
    return "\n".join(lines)


def main(architectures: Sequence[str]) -> int:
    """Prints the table; 1 when a kernel is at fault, 2 without a compiler."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_report: no nvcc; put it in the PATH or set CUDA_HOME", file=sys.stderr)
        return 2
    uses = []
    for source in sources():
        uses += parse(compile_verbosely(nvcc, source, architectures))
    print(table(uses))
    faults = [use.fault for use in uses if use.fault]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ARCHITECTURES))
