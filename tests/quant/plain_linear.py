"""The formula of every recipe in NumPy float64, written from the documented layout and not from the code under test.

Activation codes are computed in float32 as documented (every line one operation), integer products in int64,
everything else in float64. `expected` returns y and a bound of what float32 may lose.
"""

import numpy as np

ONE = np.float32(1)
TINY = np.finfo(np.float32).tiny


def raw(tensor):
    """float64 or integer array of any stored type."""
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy().astype(np.int64)


def unpacked(octets, bits, width):
    """int64[rows, width] from a stream of bits, lowest first, in two's complement; one bit is -1 or 1."""
    stream = np.unpackbits(octets.numpy(), axis=1, bitorder="little")[:, : width * bits]
    unsigned = (stream.reshape(len(stream), width, bits) << np.arange(bits)).sum(axis=2).astype(np.int64)
    return (
        2 * unsigned - 1 if bits == 1 else np.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned)
    )


def e4m3(octets):
    """float64 values of e4m3 bytes: sign, four exponent bits with bias 7, three of mantissa, no infinity."""
    b = octets.numpy().astype(np.int64)
    exponent, mantissa = (b >> 3) & 15, (b & 7) / 8
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    return np.where(b & 128, -size, size)


def round_to_e4m3(v):
    """Nearest e4m3 value, ties to even, saturated at 448."""
    size = np.minimum(np.abs(v.astype(np.float64)), 448)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(size)), -6)
    step = 2.0 ** (exponent - 3)
    return np.sign(v) * np.minimum(np.rint(size / step) * step, 448)


