"""`bitdgdm evaluate` and `bitdgdm compare`: is a quantized model as good as the one it was made from?

Guarantees: the folder --out holds evaluation.json (flat rows), evaluation.html and pictures/ when a command succeeds.
Knows nothing of: how anything is measured (evaluate.py) or drawn (evaluate_plots.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdgdm.pipelines.console import out, reply, table

if TYPE_CHECKING:
    from bitdgdm.pipelines.evaluate_page import Picture

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
ROWS_FILE, PAGE_FILE = "evaluation.json", "evaluation.html"


def evaluate(
    model: Annotated[str, typer.Option(help="An artifact: NAME@ALIAS, models:/NAME/3 or a file.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Its full-precision model. \\[default: the artifact's own]"),
    ] = None,
    molecules: Annotated[int, typer.Option(min=1, help="Held-out molecules for KL and NLL.")] = 2000,
    samples: Annotated[int, typer.Option(min=0, help="Molecules to draw and judge; 0 draws none.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of a sample. \\[default: the model's T]")
    ] = None,
    campaign: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Judge the molecules of this campaign instead of drawing some."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Held-out molecules: builtin:qm9, or a .parquet with the columns smiles and split."
        ),
    ] = "builtin:qm9",
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also look at each layer and kind of layer.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Key of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out_path: Annotated[Path, typer.Option("--out", help="Folder for figures, page and pictures.")] = Path(
        "eval"
    ),
    json: Json = False,
) -> int:
    """Measure a quantized model against full precision: errors, KL, likelihood, samples, size, time.

    [bold]Examples[/bold]

      bitdgdm evaluate --model digress-qm9@champion --out eval/

      bitdgdm evaluate --model model.safetensors --against builtin:digress-qm9 --samples 10000 --device cuda

      bitdgdm evaluate --model models:/digress-qm9/1 --campaign s3://bucket/campaign-7
    """
    from bitdgdm.infra.errors import BadInput
    from bitdgdm.infra.rows import write_rows
    from bitdgdm.pipelines.evaluate import evaluate as run
    from bitdgdm.pipelines.evaluate_page import page, pictures, summary
    from bitdgdm.pipelines.evaluate_samples import Asked

    if campaign and samples:
        raise BadInput("the molecules of --campaign are judged, none are drawn. Drop --samples")
    asked = Asked(molecules, samples, steps, campaign, data, seed, device, layers)
    made = run(model, against, asked, quiet=json)
    drawn = pictures(made)
    write_rows(out_path / ROWS_FILE, made.rows, compact=True)
    files = _write(out_path, PAGE_FILE, page(made, drawn), drawn)
    whole = summary(made.rows, made.recipe)

    def human() -> None:
        _say(whole, f"{made.recipe} against {made.source}")
        out.print(f"figures   {out_path / ROWS_FILE}  ({len(made.rows)} rows)")
        out.print(f"page      {files}")
        if not samples and not campaign:
            out.print(
                "samples   none were judged; add --samples 2000, or --campaign OUT of a finished campaign"
            )

    document = {
        "model": made.model, "digest": made.digest, "recipe": made.recipe, "source": made.source,
        "figures": str(out_path / ROWS_FILE), "page": files, "summary": whole,
    }  # fmt: skip
    reply(document, json, human)
    return 0


def compare(
    evaluations: Annotated[list[Path], typer.Argument(help="Folders that bitdgdm evaluate wrote.")],
    out_path: Annotated[Path, typer.Option("--out", help="Folder for the page and pictures.")] = Path(
        "comparison"
    ),
    json: Json = False,
) -> int:
    """Put evaluations side by side: one table, and quality against size and time.

    [bold]Example[/bold]

      bitdgdm compare eval-w8a8/ eval-w4a4/ --out comparison/
    """
    from bitdgdm.infra.errors import BadInput
    from bitdgdm.infra.rows import read_rows
    from bitdgdm.pipelines.evaluate_page import compare_page, compare_pictures, figure_text, summary

    found = []
    for folder in evaluations:
        file = folder / ROWS_FILE if folder.is_dir() else folder
        if not file.is_file():
            raise BadInput(
                f"there is no evaluation at {folder}. Make one: bitdgdm evaluate --model MODEL --out {folder}"
            )
        rows = read_rows(file)
        if not rows:
            raise BadInput(
                f"{folder} has no figures. Make them: bitdgdm evaluate --model MODEL --out {folder}"
            )
        found.append((rows[0]["case"], rows))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):  # one recipe twice: the folders tell them apart
        names = [f"{name} ({folder})" for name, folder in zip(names, evaluations, strict=True)]
        found = [(name, rows) for name, (_, rows) in zip(names, found, strict=True)]
    drawn = compare_pictures(found)
    where = _write(out_path, "comparison.html", compare_page(found, drawn), drawn)
    wholes = {name: {r["metric"]: r for r in summary(rows, rows[0]["case"])} for name, rows in found}
    metrics = list(dict.fromkeys(m for of in wholes.values() for m in of))

    def human() -> None:
        lines = [(m, *(figure_text(of[m]) if m in of else "" for of in wholes.values())) for m in metrics]
        out.print(table(("metric", *names), lines))
        out.print(f"page      {where}")

    document = {
        "page": where,
        "evaluations": {n: {m: r["value"] for m, r in of.items()} for n, of in wholes.items()},
    }
    reply(document, json, human)
    return 0


def _say(rows: Sequence[dict[str, Any]], title: str) -> None:
    from bitdgdm.pipelines.evaluate_page import figure_text, interval_text

    lines = [(r["metric"], figure_text(r), interval_text(r), f"{r['n']:,}", r["baseline"]) for r in rows]
    out.print(table(("metric", "value", "95 % interval or range", "n", "against"), lines, title=title))


def _write(folder: Path, name: str, text: str, drawn: "Sequence[Picture]") -> str:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (folder / "pictures" / picture.file).write_bytes(picture.data)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)
