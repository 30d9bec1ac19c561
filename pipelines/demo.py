"""`bitdgdm demo`: the whole product once, on this machine, without a network.

Guarantees: quantizes the shipped QM9 model, registers it, generates molecules with it and says where everything is;
running it again continues or repeats harmlessly.
Knows nothing of: more than the other commands do; it only calls them.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from bitdgdm.infra import registry
from bitdgdm.pipelines.generate import run_campaign
from bitdgdm.pipelines.quantize import Quantized, quantize
from bitdgdm.pipelines.ray_run import cluster
from bitdgdm.pipelines.report import write_report
from bitdgdm.pipelines.spec import make_spec
from bitdgdm.pipelines.status import Status, read_status
from bitdgdm.pipelines.submit import open_campaign
from bitdgdm.quant.own_recipes import DEFAULT

MODEL = "builtin:digress-qm9"
NAME = "digress-qm9"
COUNT = 256
STEPS = 50
SEED = 7


@dataclass(frozen=True)
class Demo:
    """What the demo made and where it is."""

    quantized: Quantized
    status: Status
    data: str
    registry: str
    report: str
    seconds: float


def run_demo(out: Path, *, count: int = COUNT, steps: int = STEPS, quiet: bool = False) -> Demo:
    """Quantize, register, generate `count` molecules in `steps` denoising steps, report."""
    started = time.monotonic()
    with cluster():  # one cluster for both jobs: starting Ray takes ten seconds
        made = quantize(MODEL, DEFAULT.name, register=NAME, aliases=["champion"], quiet=quiet)
        assert made.version
        url = str(out / f"{NAME}-{made.digest[:8]}")
        spec = make_spec(
            {"model": made.version.uri, "count": count, "steps": steps, "seed": SEED, "out": url}, "the demo"
        )
        campaign, store = open_campaign(spec)
        run_campaign(campaign, store, quiet=quiet)
    report = write_report(store.url)
    return Demo(
        made, read_status(store.url), f"{url}/data", registry.location(), report, time.monotonic() - started
    )
