"""Completion scripts for bash, zsh and fish, as click generates them; the files in `completions/` are their copies.

The scripts ask `mgpu` itself at each TAB, so rig names and runtimes are always those of the day.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

#: Where the wheel puts each shell's script is in pyproject.toml.
FILES = {"bash": "mgpu.bash", "zsh": "_mgpu", "fish": "mgpu.fish"}


def script(shell: str, cli: click.Command) -> str:
    """The script of one of `FILES`' shells for `cli`, ending in one newline."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - one of ours
    complete = kind(cli, {}, "mgpu", "_MGPU_COMPLETE")
    # source() would start bash to ask for its version; the text does not depend on it.
    return (complete.source_template % complete.source_vars()).strip() + "\n"
