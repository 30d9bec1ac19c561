"""Graphs to SMILES on all cores, while a GPU makes the next ones.

Guarantees: importing it starts neither torch nor CUDA; SMILES come back in the order of the graphs, None if invalid.
Knows nothing of: how graphs are made.
"""

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
from rdkit import RDLogger

from bitdgdm.models.decode import decode
from bitdgdm.models.digress_config import DigressConfig

RDLogger.DisableLog("rdApp.*")  # invalid molecules are counted, not told
CHUNK = 256
Smiles = list[str | None]


def _decode(config: DigressConfig, n: np.ndarray, x: np.ndarray, e: np.ndarray) -> Smiles:
    found: Smiles = []
    for size, atoms, bonds in zip(n.tolist(), x.tolist(), e.tolist(), strict=True):
        found.append(decode(atoms[:size], [row[:size] for row in bonds[:size]], config).smiles)
    return found


class DecodePool:
    """As many processes as there are cores, less one."""

    def __init__(self, config: DigressConfig) -> None:
        self.size = max(1, (os.cpu_count() or 2) - 1)
        self._config = config
        self._pool = ProcessPoolExecutor(self.size, multiprocessing.get_context("spawn"))

    def warm_up(self) -> None:
        """Wait until every process has imported what it needs."""
        one = np.ones(CHUNK, np.int64), np.zeros((CHUNK, 2), np.int8), np.zeros((CHUNK, 2, 2), np.int8)
        for done in [self._pool.submit(_decode, self._config, *one) for _ in range(4 * self.size)]:
            done.result()

    def submit(self, n: np.ndarray, x: np.ndarray, e: np.ndarray) -> list[Future[Smiles]]:
        """Hand graphs over; returns at once."""
        starts = range(0, len(n), CHUNK)
        return [self._pool.submit(_decode, self._config, *(a[i : i + CHUNK] for a in (n, x, e))) for i in starts]

    def close(self) -> None:
        self._pool.shutdown()
