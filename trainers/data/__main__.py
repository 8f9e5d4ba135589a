"""`python -m trainers.data list | show | prepare | audit | rewrite`: preference data, looked at and made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from trainers.command import command
from trainers.data.audit_command import Audit, run_audit
from trainers.data.list_command import List, run_list
from trainers.data.prepare_command import Prepare, run_prepare
from trainers.data.rewrite_command import Rewrite, run_rewrite
from trainers.data.show_command import Show, run_show

# A subcommand is a dataclass here and the function that runs it below.
Subcommand = Union[
    Annotated[List, tyro.conf.subcommand("list")],
    Annotated[Show, tyro.conf.subcommand("show")],
    Annotated[Prepare, tyro.conf.subcommand("prepare")],
    Annotated[Audit, tyro.conf.subcommand("audit")],
    Annotated[Rewrite, tyro.conf.subcommand("rewrite")],
]
RUN: dict[type, Callable[[Any], None]] = {
    List: run_list,
    Show: run_show,
    Prepare: run_prepare,
    Audit: run_audit,
    Rewrite: run_rewrite,
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Preference data: what there is, what it looks like, and made ready for training."""

    command: tyro.conf.OmitSubcommandPrefixes[Subcommand]


def run(arguments: Data) -> None:
    """Run the subcommand. Raises SweepError."""
    RUN[type(arguments.command)](arguments.command)


if __name__ == "__main__":
    command(Data, run, "trainers.data", models=False)
