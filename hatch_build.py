"""Builds what is in C++ while the package is installed, where there is a compiler. Without it only speed lacks."""

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

CORES = Path(__file__).parent / "cyborg_torchrl" / "cores"
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
FLAGS = ["-O3", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]


class NativeBuildHook(BuildHookInterface):
    """One library for each instruction set; torch says at run time which one the processor has."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles all, and adds what could be compiled to the wheel."""
        built = [path for path in map(self._compile, self._targets()) if path]
        if built:
            build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built]
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _targets(self) -> dict[str, list[str]]:
        return X86 if platform.machine().lower() in ("x86_64", "amd64") else {"default": []}

    def _compile(self, target: str) -> Path | None:
        path = CORES / f"_native_{target}.so"
        path.unlink(missing_ok=True)
        sources = sorted(map(str, (CORES / "csrc").glob("*.cpp")))
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        command = [*compiler, *FLAGS, *self._targets()[target], "-o", str(path), *sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.app.display_info(f"no C++ recurrences for {target}: {error}")
            return None
        if done.returncode:
            self.app.display_info(f"no C++ recurrences for {target}: {done.stderr.strip()[-500:]}")
            return None
        return path
