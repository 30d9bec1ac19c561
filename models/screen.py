"""Which patterns can't be in a molecule, by counts of its atoms and bonds alone.

Guarantees: no pattern that matches is ever ruled out. A match maps the atoms (bonds) of a pattern to different atoms
(bonds) of the molecule, so for any set S of kinds a molecule holds at least as many of S as the pattern has atoms that
can be nothing but S; it has a bond for every bond of the pattern, two neighbouring bonds for every such two; and no fewer
independent rings. Kinds of an atom are its element and whether it is aromatic, of a bond its type; what a query says
beyond that is not used.
Knows nothing of: which patterns, what a match means.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

Kinds = frozenset[int]
_ATOMS: Kinds = frozenset(z + 1000 * aromatic for z in range(119) for aromatic in (0, 1))
_BONDS: Kinds = frozenset(int(kind) for kind in Chem.BondType.values)
_IS = re.compile(r"(Atom(?:AtomicNum|Type)|BondOrder) (\d+) = val$")
_LARGEST = 1000 + 119


def _leaf(text: str, everything: Kinds) -> Kinds:
    found = _IS.match(text)
    if found is None:
        return everything
    name, value = found[1], int(found[2])
    return frozenset({value, value + 1000}) if name == "AtomAtomicNum" else frozenset({value})


def _allowed(description: str, everything: Kinds) -> Kinds:
    """What a query lets through at most. description: of RDKit's DescribeQuery, children two blanks further in."""
    lines = [line for line in description.splitlines() if line.strip()]

    def read(at: int, depth: int) -> tuple[Kinds, int]:
        text, children, next_at = lines[at].strip(), [], at + 1
        while next_at < len(lines) and len(lines[next_at]) - len(lines[next_at].lstrip()) > depth:
            child, next_at = read(next_at, len(lines[next_at]) - len(lines[next_at].lstrip()))
            children.append(child)
        if text in ("AtomAnd", "BondAnd") and children:
            return everything.intersection(*children), next_at
        if text in ("AtomOr", "BondOr") and children:
            return frozenset().union(*children), next_at
        return (everything if children else _leaf(text, everything)), next_at

    return read(0, 0)[0] if lines else everything


def _of_pattern(
    items: Sequence[Chem.Atom] | Sequence[Chem.Bond], everything: Kinds, plain: Callable[..., Kinds]
) -> list[Kinds]:
    return [_allowed(i.DescribeQuery(), everything) if i.HasQuery() else plain(i) for i in items]


def _plain_atom(atom: Chem.Atom) -> Kinds:
    z = atom.GetAtomicNum()
    return frozenset({z, z + 1000}) if z else _ATOMS


Path = tuple[Kinds, ...]  # atom, bond, atom, ...


