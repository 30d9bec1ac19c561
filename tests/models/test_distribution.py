"""Run: .venv/bin/python -m pytest tests/models/test_distribution.py

Distances between sets of molecules, against SciPy, MOSES' formulas written down again, brute force and the package fcd.
"""

import math
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rdkit import Chem, DataStructs
from rdkit.Chem import AllChem
from rdkit.Chem.Scaffolds import MurckoScaffold

from bitdgdm.models.distribution import (
    FCD_REPEATS,
    cosine_of_counts,
    distances,
    frechet,
    mean_with_interval,
    nearest_similarity,
    resamples,
    share,
    wasserstein,
    wilson,
)
from bitdgdm.models.profile import Profile, fcd_version, load_profile, profile, save_profile

SMILES = (
    "C1=CC2NC23C=CC1C3", "O=C1C2OC3C=CN1C32", "CC(=O)OCC1CC1", "CCOC(=O)CN", "C#Cc1ccc(C)[nH]1", "CC12CC1C1OC12",
    "OCC1CC2CC12", "CN1CC2CC1C2", "c1ccc2occc2c1", "CC(C)(C)C#N", "NC(=O)C1CC1", "C1CC2OC2C1", "FC1CC1C=O",
)  # fmt: skip
needs_fcd = pytest.mark.skipif(fcd_version() is None, reason="needs the package fcd: pip install fcd")
rng = np.random.default_rng(5)


@pytest.fixture(scope="module")
def both() -> tuple[Profile, Profile]:
    ours = [SMILES[i] for i in rng.integers(0, 8, 40)]
    return profile(ours), profile(SMILES)


@given(
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 50)),
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 50)),
)
def test_the_distance_of_two_samples_is_scipys_also_with_ties(ours: np.ndarray, theirs: np.ndarray) -> None:
    value, _ = wasserstein(ours, theirs, resamples(len(ours), 2))
    assert value == pytest.approx(scipy.stats.wasserstein_distance(ours, theirs), abs=1e-7)


def test_a_bootstrap_repeat_is_the_distance_of_the_sample_that_was_drawn() -> None:
    ours, theirs = rng.normal(size=60), rng.normal(size=80) + 0.3
    drawn = resamples(60, 200, seed=3)
    brute = [scipy.stats.wasserstein_distance(np.repeat(ours, w.astype(int)), theirs) for w in drawn]
    assert wasserstein(ours, theirs, drawn)[1] == pytest.approx(np.std(brute, ddof=1), rel=1e-9)


def test_every_bootstrap_repeat_draws_as_many_as_there_are_and_a_seed_repeats_them() -> None:
    drawn = resamples(37, 50, seed=1)
    assert drawn.shape == (50, 37) and (drawn.sum(1) == 37).all() and drawn.std() > 0.5
    assert (drawn == resamples(37, 50, seed=1)).all() and (drawn != resamples(37, 50, seed=2)).any()


def moses_scaffolds(smiles: list[str]) -> Counter[str]:
    """metrics.compute_scaffolds of MOSES."""
    found: Counter[str] = Counter()
    for s in smiles:
        scaffold = MurckoScaffold.GetScaffoldForMol(Chem.MolFromSmiles(s))
        text = Chem.MolToSmiles(scaffold)
        if text and scaffold.GetRingInfo().NumRings() >= 2:
            found[text] += 1
    return found


def moses_fragments(smiles: list[str]) -> Counter[str]:
    """metrics.compute_fragments of MOSES."""
    found: Counter[str] = Counter()
    for s in smiles:
        found.update(Chem.MolToSmiles(AllChem.FragmentOnBRICSBonds(Chem.MolFromSmiles(s))).split("."))
    return found


def moses_cosine(a: Counter[str], b: Counter[str]) -> float:
    keys = sorted({*a, *b})
    return 1 - scipy.spatial.distance.cosine([a[k] for k in keys], [b[k] for k in keys])


def test_similarities_are_those_of_moses(both: tuple[Profile, Profile]) -> None:
    found = {m.metric: m for m in distances(*both)}
    ours, theirs = list(both[0].smiles), list(both[1].smiles)
    assert found["scaffold similarity"].value == pytest.approx(
        moses_cosine(moses_scaffolds(ours), moses_scaffolds(theirs))
    )
    assert found["fragment similarity"].value == pytest.approx(
        moses_cosine(moses_fragments(ours), moses_fragments(theirs))
    )
    prints = {
        s: AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles(s), 2, 1024) for s in {*ours, *theirs}
    }
    nearest = [max(DataStructs.TanimotoSimilarity(prints[a], prints[b]) for b in theirs) for a in ours]
    assert found["similarity to nearest (SNN)"].value == pytest.approx(np.mean(nearest))


def test_the_bootstrap_of_a_similarity_counts_the_molecules_that_were_drawn() -> None:
    ours, theirs = [("a", "b"), ("a",), (), ("c", "c")], [("a", "c"), ("b",)]
    drawn = resamples(4, 100, seed=2)
    there = Counter(t for things in theirs for t in things)
    brute = []
    for weights in drawn:
        here = Counter(
            t for things, w in zip(ours, weights, strict=True) for _ in range(int(w)) for t in things
        )
        if here:
            brute.append(moses_cosine(here, there))
    assert cosine_of_counts(ours, theirs, drawn)[1] == pytest.approx(np.std(brute, ddof=1), rel=1e-9)


