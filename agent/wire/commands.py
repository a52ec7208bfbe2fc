"""The commands an operator can send, and how long one may be valid: what both ends must agree on."""

from __future__ import annotations

import msgspec

# `expires` less `issued`: what a copied command can still do after a store was restored ends with it.
MAX_LIFETIME_S = 24 * 3600
# A command is a few hundred bytes, one with labels more. This much is looked at, no more.
MAX_COMMAND_BYTES = 16_384
MAX_ARGUMENT = 12_000
DEFAULT_SCHEDULE = "default"


class Arguments(msgspec.Struct, frozen=True):
    """The members of `args`, all of them texts, in the order a person writes them."""

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


COMMANDS: dict[str, Arguments] = {
    "run": Arguments(("task",)),
    "pause": Arguments(("task",)),
    "resume": Arguments(("task",)),
    "report": Arguments(),
    "set-schedule": Arguments(("task", "schedule")),
    "rollback": Arguments(("task",)),
    "learn": Arguments(("task",), ("for",)),
    "reset-reference": Arguments(("task",)),
    # `labels`: JSON, as the columns of a line at the intake.
    "label": Arguments(("task", "labels")),
    "rotate-key": Arguments(),
    "wipe": Arguments((), ("confirm",)),
}
# Not obeyed while the device cannot tell whether they have expired.
NEED_TIME = frozenset({"rollback", "rotate-key", "wipe"})


def check_args(name: str, args: dict[str, str]) -> None:
    """Raises ValueError, with what to do, where `name` is no command or `args` are not its arguments."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name[:60]!r}; known are {', '.join(COMMANDS)}")
    known = COMMANDS[name]
    missing = [one for one in known.needed if one not in args]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    beyond = sorted(set(args) - set(known.needed) - set(known.optional))
    if beyond:
        raise ValueError(f"{name} takes no {', '.join(beyond)[:120]}")
