"""Products of integer codes, exact on any unit.

Guarantees: every partial sum is an integer that float32 (or int32) holds, so the order of summation, the batch and
the device don't matter; the result is rounded once, if it exceeds 2^24.
Knows nothing of: scales and what the integers stand for.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 2**24
"""float32 holds every integer up to here: a product with partial sums below it is exact in any order."""

SHORTEST_INT8 = 8
"""Inner length from which the library's int8 product is used; PyTorch 2.13 gets it wrong for length 1."""


def exact_product(q: Tensor, weight_codes: Tensor, act_top: int, weight_top: int) -> Tensor:
    """q codes^T, integers as float32[M, N], rounded once if a sum exceeds 2^24.

    q: integers as float32[M, K], at most act_top in size; weight_codes: integers as float32[N, K], at most weight_top
    (the negative end of two's complement).
    """
    narrow = act_top <= 127 and weight_top <= 128
    if q.device.type == "cpu" and q.shape[1] >= SHORTEST_INT8 and narrow and _int8_is_exact():
        return torch._int_mm(q.to(torch.int8), weight_codes.to(torch.int8).T).to(torch.float32)
    chunk = (EXACT - 1) // (act_top * weight_top)
    if q.shape[1] <= chunk:
        return F.linear(q, weight_codes)
    pieces = zip(q.split(chunk, dim=1), weight_codes.split(chunk, dim=1), strict=True)
    total = torch.zeros(q.shape[0], weight_codes.shape[0], dtype=torch.float64, device=q.device)
    for q_piece, w_piece in pieces:
        total += F.linear(q_piece, w_piece)
    return total.to(torch.float32)


@functools.cache
def _int8_is_exact() -> bool:
    """Whether this CPU multiplies int8 into int32 in one instruction (VNNI): a third of the time of float32.

    Without it the library's product may saturate or loop. Its interface is private, so it is tried out first.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported() or not torch.backends.mkldnn.is_available():
        return False
    for m, k, n in ((1, SHORTEST_INT8, 2), (33, 64, 17), (3, 257, 1), (2, 2048, 5)):
        q = (torch.arange(m * k) * 37 % 255 - 127).view(m, k)
        w = (torch.arange(n * k) * 101 % 256 - 128).view(n, k)
        q[-1], w[-1] = 127, -128
        if not torch.equal(torch._int_mm(q.to(torch.int8), w.to(torch.int8).T).long(), q @ w.T):
            return False
    return True
