"""Run: .venv/bin/python -m pytest tests/models/test_philox.py -q"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.models.philox import count_slot, edge_slots, node_slots, philox, philox4x32

WORD = st.integers(0, 2**32 - 1)

# Random123 1.14.0, tests/kat_vectors, rows "philox4x32 10": counter, key, output
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000   6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff   408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0   d16cfe09 94fdcceb 5001e420 24126ea1
"""


def by_the_paper(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for r in range(10):
        if r:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
    return c


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_the_published_known_answers_are_reproduced(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    counter = [torch.tensor(word) for word in words[:4]]
    assert [int(w) for w in philox4x32(counter, (words[4], words[5]))] == words[6:]


@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.lists(WORD, min_size=2, max_size=2))
def test_any_counter_and_key_agree_with_unbounded_integers(counter: list[int], key: list[int]) -> None:
    out = philox4x32([torch.tensor([c]) for c in counter], (key[0], key[1]))
    assert [int(w) for w in out] == by_the_paper(counter, key)


@given(seed=st.integers(0, 2**64 - 1), sample=st.integers(0, 2**63 - 1), step=WORD, slot=WORD)
def test_a_draw_is_the_top_24_bits_of_the_block_of_its_four_keys(
    seed: int, sample: int, step: int, slot: int
) -> None:
    u = philox(seed, torch.tensor([sample]), step, torch.tensor([slot]))
    word = by_the_paper([sample % 2**32, sample >> 32, step, slot], [seed % 2**32, seed >> 32])[0]
    assert u.dtype == torch.float32
    assert float(u) == ((word >> 8) + 1) / 2**24
    assert 0 < float(u) <= 1


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in() -> None:
    ids, slots = torch.arange(100)[:, None], torch.arange(45)[None, :]
    together = philox(7, ids, 3, slots)
    for i, slot in [(0, 0), (41, 13), (99, 44)]:
        assert float(philox(7, torch.tensor([i]), 3, torch.tensor([slot]))) == float(together[i, slot])
    assert torch.equal(together[:, 5], philox(7, ids[:, 0], torch.full((100,), 3), torch.tensor(5)))


@pytest.mark.parametrize("n_pad", [2, 9, 27])
def test_slots_of_nodes_edges_and_the_count_never_meet(n_pad: int) -> None:
    rows, cols = torch.triu_indices(n_pad, n_pad, 1)
    slots = [*node_slots(n_pad).tolist(), *edge_slots(n_pad, rows, cols).tolist(), count_slot(n_pad)]
    assert len(set(slots)) == len(slots) == n_pad + n_pad * (n_pad - 1) // 2 + 1
    assert max(slots) == count_slot(n_pad)


def test_draws_are_uniform_and_neighbouring_keys_are_uncorrelated() -> None:
    ids, slots = torch.arange(4000)[:, None], torch.arange(50)[None, :]
    u = philox(2024, ids, 17, slots).double().numpy()
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi2 = float(((counts - u.size / 100) ** 2 / (u.size / 100)).sum())
    assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, standard deviation 14
    other_step = philox(2024, ids, 18, slots).double().numpy()
    other_seed = philox(2025, ids, 17, slots).double().numpy()
    views = [u[:-1], u[1:], np.roll(u, 1, axis=1)[:-1], other_step[:-1], other_seed[:-1]]
    for a, b in itertools.combinations(views, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        philox(seed, torch.tensor([0]), 0, torch.tensor([0]))
