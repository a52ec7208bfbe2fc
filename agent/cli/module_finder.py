"""Finder and loader of this package's modules, for a faster start than by Python's own.

Each module is where its name says, so no folder is listed and no other place tried. Three system calls read its
bytecode, which is checked as Python checks it (PEP 3147, PEP 552). All that is not plain is left to Python's own.
"""

from __future__ import annotations

import marshal
import os
import struct
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source, spec_from_file_location
from types import CodeType, ModuleType

_PACKAGE = __name__.partition(".")[0]
_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Magic number, flags, time and size of the source; flags are 0 if these two tell whether it is the same.
_HEADER = struct.Struct("<4sIII")
# A larger file is left to Python's loader.
_MAX_BYTES = 1 << 16


class ModuleFinder:
    """Member of `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != _PACKAGE:
            return None
        place = f"{_FOLDER}/{rest.replace('.', '/')}"
        for file, folders in ((f"{place}.py", None), (f"{place}/__init__.py", [place])):
            try:
                source = os.stat(file)
            except OSError:
                continue
            loader = ModuleLoader(name, file, source)
            spec = spec_from_file_location(name, file, loader=loader, submodule_search_locations=folders)
            if spec is not None:
                spec.cached = loader.cached
            return spec
        return None


class ModuleLoader(SourceFileLoader):
    """Loader of a module whose bytecode is in its usual place; without that, Python's own compiles it."""

    def __init__(self, name: str, path: str, source: os.stat_result) -> None:
        super().__init__(name, path)
        self._source, self.cached = source, cache_from_source(path)

    def get_code(self, fullname: str) -> CodeType | None:
        try:
            file = os.open(self.cached, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.read(file, _MAX_BYTES)
            finally:
                os.close(file)
        except OSError:
            return super().get_code(fullname)
        expected = MAGIC_NUMBER, 0, int(self._source.st_mtime) & 0xFFFFFFFF, self._source.st_size & 0xFFFFFFFF
        if len(data) in range(_HEADER.size, _MAX_BYTES) and _HEADER.unpack_from(data) == expected:
            code = marshal.loads(memoryview(data)[_HEADER.size :])
            if isinstance(code, CodeType) and code.co_filename == self.path:
                return code
        return super().get_code(fullname)
