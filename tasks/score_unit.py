"""Score one unit: graphs in, the bytes of a Parquet shard and its mergeable statistics out.

Guarantees: the bytes are a function of (graphs, ids, scoring options, footer) only: rows sorted by sample_id, no
clock, no host; molecules are scored one by one, so splitting over processes changes nothing.
Knows nothing of: how the graphs were sampled, where the shard goes.
"""

import io
import json
import multiprocessing
import multiprocessing.context
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bitdgdm.models.digress import DigressConfig
from bitdgdm.models.molecule import score_graphs
from bitdgdm.models.novelty import ReferenceSet
from bitdgdm.models.sampler import Graphs
from bitdgdm.models.summary import unit_stats

ROW_GROUP_ROWS = 131_072
_CHUNK = 64  # molecules a process takes at a time: a unit of thousands keeps any number of them busy to its end


@dataclass(frozen=True)
class Scoring:
    """What is computed of a molecule. `reference`: molecules that count as known, or None."""

    config: DigressConfig
    reference: ReferenceSet | None
    score: str
    alerts: bool

    def table(self, graphs: Graphs, first_id: int) -> pa.Table:
        """Return one row a graph, in id order."""
        return score_graphs(
            graphs, first_id, self.config, reference=self.reference, score_by=self.score, alerts=self.alerts
        )


_scoring: Scoring | None = (
    None  # of a pool process: a reference set of 16 MB is sent once, not with every chunk
)


def _begin(scoring: Scoring) -> None:
    global _scoring
    _scoring = scoring
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()


def _end_with_parent() -> None:
    """A killed actor can't stop its pool: without this its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score_chunk(arrays: Sequence[np.ndarray], first_id: int) -> pa.Table:
    assert _scoring is not None
    return _scoring.table(Graphs(*map(torch.from_numpy, arrays)), first_id)


def _arrays(graphs: Graphs) -> list[np.ndarray]:
    """As copies: a tensor would travel as a file descriptor, which takes several messages with this process's threads."""
    return [t.numpy().copy() for t in (graphs.n, graphs.X, graphs.E)]


def processes() -> multiprocessing.context.BaseContext:
    """Return the context of scoring processes; starts, if it isn't there, the process that forks them.

    It imports what they need while this one does other things.
    A child forked from here would inherit CUDA and Ray state that it can't use. One spawned would import PyTorch and
    RDKit by itself while `submit` waits to hand it the reference set: seconds each, one process after another.
    """
    multiprocessing.set_forkserver_preload(["__main__", "bitdgdm.tasks.score_start"])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


class Scorer:
    """Scores units in this process, or in `processes` of them when a GPU would wait for RDKit."""

    def __init__(self, scoring: Scoring, processes: int = 0) -> None:
        self._scoring, self._processes, self._lock = scoring, processes, threading.Lock()
        self._pool = self._start() if processes > 1 else None

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._processes, processes(), initializer=_begin, initargs=(self._scoring,))

    def begin(self, graphs: Graphs, first_id: int) -> Callable[[], pa.Table]:
        """Hand graphs over to the processes; the function returned waits for their rows."""
        if self._pool is None:
            return lambda: self._scoring.table(graphs, first_id)
        pool, starts = self._pool, range(0, len(graphs), _CHUNK)
        try:
            begun = [pool.submit(_score_chunk, _arrays(graphs[i : i + _CHUNK]), first_id + i) for i in starts]
        except BrokenProcessPool:
            self._replace(pool)
            raise

        def rows() -> pa.Table:
            try:
                return pa.concat_tables(part.result() for part in begun)
            except BrokenProcessPool:
                self._replace(pool)
                raise

        return rows

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        """A process died at a unit; the next attempt must find a whole pool."""
        with self._lock:
            if self._pool is broken:
                self._pool = self._start()

    def table(self, graphs: Graphs, first_id: int) -> pa.Table:
        """Return the scored rows of a unit."""
        return self.begin(graphs, first_id)().combine_chunks()


def to_shard(parts: Sequence[pa.Table], footer: Mapping[str, Any]) -> tuple[bytes, dict[str, Any], int]:
    """Return (Parquet bytes, statistics for the commit record, rows) of a unit's rows, in order."""
    table = pa.concat_tables(parts).combine_chunks()
    return to_parquet(table, footer), unit_stats(table), table.num_rows


def to_parquet(table: pa.Table, footer: Mapping[str, Any]) -> bytes:
    """Return `table` as Parquet with `footer` as JSON under the key `bitdgdm` (law L4)."""
    metadata = {**(table.schema.metadata or {}), b"bitdgdm": json.dumps(footer, sort_keys=True).encode()}
    text = {"smiles", "inchikey"}  # nearly unique: a dictionary would only cost
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        buffer,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=[name for name in table.column_names if name not in text],
        write_page_index=True,
        sorting_columns=[pq.SortingColumn(table.column_names.index("sample_id"))],
    )
    return buffer.getvalue()
