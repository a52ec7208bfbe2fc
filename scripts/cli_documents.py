"""Documents of the command line, made from its click commands: reference pages, man pages, shell completion.

python -m scripts.cli_documents                       writes docs/reference/cli.md, and cli/ with a page a group
python -m scripts.cli_documents --man FOLDER          writes outstation.1 and one page for each command
python -m scripts.cli_documents --completion FOLDER   writes outstation.bash, _outstation and outstation.fish
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from outstation import __version__
from outstation.foundation.cli.commands import cli
from scripts.kit.usage import answer_help

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PROGRAM = "outstation"
# File names that each shell looks for.
COMPLETIONS = {"bash": f"{PROGRAM}.bash", "zsh": f"_{PROGRAM}", "fish": f"{PROGRAM}.fish"}
_MADE = "Made by `python -m scripts.cli_documents`: do not edit."
_HEAD = f"""\
# Command line

{_MADE}

Every command has `--help` with an example. Commands that report have `--json`.

| exit code | meaning |
|---:|---|
| 0 | done |
| 1 | done, and the answer is bad; or not possible here and now |
| 2 | wrong use, or a wrong config |
| 3 | the data folder was moved away |

Completion of commands and options: `eval "$(_OUTSTATION_COMPLETE=bash_source outstation)"`, or `zsh_source`, or
`fish_source`. The packages install it, with man pages such as `man outstation-fleet-enrol`.
"""


def walk(
    command: click.Command = cli, path: tuple[str, ...] = (PROGRAM,)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with the words that call it, groups before their commands."""
    yield path, command
    if isinstance(command, click.Group):
        context = _context(command, path)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            if not below.hidden:
                yield from walk(below, (*path, name))


def render_pages() -> dict[str, str]:
    """Return the reference pages: file name, relative to docs/reference → Markdown.

    `cli.md` has the commands of one word, and a list of the groups. Each group of `fleet` has a page, as `model` has.
    """
    pages = {"cli.md": [_HEAD]}
    links: dict[str, list[str]] = {}
    for path, command in walk():
        words = path[1:]
        if not words:
            continue
        below_fleet = words[0] == "fleet"
        depth = 2 if below_fleet else 1
        is_group = isinstance(command, click.Group) and len(words) <= depth
        parts = words[: depth if is_group or len(words) > depth else depth - 1]
        name = f"cli/{'-'.join(parts)}.md" if parts else "cli.md"
        if name not in pages:
            pages[name] = []
            links.setdefault(words[0], []).append(f"[{' '.join(parts)}]({name})")
        pages[name].append(_render_section(path, command, len(path) - len(parts)))
    groups = [f"- {', '.join(each)}" for each in links.values()]
    pages["cli.md"].insert(1, "\n".join(["Groups of commands have pages of their own:", "", *groups, ""]))
    return {name: "\n".join(sections) for name, sections in pages.items()}


def render_man_page(path: tuple[str, ...], command: click.Command) -> str:
    """Return one man page (man(7))."""
    name = "-".join(path)
    first, *paragraphs = _paragraphs(command)
    summary = re.sub(r"\.$", "", first.split(". ")[0])
    lines = [f'.TH "{name.upper()}" "1" "" "outstation {__version__}" "Outstation"', ".SH NAME"]
    lines += [f"{_roff(name)} \\- {_roff(summary)}", ".SH SYNOPSIS", f".B {_roff(' '.join(path))}"]
    lines += [_roff(_usage(path, command)), ".SH DESCRIPTION"]
    for number, paragraph in enumerate([first, *paragraphs]):
        lines += [".PP"] if number else []
        # A paragraph that click must not wrap keeps its lines.
        lines += [".nf", *map(_roff, paragraph.splitlines()), ".fi"] if "\n" in paragraph else [_roff(paragraph)]
    if options := _options(path, command):
        lines.append(".SH OPTIONS")
        for option, text in options:
            lines += [".TP", f".B {_roff(option)}", _roff(text) or "\\&"]
    if example := _example(command):
        lines += [".SH EXAMPLE", ".nf", _roff(example), ".fi"]
    if isinstance(command, click.Group):
        below = command.list_commands(_context(command, path))
        lines += [".SH SEE ALSO", ",\n".join(f".BR {_roff('-'.join((*path, each)))} (1)" for each in below)]
    elif len(path) > 1:
        lines += [".SH SEE ALSO", f".BR {_roff('-'.join(path[:-1]))} (1)"]
    return "\n".join(lines) + "\n"


def render_completion(shell: str) -> str:
    """Return the script with which a shell completes commands and options."""
    made = get_completion_class(shell)
    assert made is not None
    # Bash asks `bash` for its version when this is called by `source`; it writes the script either way.
    return made(cli, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()


def _render_section(path: tuple[str, ...], command: click.Command, level: int) -> str:
    lines = [f"{'#' * level} {' '.join(path)}", ""]
    if level == 1:
        lines += [_MADE, ""]
    lines += ["```", f"{' '.join(path)} {_usage(path, command)}".rstrip(), "```", ""]
    for paragraph in _paragraphs(command):
        lines += [f"```\n{paragraph}\n```" if "\n" in paragraph else _escape(paragraph), ""]
    if options := _options(path, command):
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| {_escape(f'`{option}`')} | {_escape(text)} |" for option, text in options] + [""]
    if example := _example(command):
        lines += [f"Example: `{example}`", ""]
    return "\n".join(lines)


def _context(command: click.Command, path: tuple[str, ...]) -> click.Context:
    return click.Context(command, info_name=" ".join(path), help_option_names=["-h", "--help"])


def _usage(path: tuple[str, ...], command: click.Command) -> str:
    return " ".join(command.collect_usage_pieces(_context(command, path)))


def _paragraphs(command: click.Command) -> list[str]:
    """Return the paragraphs of a command's help; one that keeps its lines has more than one."""
    help_text = inspect.cleandoc(command.help or "").replace("\f", "")
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", help_text):
        is_verbatim = paragraph.startswith("\b\n")
        text = paragraph.removeprefix("\b\n")
        paragraphs.append(text if is_verbatim else " ".join(text.split()))
    return [paragraph for paragraph in paragraphs if paragraph]


def _options(path: tuple[str, ...], command: click.Command) -> list[tuple[str, str]]:
    context = _context(command, path)
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    shown = [(option, " ".join(text.split())) for option, text in filter(None, records) if "--help" not in option]
    return [(option, text) for option, text in shown if text]


def _example(command: click.Command) -> str:
    return (command.epilog or "").removeprefix("Example: ").strip()


def _escape(text: str) -> str:
    """Escape what Markdown or a table would read otherwise, outside code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([|<>*_\[\]])", r"\\\1", part) for part in parts
    )


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    escaped = re.sub(r"[^\x00-\x7f]", lambda match: f"\\[u{ord(match[0]):04X}]", escaped)
    return re.sub(r"^(?=[.'])", r"\\&", escaped)


def main() -> None:
    match sys.argv[1:]:
        case []:
            for name, text in render_pages().items():
                (REFERENCE / name).parent.mkdir(exist_ok=True)
                (REFERENCE / name).write_text(text, encoding="utf-8")
        case ["--man", folder]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for path, command in walk():
                (Path(folder) / f"{'-'.join(path)}.1").write_text(render_man_page(path, command), encoding="utf-8")
        case ["--completion", folder]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for shell, name in COMPLETIONS.items():
                (Path(folder) / name).write_text(render_completion(shell), encoding="utf-8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    answer_help(__doc__)
    main()
