"""Command `scripts/interop [NAME …]`: run the trials called NAME, or all; exit code 1 if one fails."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

from outstation.workbench.testing.process import MissingProgram
from scripts import interops
from scripts.kit.usage import answer_help


def main(names: list[str]) -> int:
    known = [module.name for module in pkgutil.iter_modules(interops.__path__) if module.name != "__main__"]
    if unknown := set(names) - set(known):
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or known:
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"interop-{name}-") as folder:
            try:
                importlib.import_module(f"scripts.interops.{name}").run(Path(folder))
            except (AssertionError, MissingProgram) as problem:
                print(f"  FAILED: {problem}", flush=True)
                failed += 1
            else:
                print("  passed", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    answer_help(__doc__)
    sys.exit(main(sys.argv[1:]))
