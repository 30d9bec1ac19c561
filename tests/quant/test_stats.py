"""Run: .venv/bin/python -m pytest tests/quant/test_stats.py"""

import dataclasses

import numpy as np
import pytest
import torch

from bitdgdm.quant.stats import stats_of_rows


def rows(m=20, width=6):
    rng = np.random.default_rng(m)
    return torch.from_numpy(rng.standard_normal((m, width))), torch.from_numpy(rng.integers(1, 51, m))


def test_statistics_are_those_of_the_rows():
    sample, time = rows()
    stats = stats_of_rows(sample, time, 50)
    wide = sample.numpy()
    assert np.allclose(
        stats.second_moment.numpy(), np.mean([np.outer(x, x) for x in wide], axis=0), rtol=1e-5
    )
    assert np.allclose(stats.absmax.numpy(), np.abs(wide).max(axis=0))
    assert (stats.rows, stats.width) == (20, 6)


@pytest.mark.parametrize(
    "change",
    [{"absmax": torch.zeros(5)}, {"second_moment": torch.zeros(6, 5)}, {"time": torch.ones(3, dtype=torch.int64)},
     {"time": torch.zeros(20, dtype=torch.int64)}, {"diffusion_steps": 3}],
)  # fmt: skip
def test_statistics_that_contradict_each_other_are_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(stats_of_rows(*rows(), 50), **change)