class Screen:
    """Patterns, and what a molecule must hold at least for each."""

    def __init__(self, patterns: Sequence[Chem.Mol | None]) -> None:
        """patterns: None is never ruled out."""
        owned = [(i, part) for i, p in enumerate(patterns) for part in (_alternatives(p) if p else [None])]
        self._owner, patterns = np.array([i for i, _ in owned], np.int64), [part for _, part in owned]
        atoms = [_of_pattern(p.GetAtoms(), _ATOMS, _plain_atom) if p else [] for p in patterns]
        bonds = [_of_pattern(p.GetBonds(), _BONDS, lambda _: _BONDS) if p else [] for p in patterns]
        self._atom_sets, atoms_needed = _needs(atoms, _ATOMS, _LARGEST)
        self._bond_sets, bonds_needed = _needs(bonds, _BONDS, max(_BONDS) + 1)
        rings = np.array([_rings(p) if p else 0 for p in patterns], np.int32)
        needed = np.concatenate((atoms_needed, bonds_needed, rings[:, None]), axis=1)
        # for every count of everything that is counted, the patterns (bits) that need no more
        self._enough = [
            [_bits(column <= there) for there in range(int(column.max()) + 1)] for column in needed.T
        ]
        ends = [
            [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in p.GetBonds()] if p else [] for p in patterns
        ]
        paths = [set(_paths(e, a, b)) for e, a, b in zip(ends, atoms, bonds, strict=True)]
        self._paths: list[Path] = sorted(
            set().union(*paths), key=lambda path: [sorted(kinds) for kinds in path]
        )
        needed = np.zeros((len(patterns), -(-len(self._paths) // 64) * 64), np.bool_)
        for row, has in zip(needed, paths, strict=True):
            row[: len(self._paths)] = [path in has for path in self._paths]
        self._path_needed = np.packbits(needed, axis=1).view(np.uint64)
        self._fits: dict[
            tuple[int, ...], NDArray[np.uint64]
        ] = {}  # the paths that a molecule's path may stand for

    def possible(self, molecule: Chem.Mol) -> list[int]:
        """Return the numbers of the patterns that aren't ruled out, in order."""
        atoms = [molecule.GetAtomWithIdx(i) for i in range(molecule.GetNumAtoms())]
        bonds = [molecule.GetBondWithIdx(i) for i in range(molecule.GetNumBonds())]
        kinds = [a.GetAtomicNum() + 1000 * a.GetIsAromatic() for a in atoms]
        orders = [int(b.GetBondType()) for b in bonds]
        counts = [*self._atom_sets[:, kinds].sum(1).tolist(), *self._bond_sets[:, orders].sum(1).tolist()]
        bits = -1
        for enough, there in zip(self._enough, [*counts, _rings(molecule)], strict=True):
            if there < len(enough):
                bits &= enough[there]
        left = np.array([i for i in range(len(self._owner)) if bits >> i & 1], np.int64)
        found = np.zeros(self._path_needed.shape[1], np.uint64)
        ends = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in bonds]
        for path in set(_paths(ends, kinds, orders)):
            found |= self._fit(path)
        return np.unique(self._owner[left[~(self._path_needed[left] & ~found).any(1)]]).tolist()

    def _fit(self, path: tuple[int, ...]) -> NDArray[np.uint64]:
        """Bits of the paths that the molecule's path, read in one of its two directions, may match."""
        if path not in self._fits:
            fits = np.zeros(self._path_needed.shape[1] * 64, np.bool_)
            fits[: len(self._paths)] = [
                len(p) == len(path) and (_matches(p, path) or _matches(p, path[::-1])) for p in self._paths
            ]
            self._fits[path] = np.packbits(fits).view(np.uint64)
        return self._fits[path]


def _bits(flags: NDArray[np.bool_]) -> int:
    return sum(1 << i for i, flag in enumerate(flags.tolist()) if flag)


def _matches(pattern: Path, path: tuple[int, ...]) -> bool:
    return all(kind in kinds for kind, kinds in zip(path, pattern, strict=True))


def _paths(
    ends: Sequence[tuple[int, int]], atoms: Sequence[Any], bonds: Sequence[Any]
) -> Iterator[tuple[Any, ...]]:
    """Every bond with its ends, and every two bonds at an atom, as their kinds; one direction of each."""
    at: list[list[tuple[Any, Any]]] = [[] for _ in atoms]
    for (i, j), kind in zip(ends, bonds, strict=True):
        yield atoms[i], kind, atoms[j]
        at[i].append((kind, atoms[j]))
        at[j].append((kind, atoms[i]))
    for middle, around in zip(atoms, at, strict=True):
        for (first, end), (second, other) in combinations(around, 2):
            yield end, first, middle, second, other


def _alternatives(pattern: Chem.Mol) -> list[Chem.Mol]:
    """A pattern of one atom that begins one of several others, [$(A),$(B)], as these; any other as it is."""
    text, parts, depth = Chem.MolToSmarts(pattern), [""], 0
    if pattern.GetNumAtoms() != 1 or not (text.startswith("[") and text.endswith("]")):
        return [pattern]
    for c in text[1:-1]:
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    found = [Chem.MolFromSmarts(part[2:-1]) for part in parts if _is_recursive(part)]
    return found if len(found) == len(parts) and None not in found else [pattern]


def _is_recursive(text: str) -> bool:
    """Whether the text is one $(...) from end to end."""
    depths = list(accumulate((c == "(") - (c == ")") for c in text))
    return text.startswith("$(") and text.endswith(")") and 0 not in depths[1:-1]


def _rings(molecule: Chem.Mol) -> int:
    """Independent rings: a part of a graph never has more than the whole."""
    return molecule.GetNumBonds() - molecule.GetNumAtoms() + len(Chem.GetMolFrags(molecule))


def _needs(
    patterns: Sequence[Sequence[Kinds]], everything: Kinds, width: int
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """The sets that occur as bool[sets, width], and int32[patterns, sets]: members that can be nothing but the set."""
    sets = sorted({kinds for p in patterns for kinds in p} | {everything}, key=sorted)
    holds = np.zeros((len(sets), width), np.bool_)
    for row, kinds in zip(holds, sets, strict=True):
        row[sorted(kinds)] = True
    inside = {kinds: np.array([kinds <= s for s in sets], np.int32) for kinds in sets}
    needed = [sum((inside[kinds] for kinds in p), np.zeros(len(sets), np.int32)) for p in patterns]
    return holds, np.array(needed, np.int32).reshape(len(patterns), len(sets))
