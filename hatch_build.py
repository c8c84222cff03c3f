"""Builds what is in C++ while the package is installed, where there is a compiler. Without it only speed lacks."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "cyborg_torchrl"
CORES, POOL = PACKAGE / "cores", PACKAGE / "tensor_pool"
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
SHARED = ["-fPIC", "-shared", "-pthread"]
CORE_FLAGS = ["-O3", "-fno-math-errno", "-std=c++17", *SHARED, "-Wno-psabi"]
POOL_FLAGS = ["-O2", "-std=c++20", *SHARED]


class NativeBuildHook(BuildHookInterface):
    """The cores, a library for each instruction set (torch says at run time which one there is), and the pool."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles all, and adds what could be compiled to the wheel."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        sources = sorted((CORES / "csrc").glob("*.cpp"))
        targets = X86 if is_x86 else {"default": []}
        built = [
            self._compile(CORES / f"_native_{target}.so", [*CORE_FLAGS, *flags], sources)
            for target, flags in targets.items()
        ]
        built.append(self._pool())
        if any(built):
            build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built if path]
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _pool(self) -> Path | None:
        """The pool is one of torch's allocators: it needs torch's headers, and fits that version alone.

        A build that is isolated from what is installed cannot import torch, but its Python knows where that lies.
        """
        target, torch = POOL / "_tensor_pool.so", Path(sysconfig.get_path("platlib")) / "torch"
        about = torch / "version.py"
        found = re.search(r"^__version__ = '([\d.]+)", about.read_text(), re.MULTILINE) if about.is_file() else None
        if platform.system() != "Linux" or found is None:
            self.app.display_info("no pool for tensors: it is built where torch is installed already, on Linux")
            return None
        flags = [*POOL_FLAGS, f'-DBUILT_FOR="{found[1]}"', "-isystem", str(torch / "include")]
        return self._compile(target, flags, [POOL / "tensor_pool.cpp"], [f"-L{torch / 'lib'}", "-lc10"])

    def _compile(
        self, target: Path, flags: list[str], sources: list[Path], after: list[str] | None = None
    ) -> Path | None:
        target.unlink(missing_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        command = [*compiler, *flags, "-o", str(target), *map(str, sources), *(after or [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.app.display_info(f"{target.stem} was not built: {error}")
            return None
        if done.returncode:
            self.app.display_info(f"{target.stem} was not built: {done.stderr.strip()[-500:]}")
            return None
        return target