def test_two_sets_of_which_one_has_no_scaffold_have_no_similarity_of_scaffolds() -> None:
    chains, rings = profile(["CCO", "CCC"], features=False), profile(list(SMILES), features=False)
    assert "scaffold similarity" not in {m.metric for m in distances(chains, rings)}
    assert math.isnan(cosine_of_counts([(), ()], [("a",)], resamples(2, 3))[0])


def test_a_set_compared_with_itself_is_at_distance_zero_and_similarity_one(
    both: tuple[Profile, Profile],
) -> None:
    for m in distances(both[1], both[1]):
        assert m.value == pytest.approx(1.0 if "similarity" in m.metric else 0.0, abs=2e-5), m.metric


def test_no_molecules_have_no_distance(both: tuple[Profile, Profile]) -> None:
    assert distances(profile([]), both[1]) == []


def test_the_frechet_distance_is_that_of_the_formula_with_a_general_matrix_root() -> None:
    x, y = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(150, 12)) + 0.5
    c1, c2, m = np.cov(x.T), np.cov(y.T), x.mean(0) - y.mean(0)
    expected = m @ m + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    drawn = resamples(200, 30, seed=4)
    value, spread = frechet(x, y, drawn)
    assert value == pytest.approx(expected, rel=1e-9)
    brute = []
    for weights in drawn:
        z = np.repeat(x, weights.astype(int), axis=0)
        c, d = np.cov(z.T), z.mean(0) - y.mean(0)
        brute.append(d @ d + np.trace(c + c2 - 2 * scipy.linalg.sqrtm(c @ c2).real))
    assert spread == pytest.approx(np.std(brute, ddof=1), rel=1e-6)


@needs_fcd
def test_the_distance_is_that_of_the_package_fcd(both: tuple[Profile, Profile]) -> None:
    import fcd
    from fcd.utils import SmilesDataset

    ours, theirs = both
    network = fcd.load_ref_model()
    import torch

    for p in both:
        encoded = np.stack([SmilesDataset(list(p.smiles))[i] for i in range(len(p))])
        alone = network(torch.from_numpy(encoded[3:4]).transpose(1, 2).float()).detach().numpy()[0]
        assert p.features is not None and np.abs(alone - p.features[3]).max() < 1e-5
    assert ours.features is not None and theirs.features is not None
    moments = [(f.mean(0), np.cov(f.T)) for f in (ours.features.astype(float), theirs.features.astype(float))]
    published = fcd.calculate_frechet_distance(moments[0][0], moments[0][1], moments[1][0], moments[1][1])
    found = next(m for m in distances(ours, theirs) if m.metric == "FCD")
    assert found.value == pytest.approx(published, rel=0.02)  # its root of a singular matrix is inexact
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert FCD_REPEATS > 1


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).exponential(size=80)
        _, low, high = mean_with_interval(sample, seed, repeats=300)
        held += low <= 1.0 <= high
    assert 175 <= held <= 199


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_solves_its_equation(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    p = hits / n
    for bound in wilson(hits, n):
        if 1e-12 < bound < 1 - 1e-12:
            assert abs(p - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / n), abs=1e-7
            )
    assert share("x", hits, n).value == pytest.approx(100 * p)


def test_a_profile_has_a_row_a_molecule_in_order_whoever_computes_it() -> None:
    few = [SMILES[2], SMILES[0], SMILES[2]]
    one = profile(few, features=False)
    assert one.smiles == tuple(few) and (one.properties[0] == one.properties[2]).all()
    assert one.scaffolds[0] is None and one.scaffolds[1] is not None
    many = [
        f"{'C' * (i % 9 + 1)}{s}"
        for i in range(30)
        for s in ("O", "N", "F", "C#N", "C=O", "OC", "NC", "C", "C=C", "CO")
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        shared = profile(many, features=False, pool=pool)
    alone = profile(many, features=False)
    assert shared.smiles == alone.smiles and shared.fragments == alone.fragments
    assert (shared.properties == alone.properties).all() and (shared.bits == alone.bits).all()


def test_text_that_is_no_molecule_is_refused() -> None:
    with pytest.raises(ValueError, match="no molecule"):
        profile(["C1CC"], features=False)


def test_a_stored_profile_comes_back_whole_and_only_for_its_own_molecules(
    both: tuple[Profile, Profile], tmp_path: Path
) -> None:
    path = tmp_path / "kept" / "reference.parquet"
    assert load_profile(path, SMILES) is None
    save_profile(path, both[1])
    back = load_profile(path, SMILES)
    assert back is not None and back.smiles == both[1].smiles and back.fragments == both[1].fragments
    assert back.scaffolds == both[1].scaffolds and (back.properties == both[1].properties).all()
    assert (back.bits == both[1].bits).all()
    if both[1].features is not None:
        assert back.features is not None and (back.features == both[1].features).all()
    assert load_profile(path, SMILES[::-1]) is None
    path.write_bytes(path.read_bytes()[:-20])
    assert load_profile(path, SMILES) is None


def test_no_fingerprint_is_at_similarity_zero_to_another() -> None:
    nothing, one = np.zeros((1, 128), np.uint8), np.full((1, 128), 255, np.uint8)
    assert nearest_similarity(nothing, one).tolist() == [0.0]
    assert nearest_similarity(one, one).tolist() == [1.0]
