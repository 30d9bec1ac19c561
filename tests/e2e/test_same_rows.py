"""Run: pytest tests/e2e/test_same_rows.py   (one local Ray cluster, about a minute)

Law L1: a row depends on (model, seed, id, sampler settings) only.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitdgdm.infra.commit import visible_shards
from bitdgdm.infra.storage import open_store
from bitdgdm.pipelines.generate import run_campaign
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.pipelines.spec import make_spec
from bitdgdm.pipelines.submit import open_campaign
from bitdgdm.quant.own_recipes import DEFAULT

COUNT, MICRO_BATCH, STEPS = 64, 32, 5


@pytest.fixture(scope="module", params=["builtin:digress-qm9", DEFAULT.name])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The full-precision network, and the same one quantized."""
    if request.param.startswith("builtin:"):
        return str(request.param)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    quantize("builtin:digress-qm9", request.param, out=path, executor="local", quiet=True)
    return str(path)


def _rows(folder: Path, **changes: Any) -> pa.Table:
    """Run a campaign and return its rows, in id order, as a reader of the manifest sees them."""
    spec = {
        "count": COUNT,
        "seed": 11,
        "steps": STEPS,
        "micro_batch": MICRO_BATCH,
        "alerts": True,
        "executor": "local",
    }
    campaign, store = open_campaign(make_spec(spec | {"out": str(folder)} | changes))
    outcome = run_campaign(campaign, store, quiet=True)
    assert outcome.finished
    store = open_store(str(folder))
    return pa.concat_tables(
        pq.read_table(store.path(key)) for key in visible_shards(store)
    ).replace_schema_metadata()


@pytest.fixture(scope="module")
def one_unit(model: str, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return _rows(tmp_path_factory.mktemp("one"), model=model, unit_size=COUNT)


def test_seven_ragged_units_give_the_rows_of_one_unit(model: str, one_unit: pa.Table, tmp_path: Path) -> None:
    rows = _rows(tmp_path, model=model, unit_size=10)
    assert len(list(tmp_path.rglob("*.parquet"))) == 7
    assert rows.equals(one_unit)


def test_one_id_alone_gives_its_row(model: str, one_unit: pa.Table, tmp_path: Path) -> None:
    assert _rows(tmp_path, model=model, first_id=41, count=1).equals(one_unit.slice(41, 1))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_actors_changes_nothing(
    model: str, one_unit: pa.Table, tmp_path: Path, workers: int, ray_cluster: object
) -> None:
    rows = _rows(tmp_path, model=model, unit_size=10, executor="ray", workers=workers)
    assert rows.equals(one_unit)


def test_another_seed_gives_other_molecules(model: str, one_unit: pa.Table, tmp_path: Path) -> None:
    assert not _rows(tmp_path, model=model, seed=12).column("smiles").equals(one_unit.column("smiles"))