def main_codes(parts):
    """(codes, scale) of D: int64 or float64[out, in], and float64[out, in]."""
    rows, width = parts.shape
    q = parts.qweight
    if parts.book is not None:
        index = unpacked(q, parts.bits, width) + 2 ** (parts.bits - 1)
        return np.take_along_axis(raw(parts.book), index, axis=1), np.ones(parts.shape)
    if str(q.dtype) == "torch.uint8":
        codes = unpacked(q, parts.bits, width)
    elif "float8" in str(q.dtype):
        import torch

        codes = e4m3(q.view(torch.uint8))
    else:
        codes = raw(q)
    if parts.scale is None:
        return codes, np.ones(parts.shape)
    scale = raw(parts.scale).reshape(rows, -1)
    if parts.group:
        return codes, np.stack([scale[:, j // parts.group] for j in range(width)], axis=1)
    return codes, np.broadcast_to(scale, parts.shape)


def factor(stored, scale):
    """(codes [n, R], scale [R]); codes are integers if there is a scale."""
    if scale is None:
        return raw(stored), np.ones(stored.shape[1])
    codes = unpacked(stored, 4, len(scale)) if str(stored.dtype) == "torch.uint8" else raw(stored)
    return codes, raw(scale)


def sparse_of(parts):
    s = np.zeros(parts.shape)
    if parts.sparse_index is not None:
        rows, columns = np.divmod(raw(parts.sparse_index), parts.shape[1])
        s[rows, columns] = raw(parts.sparse_value)
    return s


def low_rank_of(parts):
    if parts.proj_up is None:
        return np.zeros(parts.shape)
    (up, up_scale), (down, down_scale) = (
        factor(parts.proj_up, parts.proj_up_scale),
        factor(parts.proj_down, parts.proj_down_scale),
    )
    return (up * up_scale) @ (down * down_scale).T


def hadamard_matrix(width):
    """T with rows in Sylvester's order, blocks of the largest power of two that divides the width, signs in front."""
    block = 1
    while width % (2 * block) == 0:
        block *= 2
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    signs = []
    for channel in range(1, width + 1):
        v = channel * 2654435761 % 2**32
        v = (v ^ (v >> 15)) * 2246822519 % 2**32
        signs.append(1 - 2 * ((v >> 13) & 1))
    return np.kron(np.eye(width // block), h / np.sqrt(block)) @ np.diag(signs)


def duquant_matrix(permutation, swaps, width):
    """T as a product of permutations and block rotations; a greedy step E R E spreads one channel over its block."""
    total = np.eye(width)
    for order, chosen in zip(raw(permutation), raw(swaps), strict=True):
        block = width // len(chosen)
        spreading = np.zeros((block, block))
        spreading[0] = 1
        for k in range(1, block):
            spreading[k, :k], spreading[k, k] = 1, -k
        spreading /= np.linalg.norm(spreading, axis=1, keepdims=True)
        rotation = np.zeros((width, width))
        for b, steps in enumerate(chosen):
            product = np.eye(block)
            for step in steps:
                if step < block:
                    swap = np.eye(block)
                    swap[[0, step]] = swap[[step, 0]]
                    product = product @ swap @ spreading @ swap
            rotation[b * block : (b + 1) * block, b * block : (b + 1) * block] = product
        total = rotation.T @ total[order]  # a row x becomes x P rotation
    return total


def transform_matrix(parts):
    """T as float64[in, in]: x' = T x."""
    width = parts.shape[1]
    if parts.premul == "smooth":
        return np.diag(1 / raw(parts.smooth))
    if parts.premul == "hadamard":
        return hadamard_matrix(width)
    if parts.premul == "duquant":
        return duquant_matrix(parts.permutation, parts.swaps, width)
    return np.eye(width)


def basis_of(parts):
    """R of inputs that lose their principal directions, float64[in, R]; R = 0 columns if they don't."""
    return stored_factors(parts)[1] if parts.deflated else np.zeros((parts.shape[1], 0))


def weight_of(parts):
    """The weight the parts stand for, float64[out, in]."""
    w = low_rank_of(parts) + sparse_of(parts)
    if parts.qweight is not None:
        codes, scale = main_codes(parts)
        w = w + (codes * scale) @ (np.eye(parts.shape[1]) - basis_of(parts) @ basis_of(parts).T)
    if parts.column_index is not None:
        w[:, raw(parts.column_index)] += raw(parts.column_value)
    return w @ transform_matrix(parts)


def activation_codes(t, recipe, low=None, high=None):
    """(codes, scale float32[M, 1], distance of t / scale from the next rounding border)."""
    if recipe.act_format == "fp8":
        if recipe.act_scale == "one":
            scale = np.ones((len(t), 1), np.float32)
        else:
            size = np.abs(t).max(1, keepdims=True) if low is None else np.full((len(t), 1), max(high, -low))
            scale = np.maximum(size.astype(np.float32) * (ONE / np.float32(448)), TINY)
        ratio = t * (ONE / scale)
        return round_to_e4m3(np.clip(ratio, -448, 448)), scale, np.full(t.shape, 1.0)
    if recipe.act_format == "log":
        scale = np.maximum(t.max(1, keepdims=True), TINY)
        ratio = t * (ONE / scale)
        k = np.arange(2**recipe.act_bits - 1)
        below = ratio[..., None] < np.float32(2.0 ** -((k + 0.5) / 4))  # 0: the largest power
        codes = np.append(np.float32(2.0 ** -(k / 4)), ONE - ONE)[below.sum(axis=-1)]
        return (
            codes.astype(np.float64),
            scale,
            np.abs(ratio[..., None] - np.float32(2.0 ** -((k + 0.5) / 4))).min(-1),
        )
    levels, top = np.float32(2**recipe.act_bits - 1), np.float32(2 ** (recipe.act_bits - 1) - 1)
    if recipe.act_asymmetric:
        bottom = np.minimum(t.min(1, keepdims=True), 0) if low is None else np.full((len(t), 1), low)
        above = np.maximum(t.max(1, keepdims=True), 0) if low is None else np.full((len(t), 1), high)
        scale = np.maximum((above - bottom).astype(np.float32) * (ONE / levels), TINY)
        zero = np.rint(bottom.astype(np.float32) * (ONE / scale))
        ends = zero, zero + levels
    else:
        size = np.abs(t).max(1, keepdims=True) if low is None else np.full((len(t), 1), max(high, -low))
        scale = np.maximum(size.astype(np.float32) * (ONE / top), TINY)
        ends = -top, top
    ratio = t * (ONE / scale)
    border = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
    return np.clip(np.rint(ratio), *ends).astype(np.int64), scale, border


def grouped_codes(t, recipe):
    """`activation_codes` of each group of the weight's; scale float32[M, in]."""
    pieces = [
        activation_codes(t[:, j : j + recipe.weight_group], recipe) for j in range(0, t.shape[1], recipe.weight_group)
    ]
    codes, borders = (np.concatenate([p[k] for p in pieces], axis=1) for k in (0, 2))
    return codes, np.concatenate([np.repeat(s, q.shape[1], axis=1) for q, s, _ in pieces], axis=1), borders


def outliers_of(x, recipe, tau):
    if recipe.outlier_budget:
        order = np.argsort(-np.abs(x), axis=1, kind="stable")[:, : recipe.outlier_budget]
        kept = np.zeros_like(x)
        np.put_along_axis(kept, order, np.take_along_axis(x, order, axis=1), axis=1)
        return kept
    if recipe.outlier_sigma is None:
        return np.zeros_like(x)
    wide = x.astype(np.float64)
    limit = np.sqrt(np.square(wide).mean(1, keepdims=True)) * recipe.outlier_sigma if tau is None else tau
    return np.where(np.abs(x) > np.float32(limit), x, np.float32(0))


def inner_input(x, parts):
    """x' (x'' if deflated) as float32, and whether the code under test may differ from it in the last bits."""
    if parts.deflated:
        wide = x.astype(np.float64) @ transform_matrix(parts).T
        r = basis_of(parts)
        return (wide - wide @ r @ r.T).astype(np.float32), True
    if parts.premul == "smooth":
        return x * (ONE / parts.smooth.float().numpy()), False
    if parts.premul == "none":
        return x, False
    return (x.astype(np.float64) @ transform_matrix(parts).T).astype(np.float32), True


def expected(x, parts, bias, recipe, tau=None, t=None):
    """(y float64, bound of what float32 may lose). x: float32[M, in]; t: the diffusion time of all rows."""
    if recipe.act_bits >= 16:
        w = weight_of(parts)
        sums = np.abs(x.astype(np.float64)) @ np.abs(w).T + np.abs(bias)
        loss = sums * (x.shape[1] + 16) * 2.0**-23 + 1e-36
        if parts.deflated:  # W' is put together in float32 from products with R and R^T
            codes, step = main_codes(parts)
            sizes = np.linalg.norm(codes * step, axis=1) + np.linalg.norm(w, axis=1)
            loss = loss + np.outer(np.linalg.norm(x.astype(np.float64), axis=1), sizes) * 2.0**-20
        if parts.premul in ("hadamard", "duquant"):  # the weight is rotated back in float32
            lengths = (np.linalg.norm(v.astype(np.float64), axis=1) for v in (x, w))
            loss = loss + np.outer(*lengths) * 2.0**-20
        return x.astype(np.float64) @ w.T + bias, loss
    inner, inexact = inner_input(x, parts)
    if tau is not None and parts.premul == "smooth":
        tau = tau * (ONE / parts.smooth.float().numpy())
    elif parts.premul != "none" or parts.deflated:
        tau = None
    wide, s = inner.astype(np.float64), sparse_of(parts)
    hidden = inner.copy()
    block = np.zeros(parts.shape)
    if parts.column_index is not None:
        index = raw(parts.column_index)
        hidden[:, index] = 0
        block[:, index] = raw(parts.column_value)
    outliers = outliers_of(hidden, recipe, tau)
    inliers = hidden - outliers
    ends = ()
    if parts.act_low is not None:
        entry = int(parts.bin_of_t[t])
        ends = (parts.act_low.numpy()[entry], parts.act_high.numpy()[entry])
    grouped = recipe.act_scale == "group"
    q, scale, border = grouped_codes(inliers, recipe) if grouped else activation_codes(inliers, recipe, *ends)
    met = inliers.astype(np.float64) if not recipe.cross_product else wide
    if recipe.remainder:
        codes, step = main_codes(parts)
        d, size = codes * step, np.abs(codes * step)
        main = q * scale.astype(np.float64) @ d.T + outliers.astype(np.float64) @ d.T
        if parts.deflated:
            wide = x.astype(np.float64) @ transform_matrix(parts).T
        rest = wide @ low_rank_of(parts).T + met @ s.T
        sizes = size + np.abs(low_rank_of(parts)) + np.abs(s)
        if parts.proj_up is not None:
            up, down = (np.abs(f) for f in stored_factors(parts))
            sizes = sizes + up @ down.T
    else:
        up, down = stored_factors(parts)
        inside = q @ down * scale.astype(np.float64) + outliers.astype(np.float64) @ down
        main, rest = inside @ up.T, met @ s.T
        d = up @ down.T
        size = np.abs(up) @ np.abs(down).T
        sizes = size + np.abs(s)
    y = main + rest + wide @ block.T + bias
    loss = (
        np.abs(wide) @ (sizes + np.abs(block)).T
        + np.abs(q) * scale.astype(np.float64) @ size.T
        + np.abs(bias)
    ) * (x.shape[1] + 16) * 2.0**-23 + 1e-36
    if inexact:  # x' itself, and codes that lie on a border
        norm = np.linalg.norm(wide, axis=1, keepdims=True)
        loss = loss + norm * sizes.sum(axis=1) * 2.0**-20
        loss = loss + ((border < 1e-3) * scale.astype(np.float64)) @ np.abs(d).T
    return y, loss


def stored_factors(parts):
    pairs = factor(parts.proj_up, parts.proj_up_scale), factor(parts.proj_down, parts.proj_down_scale)
    return tuple(codes * scale for codes, scale in pairs)
