"""Build hook of Hatchling: `pip install .` compiles the kernel where there is a compiler, and continues without it.

OUTSTATION_KERNEL_MACHINE names the machine of the wheel (x86_64, aarch64, armv7l), whose kernel then must be built, or
"none". Without it the wheel is for this machine, or for all machines if it has no compiler.
"""

from __future__ import annotations

import os
import platform
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Of the kernel's needs: glibc 2.17 is the oldest for which there are tags.
PLATFORM = "manylinux_2_17_{machine}"


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hook that adds the compiled kernel to a wheel, or to the source tree if the installation is editable."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernel = runpy.run_path(str(Path(self.root) / "scripts" / "packaging" / "kernel.py"))
        wanted = os.environ.get("OUTSTATION_KERNEL_MACHINE", "")
        if wanted == "none":
            return
        machine, library = wanted or platform.machine(), kernel["LIBRARY"]
        if version != "editable":
            # The source tree may be read-only.
            self._folder = tempfile.TemporaryDirectory(prefix="outstation-build-")
            library = Path(self._folder.name) / "kernel.so"
        try:
            compiler = kernel["find_clang" if wanted else "find_compiler"](machine)
            kernel["compile_kernel"](library, machine, compiler)
        except (kernel["CompilerError"], OSError) as error:
            if wanted:
                raise
            self.app.display_warning(f"without the compiled kernel, everything goes by NumPy: {error}")
            return
        if version == "editable":
            return
        build_data["force_include"][str(library)] = "outstation/ml/kernel/kernel.so"
        tag = PLATFORM.format(machine=machine) if wanted else f"linux_{machine}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()
