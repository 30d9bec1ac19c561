"""`bitdgdm generate`, `status`, `report`: the journey of someone who screens molecules.

Guarantees: flags override a spec file; a finished campaign is said to be finished and nothing is computed again.
Knows nothing of: how a campaign runs (generate.py) or what a report looks like (report.py).
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitdgdm.infra.errors import BadInput
from bitdgdm.pipelines.console import out, reply

EXIT_PARTIAL = 3

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def generate(
    spec: Annotated[Path | None, typer.Argument(help="A YAML or JSON spec file; flags override it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="builtin:digress-qm9, models:/NAME/3, models:/NAME@ALIAS or a file.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many molecules.")] = None,
    seed: Annotated[int | None, typer.Option(help="Key of all random numbers. \\[default: 0]")] = None,
    out_url: Annotated[str | None, typer.Option("--out", help="A folder or s3://bucket/prefix.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps, 2 to the model's T. \\[default: T]")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="URL", help="Continue the campaign at URL.")] = None,
    unit_size: Annotated[int | None, typer.Option(help="Molecules a shard. \\[default: from count]")] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Molecules a network call. \\[default: 64 on CPU, 1024 on GPU, 8192 with the kernels]"),
    ] = None,
    first_id: Annotated[int | None, typer.Option(help="Id of the first sample. \\[default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. \\[default: auto]")] = None,
    engine: Annotated[
        str | None, typer.Option(help="torch, kernels (our CUDA kernels) or auto. \\[default: auto]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or auto: bf16 with the kernels. \\[default: auto]")
    ] = None,
    novelty: Annotated[
        str | None, typer.Option(help="Known molecules: builtin:qm9, a file, or none. \\[default: builtin:qm9]")
    ] = None,
    score: Annotated[str | None, typer.Option(help="Column that ranks molecules. \\[default: qed]")] = None,
    alerts: Annotated[
        bool | None, typer.Option("--alerts/--no-alerts", help="Look up structure alerts. \\[default: alerts]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Actors in the pool. \\[default: one a core or GPU]")
    ] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPU share of an actor. \\[default: 1]")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Failures of a unit before it is set aside. \\[default: 3]")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="ray, or local: this process. \\[default: ray]")] = None,
    json: Json = False,
) -> int:
    """Generate molecules into Parquet, exactly once, restartable at any point.

    [bold]Examples[/bold]

      bitdgdm generate --model models:/digress-qm9@champion --count 100000 --seed 7 --out s3://bucket/campaign-7

      bitdgdm generate campaign.yaml --count 1000 --out out/

      bitdgdm generate --resume s3://bucket/campaign-7
    """
    flags: dict[str, Any] = {
        "model": model, "count": count, "seed": seed, "out": out_url, "steps": steps, "unit_size": unit_size,
        "micro_batch": micro_batch, "first_id": first_id, "device": device, "engine": engine, "precision": precision,
        "novelty": novelty, "score": score, "alerts": alerts, "workers": workers, "gpus_per_worker": gpus_per_worker,
        "max_attempts": max_attempts, "executor": executor,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    if given.get("novelty") == "none":
        given["novelty"] = None

    from bitdgdm.pipelines.generate import run_campaign
    from bitdgdm.pipelines.report import write_report
    from bitdgdm.pipelines.spec import make_spec, read_spec
    from bitdgdm.pipelines.submit import open_campaign, resume_campaign

    values = {**(read_spec(spec) if spec else {}), **given}
    if resume:
        if values.get("out", resume) != resume:
            raise BadInput(f"--resume {resume} and --out {values['out']} name two campaigns. Drop --out")
        campaign, store = resume_campaign(resume, values)
    else:
        campaign, store = open_campaign(make_spec(values, str(spec) if spec else "the command line"))
    outcome = run_campaign(campaign, store, quiet=json)
    report_url = write_report(store.url)
    reply({**outcome.__dict__, "report": report_url}, json, lambda: _say(outcome, report_url))
    return 0 if outcome.finished else EXIT_PARTIAL


def _say(outcome: Any, report_url: str) -> None:
    if outcome.finished:
        out.print(
            f"{outcome.molecules:,} molecules in {outcome.units} shards, campaign digest {outcome.digest[:16]}"
        )
        out.print(f"data      {outcome.out.rstrip('/')}/data/  (the list of shards is manifest.json)")
        out.print(f"report    {report_url}")
    else:
        out.print(
            f"{outcome.committed} of {outcome.units} units are committed, {outcome.quarantined} set aside after repeated "
            f"failures. See why with: bitdgdm status {outcome.out}   Try them again with: bitdgdm generate --resume {outcome.out}"
        )


def status(
    url: Annotated[str, typer.Argument(metavar="CAMPAIGN", help="The campaign's --out.")],
    json: Json = False,
) -> int:
    """Say how far a campaign is; reads commit records only, so it works while workers run elsewhere.

    [bold]Example[/bold]

      bitdgdm status s3://bucket/campaign-7
    """
    from bitdgdm.pipelines.status import read_status

    state = read_status(url)

    def human() -> None:
        share = state.molecules / state.count
        out.print(
            f"{state.campaign}  {state.state}  {state.molecules:,} of {state.count:,} molecules ({share:.0%})"
        )
        out.print(
            f"units     {state.committed} of {state.units} committed, {len(state.quarantined)} set aside"
        )
        out.print(f"model     {state.model['uri']}  {state.model['recipe']}  {state.model['digest'][:16]}")
        out.print(f"sampler   seed {state.seed}, {state.steps} steps")
        if state.stats:
            valid = state.stats["counts"]["valid"] / max(1, state.molecules)
            out.print(f"valid     {valid:.2%}   rate {state.per_worker_second:.2f} molecules/s a worker")
        for unit, reason in sorted(state.quarantined.items())[:10]:
            out.print(f"set aside {unit}: {reason}")
        if state.state != "complete":
            out.print(f"continue  bitdgdm generate --resume {url}")

    reply(state, json, human)
    return EXIT_PARTIAL if state.state == "partial" else 0


def report(
    url: Annotated[str, typer.Argument(metavar="CAMPAIGN", help="The campaign's --out.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Write the page here instead of CAMPAIGN/report.html.")
    ] = None,
    json: Json = False,
) -> int:
    """Write report.html, one self-contained page made from the commit records.

    [bold]Example[/bold]

      bitdgdm report out/ --to report.html
    """
    from bitdgdm.pipelines.report import write_report

    where = write_report(url, to)
    reply({"report": where}, json, lambda: out.print(where))
    return 0
