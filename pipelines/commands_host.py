"""`bitdgdm demo` and `bitdgdm doctor`: the first minutes with the product.

Guarantees: both work without a network and without a GPU.
Knows nothing of: how (demo.py, doctor.py).
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bitdgdm.pipelines.console import out, reply, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
EXIT_FAILED = 1


def demo(
    out_path: Annotated[Path, typer.Option("--out", help="Folder for the campaign.")] = Path("demo-out"),
    count: Annotated[int, typer.Option(min=1, help="How many molecules.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps, up to 500.")] = 50,
    json: Json = False,
) -> int:
    """Quantize the shipped QM9 model, register it, generate molecules, write a report.

    [bold]Example[/bold]

      bitdgdm demo --out demo-out
    """
    from bitdgdm.pipelines.demo import run_demo

    made = run_demo(out_path, count=count, steps=steps, quiet=json)

    def human() -> None:
        s, q = made.status, made.quantized
        assert s.stats and q.version
        n = max(1, s.molecules)
        out.print(
            f"quantized {q.source} by {q.recipe}: {q.bits_per_weight:.1f} bits a weight, "
            f"{q.source_bytes / 1e6:.1f} -> {q.artifact_bytes / 1e6:.1f} MB, {q.seconds:.0f} s"
        )
        out.print(
            f"generated {s.molecules} molecules in {s.steps} steps: {s.stats['counts']['valid'] / n:.1%} valid, {made.seconds:.0f} s in all"
        )
        out.print(f"parquet   {made.data}")
        out.print(f"registry  {made.registry}")
        out.print(f"report    {made.report}")
        out.print(f"next      bitdgdm models show {q.version.name}@champion")
        out.print(f"          bitdgdm generate --model {q.version.uri} --count 1000 --out out/")

    reply(made, json, human)
    return 0 if made.status.state == "complete" else 3


def doctor(
    storage: Annotated[
        str | None, typer.Option(help="Also try this campaign location, such as s3://bucket/x.")
    ] = None,
    json: Json = False,
) -> int:
    """Check this machine and say what to install or set.

    [bold]Example[/bold]

      bitdgdm doctor --storage s3://bucket/campaigns
    """
    from bitdgdm.pipelines.doctor import examine

    checks = examine(storage)

    def human() -> None:
        colour = {"ok": "green", "note": "yellow", "problem": "red"}
        rows = [(Text(c.level, style=colour[c.level]), c.name, c.found, c.fix) for c in checks]
        out.print(table(("",) * 4, rows))

    reply(checks, json, human)
    return EXIT_FAILED if any(c.level == "problem" for c in checks) else 0
