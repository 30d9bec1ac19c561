"""`bitdgdm import`, `quantize`, `recipes`, `models`: the journeys of requantization and lookup.

Guarantees: what is registered was written, read back and digested first; every lookup resolves an alias once.
Knows nothing of: how a layer is quantized or a checkpoint read.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bitdgdm.pipelines.console import out, reply, table
from bitdgdm.quant.own_recipes import DEFAULT

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]

models = typer.Typer(
    help="Look up, inspect and fetch what is registered.", no_args_is_help=True, rich_markup_mode="rich"
)


def quantize(
    model: Annotated[
        str,
        typer.Argument(help="A source model: builtin:digress-qm9, models:/NAME/3 or a .safetensors file."),
    ],
    recipe: Annotated[str, typer.Option(help="See them with: bitdgdm recipes")] = DEFAULT.name,
    out_path: Annotated[Path | None, typer.Option("--out", help="Write the artifact to this file.")] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the artifact under NAME.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Point this alias at the new version; may repeat.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Tasks at a time. \\[default: one a core, four a GPU]")
    ] = None,
    executor: Annotated[str, typer.Option(help="ray, or local: this process.")] = "ray",
    json: Json = False,
) -> int:
    """Quantize a source model into one safetensors artifact.

    [bold]Examples[/bold]

      bitdgdm quantize builtin:digress-qm9 --register digress-qm9 --alias champion

      bitdgdm quantize model.safetensors --recipe rtn-w8a8 --out model-w8a8.safetensors
    """
    from bitdgdm.infra.errors import BadInput
    from bitdgdm.pipelines.quantize import quantize as run

    if executor not in ("ray", "local"):
        raise BadInput(f"executor is ray or local, got {executor!r}. Give --executor ray")
    if not out_path and not register:
        raise BadInput("nothing would be kept. Give --out FILE, --register NAME, or both")
    made = run(
        model,
        recipe,
        out=out_path,
        register=register,
        aliases=alias or (),
        executor=executor,
        workers=workers,
        quiet=json,
    )

    def human() -> None:
        out.print(f"{made.source} by {made.recipe}: {made.layers} linear layers in {made.seconds:.1f} s")
        out.print(
            f"kept in 16 bit: input and output layers ({made.kept})     dropped: {made.dropped} layers that feed nothing"
        )
        out.print(
            f"stored {made.bits_per_weight:.1f} bits a weight ({made.source_bytes / 1e6:.1f} -> {made.artifact_bytes / 1e6:.1f} MB)"
            f"     worst layer {made.worst_layer}: {100 * made.worst_error:.1f} % error of its {made.worst_of}"
        )
        if made.version:
            v = made.version
            named = f", alias {', '.join(v.aliases)}" if v.aliases else ""
            out.print(
                f"registered {v.name} version {v.version}{named}; use it with: "
                f"bitdgdm generate --model {v.uri} --count 1000 --out out/"
            )
        if out_path:
            out.print(f"artifact  {out_path}")

    reply(made, json, human)
    return 0


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A Lightning .ckpt, a state_dict .pt, or .safetensors.")],
    config: Annotated[Path | None, typer.Option(help="The model's Hydra config.yaml.")] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Data-set statistics (JSON), for data sets we don't know.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. \\[default: the file's]")] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register it as a source model under NAME.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Point this alias at the new version; may repeat.")
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Write the source model to this file.")
    ] = None,
    json: Json = False,
) -> int:
    """Import a foreign checkpoint as a source model; nothing in it is executed.

    [bold]Example[/bold]

      bitdgdm import last.ckpt --config config.yaml --register digress-zinc
    """
    from bitdgdm.infra.errors import BadInput
    from bitdgdm.pipelines.import_model import import_model

    if not out_path and not register:
        raise BadInput("nothing would be kept. Give --out FILE, --register NAME, or both")
    made = import_model(
        checkpoint,
        config=config,
        stats=stats,
        name=name,
        register=register,
        aliases=alias or (),
        out=out_path,
    )

    def human() -> None:
        out.print(
            f"{made.name}: {made.parameters:,} parameters, {made.layers} layers, digest {made.digest[:16]}"
        )
        if made.version:
            out.print(
                f"registered {made.version.uri}; quantize it with: bitdgdm quantize {made.version.uri} --register NAME"
            )
        if out_path:
            out.print(f"source model  {out_path}")

    reply(made, json, human)
    return 0


def recipes(json: Json = False) -> int:
    """List the recipes: what each stores and computes, what it costs, where it is from."""
    from bitdgdm.quant.recipe_book import recipes as known

    def human() -> None:
        columns = ("recipe", "what it does", "cost", "source")
        rows = [(r.name, r.summary, r.cost, r.source) for r in known()]
        out.print(table(columns, rows))

    reply(known(), json, human)
    return 0


@models.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    json: Json = False,
) -> int:
    """List every registered version, newest first."""
    from bitdgdm.infra import registry

    versions = [v for v in registry.list_models() if name in (None, v.name)]

    def human() -> None:
        if not versions:
            out.print(
                f"nothing is registered at {registry.location()}. "
                "Begin with: bitdgdm quantize builtin:digress-qm9 --register digress-qm9 --alias champion"
            )
            return
        columns = ("model", "version", "alias", "recipe", "bits", "made from", "created")
        rows = [
            (v.name, str(v.version), ", ".join(v.aliases), v.tags.get("recipe", ""), v.tags.get("bits_per_weight", ""),
             v.tags.get("source_uri", ""), v.created[:10])
            for v in versions
        ]  # fmt: skip
        out.print(table(columns, rows))

    reply(versions, json, human)
    return 0


@models.command("show")
def show(
    model: Annotated[
        str, typer.Argument(help="NAME@ALIAS, NAME/VERSION, NAME, or a full models:/ URI or file.")
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="Also show what each part of each layer costs and is worth.")
    ] = False,
    json: Json = False,
) -> int:
    """Show one version: what it is, what it was made from, how good each layer is.

    [bold]Examples[/bold]

      bitdgdm models show digress-qm9@champion --json

      bitdgdm models show digress-qm9@champion --layers
    """
    from bitdgdm.pipelines.catalog import show_model

    found = show_model(model, parts=layers)

    def human() -> None:
        for key, value in found.facts.items():
            out.print(f"{key:<16}{value}")
        if found.parts:
            from bitdgdm.pipelines.parts_tables import MEANING, kinds_table, layers_table

            out.print()
            out.print(layers_table(found.parts))
            out.print()
            out.print(kinds_table(found.parts))
            out.print(MEANING)
        elif found.layers:
            out.print()
            out.print(_worst_layers(found.layers))
            out.print(f"every layer and what its parts are worth: bitdgdm models show {model} --layers")

    reply(found, json, human)
    return 0


def _worst_layers(layers: dict[str, dict[str, Any]], most: int = 8) -> Table:
    from bitdgdm.quant.layer_report import LayerReport

    columns = ("layer", "shape", "of", "error", "weight's SQNR dB", "rank", "non-zeros", "bits a weight")
    reports = {name: LayerReport.from_dict(r) for name, r in layers.items()}
    worst = sorted(reports.items(), key=lambda item: -item[1].error)[:most]
    rows = [
        (name, "{} x {}".format(*r.shape), r.of, f"{100 * r.error:.2f} %",
         "-" if r.sqnr_db is None else f"{r.sqnr_db:.1f}", str(r.rank), str(r.nnz), f"{r.bits_per_weight:.2f}")
        for name, r in worst
    ]  # fmt: skip
    return table(columns, rows, title=f"worst {len(rows)} of {len(layers)} layers")


@models.command("pull")
def pull(
    model: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/VERSION or NAME.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to put the files in.")] = Path("."),
    json: Json = False,
) -> int:
    """Fetch the files of one version and check them.

    [bold]Example[/bold]

      bitdgdm models pull digress-qm9@champion --to model/
    """
    from bitdgdm.pipelines.catalog import pull_model

    pulled = pull_model(model, to)
    reply(
        pulled,
        json,
        lambda: out.print(f"{pulled.uri} -> {pulled.path}  (digest {pulled.digest[:16]} checked)"),
    )
    return 0
