"""A Linear of 4-bit weights and 4-bit inputs with its side branches, as one launch (int4_narrow.cu, int4.cu). Up to 256
channels also of inputs of 5 to 8 bit and weights of 3 to 8 (int8_narrow.cu).

Guarantees: the integer part is exact, so the result without branches is QuantLinear's to the last bit, on every GPU;
a row's result depends on the row alone. sm_80, 86 and 89 multiply 4-bit codes as they are; sm_90 and later, whose
4-bit product is emulated, unpack them to 8 bit in registers and get the same integers. Up to 256 channels the branches
L R^T + S are one dense bf16 matrix on the device, which tensor cores multiply faster than lists are walked; beyond, factors
and lists.
Knows nothing of: recipes, networks, which Linear this is.

    y = s_w (s_x (Q(x_D) codes^T) + x_S codes^T) + x (L R^T + S)^T + b
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitdgdm.kernels.launch import Launcher
from bitdgdm.kernels.pack import pack_weight

STEP, ROUND = 64, 64  # inner length of a product's step, channels of a round
NARROW = (64, 128, 256)  # inner lengths of int4_narrow.cu
MOST_RANK = 32
_BF16, _OUTLIERS, _WIDE = 1, 2, 4  # flags of the kernels
_WARPS = 4


@dataclass(frozen=True)
class Int4Linear:
    """A Linear packed for the kernel, on its device; None where there is no such part. Layouts: see int4.cu.

    `length` is the inner length, padded to a narrow one or whole steps; a shorter input is padded too. A narrow Linear has
    `side`, a longer one codes_t, up, down and sparse. wide: a byte a weight.
    """

    out_features: int
    in_features: int
    length: int
    asymmetric: bool
    outliers: bool
    words: Tensor
    vec: Tensor
    row_sums: Tensor
    tau: Tensor | None
    factor: Tensor | None
    act_bits: int = 4
    wide: bool = False
    side: Tensor | None = None
    codes_t: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    sparse: Tensor | None = None

    @property
    def top(self) -> int:
        """The largest code of an input."""
        return 2 ** (self.act_bits if self.asymmetric else self.act_bits - 1) - 1

    @property
    def kind(self) -> str:
        """Which sources there are for such inputs: int4 or int8."""
        return "int4" if self.act_bits == 4 else "int8"

    @property
    def branches(self) -> bool:
        """Whether the input itself is needed beside its codes."""
        return self.outliers or self.side is not None or self.up is not None or self.sparse is not None

    @property
    def width(self) -> int:
        """Entries of S kept for every output channel."""
        return 0 if self.sparse is None else self.sparse.shape[0]

    @property
    def rank(self) -> int:
        """Components of L R^T, in steps of 16."""
        return 0 if self.up is None else self.up.shape[0] * 16


def native(arch: str) -> bool:
    """Whether an architecture ("89") multiplies 4-bit codes in its tensor cores."""
    return arch.startswith("8")


def _length(in_features: int) -> int:
    """Channels that the kernels see."""
    return next((n for n in NARROW if in_features <= n), -(-in_features // STEP) * STEP)


def _shared(length: int, tiles: int, branches: bool, arch: str) -> int:
    """Bytes of shared memory of a warp of int4.cu with 16 `tiles` rows."""
    return tiles * (length * (8 if native(arch) else 16) + (length + 33) * 32 * branches + length * 2 + 128)


def supports(
    out_features: int, in_features: int, *, rank: int = 0, branches: bool = False, arch: str = "90a", shared_bytes: int = 101376,
    act_bits: int = 4, weight_bits: int = 4,
) -> tuple[bool, str]:  # fmt: skip
    """Whether the kernel takes a Linear on such a GPU, and why not."""
    if not (act_bits == 4 == weight_bits or (5 <= act_bits <= 8 and 3 <= weight_bits <= 8)):
        return False, f"int4_linear takes 4-bit weights and inputs, or 3 to 8 and 5 to 8 bit, not {weight_bits} and {act_bits}"
    if out_features % ROUND:
        return False, f"int4_linear takes multiples of {ROUND} output channels, not {out_features}"
    if int(arch.rstrip("a")) < 80:
        return False, f"int4_linear needs sm_80 or newer, not sm_{arch}"
    length = _length(in_features)
    if length in NARROW:
        return True, ""
    if act_bits > 4:
        return False, f"int4_linear takes inputs of {act_bits} bit up to {NARROW[-1]} channels, not {in_features}"
    if rank > MOST_RANK:
        return False, f"int4_linear takes rank {MOST_RANK} at most of more than {NARROW[-1]} channels, not {rank}"
    need = _shared(length, 1, branches, arch)
    if length > 32768 or need > shared_bytes:
        return False, (
            f"int4_linear needs {need} bytes of shared memory for {in_features} input channels, sm_{arch} has {shared_bytes}"
        )
    return True, ""


def pack(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    asymmetric: bool = False,
    sigma: float | None = None,
    tau: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    sparse: Tensor | None = None,
    act_bits: int = 4,
    weight_bits: int = 4,
    device: torch.device | str = "cpu",
) -> Int4Linear:
    """Pack W ~ codes * scale[:, None] + up down^T + sparse.

    codes: int8[out, in] of `weight_bits`; scale, bias: float[out]; up: float[out, R], down: float[in, R], rounded to bf16;
    sparse: float[out, in], mostly zero. Up to 256 channels these become one bf16 matrix; beyond, sparse is kept as lists of
    bf16, as wide as its fullest row. asymmetric: inputs get
    codes 0..2^act_bits - 1 from a zero point; else as many on both sides of 0. sigma: |x| beyond sigma times the row's root mean square are outliers; tau:
    float[in], limits of |x| a channel, instead. Raises: ValueError with the reason of `supports`.
    """
    n, k = codes.shape
    ok, reason = supports(n, k, rank=0 if up is None else up.shape[1], shared_bytes=1 << 30, act_bits=act_bits, weight_bits=weight_bits)
    if not ok:
        raise ValueError(reason)
    length = _length(k)
    full, scale = torch.zeros(n, length, dtype=torch.int64), scale.float().cpu()
    full[:, :k] = codes.cpu()
    factor = limits = side = None
    if tau is not None:
        limits = torch.full((length,), math.inf)
        limits[:k] = tau.float().cpu()
    elif sigma is not None:
        factor = torch.tensor([sigma / math.sqrt(k)], dtype=torch.float64)
    if length in NARROW:
        side, full, scale = _side(full, scale, up, down, sparse)

    def there(tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(device)

    def or_none(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else there(tensor)

    order = _narrow_order(n) if length in NARROW else torch.arange(n)
    common = Int4Linear(
        n, k, length, asymmetric, sigma is not None or tau is not None,
        there((_bytes if weight_bits > 4 else _words)(full[order])), there(torch.stack((scale, torch.zeros(n) if bias is None else bias.float().cpu()))),
        there(full.sum(1).to(torch.int32)), or_none(limits), or_none(factor),
        act_bits, weight_bits > 4,
    )  # fmt: skip
    if length in NARROW:
        return replace(common, side=or_none(_narrow_side(side, order)))
    # k, round, n tile, l, e -> k, round, l, n tile (two channels a byte)
    codes_t = _nibbles(full.T.reshape(length, n // ROUND, 8, 4, 2).permute(0, 1, 3, 2, 4))
    if up is not None and down is not None:
        rank = -(-up.shape[1] // 16) * 16
        down, up = pack_weight(down.float().cpu().T, rows=rank, cols=length), pack_weight(up.float().cpu(), cols=rank)
    lists = or_none(_lists(sparse, length))
    return replace(common, codes_t=there(codes_t), down=or_none(down), up=or_none(up), sparse=lists)


def _words(full: Tensor) -> Tensor:
    """B fragments of 4 bit: int32[K / 64, N / 16, 32 lanes, 4] of codes int64[N, K]."""
    n, length = full.shape
    # n tile, h, g, k step, half, l, i -> k step, n tile, lane (g, l), word (h, half), nibble i
    parts = full.view(n // 16, 2, 8, length // 64, 2, 4, 8).permute(3, 0, 2, 5, 1, 4, 6)
    return _nibbles(parts.reshape(length // 64, n // 16, 32, 4, 8)).view(torch.int32).squeeze(-1)


def _bytes(full: Tensor) -> Tensor:
    """B fragments of a byte a weight: int8[K / 64, N / 16, 2 n-tiles, 32 lanes, 16] of codes int64[N, K]."""
    n, length = full.shape
    # n tile, h, g, k step, half, l, i, odd -> k step, n tile, h, lane (g, l), half, odd, i
    return full.view(n // 16, 2, 8, length // 64, 2, 4, 4, 2).permute(3, 0, 1, 2, 5, 4, 7, 6).reshape(length // 64, n // 16, 2, 32, 16).to(torch.int8)


def _narrow_order(n: int) -> Tensor:
    """int64[N]: the channel that is column 8 j + g of its 32: two neighbours a lane and n-tile, 8 a lane in all."""
    j, g = torch.arange(4)[:, None], torch.arange(8)
    return (torch.arange(0, n, 32)[:, None] + (8 * (g // 2) + 2 * j + g % 2).flatten()).flatten()


def _side(full: Tensor, scale: Tensor, up: Tensor | None, down: Tensor | None, sparse: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """P = (L R^T + S) / s_w, float32[N, K] or None; the codes and the scales that go with it.

    Where a channel's codes are nothing beside its branches (1e-30 of them) they are left out, so that P stays finite.
    """
    total = torch.zeros(full.shape)
    if up is not None and down is not None:
        total[:, : len(down)] += up.float().cpu().bfloat16().float() @ down.float().cpu().bfloat16().float().T
    if sparse is not None:
        total[:, : sparse.shape[1]] += sparse.float().cpu()
    if not bool(total.any()):
        return None, full, scale
    nothing = scale < 1e-30 * total.abs().amax(1)
    scale = torch.where(nothing, 1.0, scale)
    return total / scale[:, None], full.masked_fill(nothing[:, None], 0), scale


def _narrow_side(side: Tensor | None, order: Tensor) -> Tensor | None:
    """As B fragments of bf16 whose k are those that a lane of int4_narrow.cu holds: 32 h + 8 l + 4 s + (0..3) of 64."""
    if side is None:
        return None
    n, length = side.shape
    # k: chunk, h, l, s, t, e -> chunk, h, s, t, l, e, which pack_weight reads as 16 k + 8 t + 2 l + e
    parts = side[order].view(n, length // 64, 2, 4, 2, 2, 2).permute(0, 1, 2, 4, 5, 3, 6)
    return pack_weight(parts.reshape(n, length))


def _nibbles(values: Tensor) -> Tensor:
    """Integers of an even last axis as bytes, the first of two in the low four bits: [..., 2 b] -> uint8[..., b]."""
    return (values[..., 0::2] & 15 | (values[..., 1::2] & 15) << 4).to(torch.uint8)


def _lists(sparse: Tensor | None, length: int) -> Tensor | None:
    """Lists of fixed width: int32[width, out], the input's place in a row (place_of in int4.cu) and above it the value as
    bf16; 0 where a row has fewer.
    """
    if sparse is None or not bool(sparse.any()):
        return None
    s = sparse.float().cpu()
    width = int((s != 0).sum(1).max())
    # entries first, in the order of channels, then whatever is zero
    order = torch.argsort((s == 0).to(torch.int8), dim=1, stable=True)[:, :width]
    values = s.gather(1, order).to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    place = (order & 7) * (length // 8 + 4) + (order >> 3)
    word = torch.where(values == 0, 0, place | values << 16)
    return torch.where(word >= 2**31, word - 2**32, word).T.to(torch.int32)


def int4_linear(x: Tensor, linear: Int4Linear, launcher: Launcher) -> Tensor:
    """x: float32 or bf16 [..., in] -> [..., out] in the same type, queued on the launcher's stream.

    Raises: ValueError if x has another type or width, or if the GPU has no room for it.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] != linear.in_features:
        raise ValueError(f"int4_linear takes float32 or bf16 [..., {linear.in_features}], not {x.dtype} {list(x.shape)}")
    ok, reason = supports(
        linear.out_features, linear.in_features, rank=linear.rank, branches=linear.branches, arch=launcher.arch,
        shared_bytes=launcher.shared_bytes, act_bits=linear.act_bits, weight_bits=8 if linear.wide else 4,
    )  # fmt: skip
    if not ok:
        raise ValueError(reason)
    rows = x.reshape(-1, linear.in_features)
    if linear.length != linear.in_features:
        rows = torch.nn.functional.pad(rows, (0, linear.length - linear.in_features))
    rows = rows.contiguous()
    y = torch.empty(len(rows), linear.out_features, dtype=x.dtype, device=x.device)
    if len(rows):
        _launch(rows, y, linear, launcher)
    return y.view(*x.shape[:-1], linear.out_features)


