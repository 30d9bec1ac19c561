"""Which GPUs have room for the kernels: shared memory of a block, device memory of a batch.

Guarantees: estimates are upper bounds, so what is said to fit does; a refusal names the kernel, what it needs and what
the GPU has.
Knows nothing of: launches, what is free on a device at the moment.
"""

from bitdgdm.kernels.denoise import (
    GRAPH_SHARED,
    NODE_TILE,
    attend_shared,
    attend_steps,
    node_tiles,
    pool_block,
)  # fmt: skip
from bitdgdm.kernels.features import features_shared
from bitdgdm.kernels.network import Shape

OLDEST = (8, 0)  # bf16 mma.sync and cp.async


def defines(shape: Shape, shared_bytes: int) -> dict[str, dict[str, int]]:
    """Macros of every source for a network's shape on a GPU whose blocks may use so much shared memory."""
    found = {**shape.defines, "edge_attend": {"STEPS": attend_steps(shared_bytes)}}
    rows = shape.n_pad if shape.n_pad <= 32 else 1  # more nodes: columns are in shared memory
    found["features"] = {**found.get("features", {}), "ROWS": rows}
    found["node"] = {**found.get("node", {}), "NODE_TILES": node_tiles(shared_bytes)}
    return found


def supports(shape: Shape, capability: tuple[int, int], shared_bytes: int) -> tuple[bool, str]:
    """Whether a GPU can run the kernels of a shape, and why not.

    capability: (8, 9) for sm_89; shared_bytes: the most that a block may use there.
    """
    arch = f"sm_{capability[0]}{capability[1]}"
    if capability < OLDEST:
        return False, f"the GPU is {arch}, they need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    needs = {
        "features": features_shared(shape.n_pad)[1],
        "edge_attend": attend_shared(1),
        "node": 4 * NODE_TILE,
        "graph_path": max(GRAPH_SHARED, pool_block(shape.n_pad, shared_bytes)[3]),
    }
    for kernel, need in needs.items():
        if need > shared_bytes:
            return False, f"{kernel} needs {need} bytes of shared memory a block, {arch} has {shared_bytes}"
    return True, ""


def bytes_per_graph(shape: Shape) -> int:
    """Device memory that a graph of n_pad nodes adds to a batch, at most: buffers, index tables, the chain's own state."""
    n, in_ks = shape.n_pad, -(-shape.channels_x // 16)
    row = 3 * 512 + 1024 + 32 * in_ks + 16 + 1  # X, q, gathered; keys and values; input; index; class
    pair = 2 * 128 + 1 + 1  # E and E1; index; class
    graph = 32 + 2 * shape.dy + 2048 + 48  # input of y, y, FiLM, sizes and id
    graph += max(0, 2560 - 1024 * n)  # pooled rows, where they don't fit in the place of keys and values
    chain = 3 * 8 * (n + n * n)  # classes as int64, and two temporaries while they are drawn
    return n * row + n * n * pair + graph + chain


def batch_that_fits(shape: Shape, free_bytes: int, captured_bytes: int = 64 << 20) -> int:
    """Graphs for which `free_bytes` of device memory are enough. captured_bytes: set aside for the captured step."""
    return max(0, free_bytes - captured_bytes) // bytes_per_graph(shape)
