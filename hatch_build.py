"""Build the C++ kernels while the package is installed. Without a compiler the package works, but slower."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CORES = Path(__file__).parent / "cyborg_torchrl" / "cores" / "kernels"
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
FLAGS = ["-O3", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]


class NativeBuildHook(BuildHookInterface):
    """A library of kernels for each instruction set; torch reports at run time which one the processor has."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the libraries, and add those that were compiled to the wheel."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        sources = sorted((CORES / "csrc").glob("*.cpp"))
        targets = X86 if is_x86 else {"default": []}
        built = [self._compile(CORES / f"_native_{name}.so", flags, sources) for name, flags in targets.items()]
        if any(built):
            build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built if path]
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _compile(self, target: Path, flags: list[str], sources: list[Path]) -> Path | None:
        # A library of an earlier build stays if this one fails: other programs may use it (an editable installation).
        temporary = target.with_suffix(".tmp")
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        command = [*compiler, *FLAGS, *flags, "-o", str(temporary), *map(str, sources)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.app.display_info(f"{target.stem} was not built: {error}")
            return None
        if done.returncode:
            self.app.display_info(f"{target.stem} was not built: {done.stderr.strip()[-500:]}")
            return None
        temporary.replace(target)
        return target
