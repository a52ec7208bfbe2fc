"""Name and version of the installed TFLite runtime, found without loading it: only model processes load a runtime."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from outstation.foundation.errors import OutstationError

# In order of preference; `runtime` imports the same one.
PACKAGES = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}


@functools.cache
def runtime_name() -> str:
    """Return the name and version, such as "ai-edge-litert 2.0.2". Raises OutstationError if there is none."""
    for module, name in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        metadata = list(Path(spec.origin).parents[1].glob(f"{module}-*.dist-info"))
        if len(metadata) == 1:
            return f"{name} {metadata[0].name.removesuffix('.dist-info').partition('-')[2]}"
        # A package of the distribution, whose metadata lies elsewhere.
        from importlib.metadata import version

        return f"{name} {version(name)}"
    raise OutstationError(
        "this machine has no TFLite runtime: install ai-edge-litert (64-bit), or tflite-runtime with Python 3.11"
    )
