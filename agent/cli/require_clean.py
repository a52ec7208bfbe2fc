"""Option `--require-clean` of commands that check labelled data for poisoning."""

from __future__ import annotations

import click

NOT_CLEAN = "the labelled data are not known to be clean (--require-clean)"
require_clean_option = click.option(
    "--require-clean",
    is_flag=True,
    help="Exit code 1 if the check for poisoning has a finding, or too few labels to run.",
)
