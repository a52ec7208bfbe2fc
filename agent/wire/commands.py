"""The commands an operator can send, and how long one may be valid: what both ends must agree on."""

from __future__ import annotations

import msgspec

# `expires` less `issued`: what a copied command can still do after a store was restored ends with it.
MAX_LIFETIME_S = 24 * 3600
# A command is a few hundred bytes, one with labels more. This much is looked at, no more.
MAX_COMMAND_BYTES = 16_384
MAX_ARGUMENT_LENGTH = 12_000
DEFAULT_SCHEDULE = "default"


class CommandArguments(msgspec.Struct, frozen=True):
    """The members of `args`, all of them texts, in the order a person writes them."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


COMMANDS: dict[str, CommandArguments] = {
    "run": CommandArguments(("task",)),
    "pause": CommandArguments(("task",)),
    "resume": CommandArguments(("task",)),
    "report": CommandArguments(),
    "set-schedule": CommandArguments(("task", "schedule")),
    "rollback": CommandArguments(("task",)),
    "relearn": CommandArguments(("task",), ("for",)),
    "reset-reference": CommandArguments(("task",)),
    # `labels`: JSON, as the columns of a line at the intake.
    "label": CommandArguments(("task", "labels")),
    "rotate-key": CommandArguments(),
    "wipe": CommandArguments((), ("confirm",)),
}
# Not obeyed while the device cannot tell whether they have expired.
CLOCK_DEPENDENT = frozenset({"rollback", "rotate-key", "wipe"})


def check_args(name: str, args: dict[str, str]) -> None:
    """Raises ValueError, with what to do, where `name` is no command or `args` are not its arguments."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name[:60]!r}; known are {', '.join(COMMANDS)}")
    known = COMMANDS[name]
    missing = [one for one in known.required if one not in args]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    beyond = sorted(set(args) - set(known.required) - set(known.optional))
    if beyond:
        raise ValueError(f"{name} takes no {', '.join(beyond)[:120]}")
