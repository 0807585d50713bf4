"""The command ``dpfl``: run an app, plan a budget, fetch sample data.

>>> main.__module__
'dpfl_flower.cli'
"""

import typer

from dpfl_flower.cli.data import data
from dpfl_flower.cli.plan import plan
from dpfl_flower.cli.run import run

__all__ = ["app", "main"]

app = typer.Typer(
    name="dpfl",
    help="Federated learning with differential privacy, on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(plan)
app.command()(data)


def main() -> None:
    """Run the command; the process exits with one of `dpfl_flower.cli.output.ExitCode`."""
    app()