def _launch(x: Tensor, y: Tensor, w: Int4Linear, launcher: Launcher) -> None:
    flags = _BF16 * (x.dtype == torch.bfloat16) | _OUTLIERS * w.outliers
    if w.length in NARROW:
        tiles = 2 if w.length == 64 else 1
        launcher.launch(
            f"{w.kind}_narrow", f"int4_{w.length}" + "_asymmetric" * w.asymmetric, -(-len(x) // (16 * tiles * _WARPS)), 32 * _WARPS,
            _WARPS * w.length * 32 * tiles * w.outliers,
            (x, y, w.words, w.vec, w.row_sums, w.tau, w.factor, w.side, len(x), w.out_features, flags | _WIDE * w.wide, w.top),
        )  # fmt: skip
        return
    tiles = 2 if _shared(w.length, 2, w.branches, launcher.arch) <= launcher.shared_bytes else 1
    each = _shared(w.length, tiles, w.branches, launcher.arch)
    warps = min(_WARPS, launcher.shared_bytes // each)
    kernel = ("int4_long", "int4_linear")[tiles - 1] + "_asymmetric" * w.asymmetric
    launcher.launch(
        "int4", kernel, -(-len(x) // (16 * tiles * warps)), 32 * warps, warps * each,
        (x, y, w.words, w.codes_t, w.vec, w.row_sums, w.tau, w.factor, w.down, w.up, w.sparse, len(x), w.length,
         w.out_features, w.rank // 16, w.width, flags),
    )  # fmt: skip
