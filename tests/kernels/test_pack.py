"""Run: .venv/bin/python -m pytest tests/kernels/test_pack.py -q"""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.kernels.graphs import layout
from bitdgdm.kernels.pack import from_tiles, pack_weight, to_tiles


def test_weights_lie_as_the_matrix_instruction_reads_its_b_operand() -> None:
    w = torch.randn(48, 32).bfloat16().float()
    packed = pack_weight(w)
    for k, n, lane in np.ndindex(2, 3, 32):
        g, inside = divmod(lane, 4)
        for h in (0, 1):
            for s in (0, 1):
                want = w[16 * n + 8 * h + g, 16 * k + 8 * s + 2 * inside :][:2]
                assert torch.equal(packed[k, n, lane, (2 * h + s) * 2 :][:2].float(), want)


def test_rows_lie_as_the_matrix_instruction_reads_its_a_operand() -> None:
    x = torch.randn(32, 48).bfloat16().float()
    tiles = to_tiles(x)
    for t, k, lane in np.ndindex(2, 3, 32):
        r, inside = divmod(lane, 4)
        for register in range(4):
            row, channel = 16 * t + r + 8 * (register % 2), 16 * k + 8 * (register // 2) + 2 * inside
            assert torch.equal(tiles[t, k, lane, 2 * register :][:2].float(), x[row, channel : channel + 2])
    assert torch.equal(from_tiles(tiles).float(), x)


def test_padding_of_a_packed_weight_is_zero() -> None:
    packed = pack_weight(torch.ones(5, 12), rows=16, cols=16)
    assert packed.shape == (1, 1, 32, 8) and float(packed.float().sum()) == 60


@given(n=st.lists(st.integers(1, 9), min_size=1, max_size=60), blocks=st.integers(1, 7))
def test_every_real_pair_has_one_place_and_every_block_a_share(n: list[int], blocks: int) -> None:
    at = layout(torch.tensor(n), 9, blocks, torch.device("cpu"))
    rows, start, graphs = at.rows.numpy(), at.tile_start.numpy(), at.graphs.numpy()
    real = rows[: at.n_rows]
    assert sorted(map(tuple, real[:, [0, 3]])) == [(b, i) for b in range(len(n)) for i in range(n[b])]
    assert (np.arange(at.n_rows) == graphs[real[:, 0], 0] + real[:, 3]).all()
    assert (graphs[:, 1] == n).all() and (real[:, 2] == np.array(n)[real[:, 0]]).all()
    per_tile = np.diff(start)
    assert (per_tile >= rows[:, 2].reshape(-1, 16).max(1)).all()
    assert at.m_tiles == start[-1] == len(at.tile_of)
    shares = at.block_tile.numpy()
    assert shares[0] == 0 and shares[-1] == at.tiles and (np.diff(shares) >= 0).all()
