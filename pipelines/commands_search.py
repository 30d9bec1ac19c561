"""`bitdgdm search`: the mixture of recipes that loses least under a budget of size or speed.

Guarantees: --out holds a recipe that `bitdgdm quantize --recipe` takes when the command succeeds.
Knows nothing of: how losses are measured and the choice is made (search.py).
"""

from pathlib import Path
from typing import Annotated

import typer

from bitdgdm.pipelines.console import out, reply, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def search(
    model: Annotated[
        str,
        typer.Argument(help="A source model: builtin:digress-qm9, models:/NAME/3 or a .safetensors file."),
    ],
    out_path: Annotated[Path, typer.Option("--out", help="Write the recipe to this .json file.")],
    bits: Annotated[
        float | None, typer.Option(min=1.0, max=16.0, help="Stored bits a weight, at most.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(min=1.0, help="Times the speed of bf16, at least, in the Linears' arithmetic."),
    ] = None,
    chip: Annotated[str, typer.Option(help="For --speedup: h200, a100 or rtx4090.")] = "h200",
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe to mix, by name or as a .json file; may repeat. \\[default: seven of ours]"
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="What gets a recipe: each kind of layer, or each layer (nine times the work).")
    ] = "kind",
    molecules: Annotated[int, typer.Option(min=1, help="Molecules drawn to measure losses.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps in which they are drawn.")] = 10,
    check: Annotated[
        int, typer.Option(min=0, help="Held-out molecules to judge the mixture on; 0 leaves it out.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Key of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
) -> int:
    """Pick a recipe for each kind of layer (or each layer) by its measured loss, under a budget.

    Each candidate is tried on each group of layers with the rest in full precision; then the mixture is chosen whose
    losses sum to least. A search that was stopped goes on where it was with the same command.

    [bold]Examples[/bold]

      bitdgdm search builtin:digress-qm9 --bits 4.3 --out small.json

      bitdgdm quantize builtin:digress-qm9 --recipe small.json --register digress-qm9

      bitdgdm search builtin:digress-qm9 --speedup 3 --chip a100 --by layer --device cuda --out fast.json
    """
    from bitdgdm.infra.errors import BadInput
    from bitdgdm.pipelines.search import CANDIDATES, Asked, document, write_recipe
    from bitdgdm.pipelines.search import search as run

    if out_path.suffix != ".json":
        raise BadInput(f"a recipe is a .json file, not {out_path}. Give --out {out_path.stem}.json")
    candidates = tuple(candidate) if candidate else CANDIDATES
    asked = Asked(bits, speedup, chip, candidates, by, molecules, steps, check, seed)
    found = run(model, asked, out_path.stem, device=device, quiet=json)
    write_recipe(found.recipe, out_path)

    def human() -> None:
        rows = [(g, o, f"{1e4 * found.losses[g][o]:.3f}") for g, o in found.picked.items()]
        out.print(table(("layers", "recipe", "KL 1e-4"), rows))
        checked = (
            "" if found.held_out_kl is None else f"     on held-out molecules {1e4 * found.held_out_kl:.3f}"
        )
        out.print(
            f"KL 1e-4: predicted {1e4 * found.predicted_kl:.3f}, measured {1e4 * found.measured_kl:.3f} "
            f"on the network's own trajectories{checked}"
        )
        out.print(
            f"stored {found.bits_per_weight:.2f} bits a weight     {found.speedup:.2f} times bf16 on {chip}, by arithmetic"
        )
        if not found.exact:
            out.print(f"a better choice may exist, of predicted KL {1e4 * found.bound:.3f} at best")
        out.print(
            f"recipe  {out_path}; use it with: bitdgdm quantize {model} --recipe {out_path} --register NAME"
        )

    reply(document(found), json, human)
    return 0
