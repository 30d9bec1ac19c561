"""The command line `bitdgdm`: names and options only.

Guarantees: heavy imports happen inside commands, so `--help` answers at once; exit codes are 0 ok, 1 failed, 2 bad
input, 3 partial, 75 try again.
Knows nothing of: how anything is done.
"""

from typing import Annotated

import typer

from bitdgdm.infra.version import code_version
from bitdgdm.pipelines import (
    commands_campaign,
    commands_evaluate,
    commands_host,
    commands_models,
    commands_search,
)
from bitdgdm.pipelines.console import run

app = typer.Typer(
    name="bitdgdm",
    help="Discrete graph diffusion at scale: quantize a model, version it, generate millions of molecules.",
    epilog="Start with: bitdgdm demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitdgdm {code_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Discrete graph diffusion at scale."""


app.command("demo")(commands_host.demo)
app.command("quantize")(commands_models.quantize)
app.command("search")(commands_search.search)
app.command("generate")(commands_campaign.generate)
app.command("status")(commands_campaign.status)
app.command("report")(commands_campaign.report)
app.command("evaluate")(commands_evaluate.evaluate)
app.command("compare")(commands_evaluate.compare)
app.command("import")(commands_models.import_)
app.command("recipes")(commands_models.recipes)
app.command("doctor")(commands_host.doctor)
app.add_typer(commands_models.models, name="models")


def main() -> None:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
