"""Decoders: threads that are the first to decode a struct."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Four threads at once are the first to decode a struct that holds 29 others. Without the lock the first one ends the
# process (msgspec 0.22).
_RACE = """\
import sys, threading, types
import msgspec
from outstation.foundation import decoders

DECODE = {
    "from_json": lambda type_: decoders.from_json(DATA, type_),
    "from_msgpack": lambda type_: decoders.from_msgpack(msgspec.msgpack.encode(msgspec.json.decode(DATA)), type_),
    "convert": lambda type_: decoders.convert(msgspec.json.decode(DATA), type_),
    "json_decoder": lambda type_: decoders.json_decoder(list[type_]).decode(b"[%b]" % DATA)[0],
}[sys.argv[1]]
DATA = b'{"a":1,"c":{"a":2,"d":[{"a":1}]}}'
SOURCE = "from __future__ import annotations\\nimport msgspec\\nclass S0(msgspec.Struct):\\n a: int\\n"
for i in range(1, 30):
    SOURCE += f"class S{i}(msgspec.Struct):\\n a: int\\n c: S{i - 1} | None = None\\n d: list[S{i - 1}] = []\\n"


def decode(type_, barrier, seen):
    barrier.wait()
    value = DECODE(type_)
    seen.append((value.a, value.c.a, value.c.d[0].a))


sys.setswitchinterval(1e-6)
for number in range(15):
    module = sys.modules[f"m{number}"] = types.ModuleType(f"m{number}")
    exec(SOURCE, module.__dict__)
    seen, barrier = [], threading.Barrier(4)
    threads = [threading.Thread(target=decode, args=(module.S29, barrier, seen)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, 2, 1)] * 4, seen
"""


@pytest.mark.parametrize("function", ["from_json", "from_msgpack", "convert", "json_decoder"])
def test_threads_that_are_the_first_to_decode_a_struct(function: str) -> None:
    done = subprocess.run([sys.executable, "-c", _RACE, function], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
