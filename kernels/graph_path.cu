// The y path: pooling of X and E, the update of y, and the FiLM vectors that y gives the next layer.
//
// pool: a warp a graph, rows in order, so the result is a function of the graph only. Padded rows all hold one vector per
// layer (method: a masked row is LayerNorm of a constant), so they enter by count. Output in fragment order.
// graph_in, graph_mid: a block of 8 warps owns TILES tiles of 16 graphs, so that each weight that comes from L2 serves 64
// graphs (32 where dy is 128). The warps share the long sums (K = 1,344 of the pooled rows; 2,048 hidden channels) and add
// their parts in a fixed order; between them y is in shared memory in fragment order. Operations a graph: 0.42 M MAC;
// weights: 0.84 MB a block.
// FP8: X, E, y and the FiLM vectors are f16; what a Linear of the layers reads is rounded to e4m3, its weights are e4m3 with
// a scale an output channel. Products have f16 operands that hold those values: what is saved is half of the weights.
#include "warp.cuh"

#ifndef FP8
#define FP8 0
#endif
#if FP8
#include "fp8.cuh"
#endif

#ifndef DY
#define DY 64
#endif
#ifndef HIDDEN_Y  // of the input MLP
#define HIDDEN_Y 128
#endif
#define NT (DY / 8)
#define KS (DY / 16)
#define POOL_KS 80  // (4 * 256 + 4 * 64) / 16
#define FFY 2048
constexpr int TILES = DY > 64 ? 2 : 4;
constexpr bool AHEAD = DY <= 64;  // load weights before they are needed, where there are registers for it
constexpr int UNROLL = AHEAD ? 2 : 1, UNROLL_ALL = AHEAD ? KS : 1;

#if FP8
DEV float first_of(u32 pair) { return half_low(pair); }
DEV float second_of(u32 pair) { return half_high(pair); }
DEV u32 pair_of(float a, float b) { return halves(a, b); }
DEV u32 input(u32 pair) { return halves_of_low(bytes4(pair, 0u)); }  // as a Linear reads it
DEV u32 smaller(u32 a, u32 b) { return half_min(a, b); }
DEV u32 larger(u32 a, u32 b) { return half_max(a, b); }
#else
DEV float first_of(u32 pair) { return low(pair); }
DEV float second_of(u32 pair) { return high(pair); }
DEV u32 pair_of(float a, float b) { return pack2(a, b); }
DEV u32 input(u32 pair) { return pair; }
DEV u32 smaller(u32 a, u32 b) { return min2(a, b); }
DEV u32 larger(u32 a, u32 b) { return max2(a, b); }
#endif

struct Pool {  // of a pair of channels; sums of x - origin, so that the variance is not the difference of large numbers
  float origin0, origin1, sum0, sum1, sq0, sq1;
  u32 low2, high2;
  MEMBER void start(float pad0, float pad1, u32 first) {
    origin0 = pad0, origin1 = pad1, sum0 = sum1 = sq0 = sq1 = 0, low2 = high2 = first;
  }
  MEMBER void add(u32 v) {
    const float d0 = first_of(v) - origin0, d1 = second_of(v) - origin1;
    sum0 += d0, sum1 += d1, sq0 = fmaf(d0, d0, sq0), sq1 = fmaf(d1, d1, sq1);
    low2 = smaller(low2, v), high2 = larger(high2, v);
  }
  // Rows of the padding hold the origin: they add nothing to the sums. out: pairs of mean, min, max, std.
  MEMBER void finish(bool padded, float inverse_total, float inverse_less, u32 (&out)[4]) {
    const float m0 = sum0 * inverse_total, m1 = sum1 * inverse_total;
    const u32 pad = pair_of(origin0, origin1);
    if (padded) low2 = smaller(low2, pad), high2 = larger(high2, pad);
    out[0] = input(pair_of(origin0 + m0, origin1 + m1)), out[1] = input(low2), out[2] = input(high2);
    out[3] = input(pair_of(sqrt_fast(fmaxf((sq0 - sum0 * m0) * inverse_less, 0.0f)),
                           sqrt_fast(fmaxf((sq1 - sum1 * m1) * inverse_less, 0.0f))));
  }
};

// Word of the pair of channels c, c + 1 of row 0 inside a tile; a row is 16 words on, row + 8 one.
DEV int pair_at(int c) { return ((c >> 4) * 32 + ((c & 7) >> 1)) * 4 + ((c >> 3) & 1) * 2; }
DEV int row_at(int row) { return (row & 7) * 16 + (row >> 3 & 1); }

// X [tiles][16][32], E [m-tiles][4][32]; graphs [graphs] {first row, n}; pad: rows' constants, 256 of X then 64 of E;
// z [graphs / 16][80][32]: mean, min, max, std of X, then of E.
#define AHEAD_J 9  // slices in flight
KERNEL(128, 8)
pool(const u32* __restrict__ X, const u32* __restrict__ E, const int* __restrict__ tile_start, const int2* __restrict__ graphs,
     const float* __restrict__ pad, u32* __restrict__ z, int count, int n_pad) {
  const int b = BLOCK * 4 + (THREAD >> 5), lane = THREAD & 31;
  if (b >= count) return;
  const int row0 = graphs[b].x, n = graphs[b].y;
  u32* out = z + (u64)(b >> 4) * (POOL_KS * 128);
  u32 f[4];
  Pool p;

  const int c = lane * 2;
  {
    const u32* from = E + pair_at(c);
    p.start(pad[256 + c], pad[257 + c], from[tile_start[row0 >> 4] * 512 + row_at(row0)]);
#pragma unroll 1
    for (int i = 0; i < n; i++) {
      const u32* row = from + (u64)tile_start[row0 + i >> 4] * 512 + row_at(row0 + i);
#pragma unroll 1
      for (int j0 = 0; j0 < n; j0 += AHEAD_J, row += AHEAD_J * 512) {
        u32 v[AHEAD_J];
#pragma unroll
        for (int j = 0; j < AHEAD_J; j++)
          if (j0 + j < n) v[j] = row[j * 512];
#pragma unroll
        for (int j = 0; j < AHEAD_J; j++)
          if (j0 + j < n) p.add(v[j]);
      }
    }
    const float total = (float)(n_pad * n_pad);
    p.finish(n < n_pad, 1.0f / total, 1.0f / (total - 1), f);
#pragma unroll
    for (int k = 0; k < 4; k++) out[tile_offset(b & 15, 1024 + k * 64 + c) >> 1] = f[k];
  }

  const float inverse_total = 1.0f / n_pad, inverse_less = 1.0f / (n_pad - 1);
#pragma unroll 2
  for (int part = 0; part < 4; part++) {
    const int x = part * 64 + c;
    const u32* from = X + pair_at(x);
    p.start(pad[x], pad[x + 1], from[(row0 >> 4) * 2048 + row_at(row0)]);
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += AHEAD_J) {
      u32 v[AHEAD_J];
#pragma unroll
      for (int i = 0; i < AHEAD_J; i++)
        if (i0 + i < n) v[i] = from[(u64)(row0 + i0 + i >> 4) * 2048 + row_at(row0 + i0 + i)];
#pragma unroll
      for (int i = 0; i < AHEAD_J; i++)
        if (i0 + i < n) p.add(v[i]);
    }
    p.finish(n < n_pad, inverse_total, inverse_less, f);
#pragma unroll
    for (int k = 0; k < 4; k++) out[tile_offset(b & 15, k * 256 + x) >> 1] = f[k];
  }
}

typedef float Rows[NT][4];
typedef Rows Block[TILES];  // a warp's part of all rows of the block

constexpr int LINEAR = FP8 ? 2 : 1;        // vectors of a Linear of the layers: bias, and scale
constexpr int WORDS = FP8 ? 16 : 32;       // uint4 of a packed block of 16 x 16 of their weights

DEV void bias_to(Rows& h, const float* b, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const float2 v = *(const float2*)(b + nt * 8 + (lane & 3) * 2);
    h[nt][0] += v.x, h[nt][1] += v.y, h[nt][2] += v.x, h[nt][3] += v.y;
  }
}

DEV void scale_rows(Rows& h, const float* s, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const float2 v = *(const float2*)(s + nt * 8 + (lane & 3) * 2);
    h[nt][0] *= v.x, h[nt][1] *= v.y, h[nt][2] *= v.x, h[nt][3] *= v.y;
  }
}

// The sums of a Linear of the layers as numbers.
DEV void finish(Rows& h, const float* vec, int lane) {
  if (FP8) scale_rows(h, vec + DY, lane);
  bias_to(h, vec, lane);
}

DEV void clear(Rows& h) {
#pragma unroll
  for (int i = 0; i < NT * 4; i++) h[i >> 2][i & 3] = 0;
}

DEV void relu_rows(Rows& h) {
#pragma unroll
  for (int i = 0; i < NT * 4; i++) h[i >> 2][i & 3] = relu(h[i >> 2][i & 3]);
}

// y between layers, and as a Linear of the layers reads it.
DEV void add_y(float (&a)[4], float (&b)[4], const uint4& t) {
#if FP8
  add_half_tile(a, b, t);
#else
  add_tile(a, b, t);
#endif
}
DEV uint4 operand(const uint4& t) {
#if FP8
  return rounded_tile(t);
#else
  return t;
#endif
}
DEV uint4 y_tile(const float (&a)[4], const float (&b)[4]) {
#if FP8
  return half_tile(a, b);
#else
  return pack_tile(a, b);
#endif
}
DEV uint4 operand_relu(const float (&a)[4], const float (&b)[4]) {
#if FP8
  const u32 first = bytes4_relu(a[0], a[1], a[2], a[3]), second = bytes4_relu(b[0], b[1], b[2], b[3]);
  return make_uint4(halves_of_low(first), halves_of_high(first), halves_of_low(second), halves_of_high(second));
#else
  return pack_tile_relu(a, b);
#endif
}

DEV void to_tiles(uint4 (&a)[KS], const Rows& h) {
#pragma unroll
  for (int ks = 0; ks < KS; ks++) a[ks] = y_tile(h[2 * ks], h[2 * ks + 1]);
}

// Products of the 16-bit input MLP are of bf16.
DEV void add_product16(Rows& h, const uint4& a, const uint4* w, int lane) {  // one k step, w: [KS pairs][32]
#pragma unroll
  for (int np = 0; np < KS; np++) {
    const uint4 b = load16(w + np * 32 + lane);
    mma(h[2 * np], a, b.x, b.y, h[2 * np]);
    mma(h[2 * np + 1], a, b.z, b.w, h[2 * np + 1]);
  }
}

DEV void add_mma(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
#if FP8
  mma_half(d, a, b0, b1);
#else
  mma(d, a, b0, b1, d);
#endif
}

// N consecutive blocks of weights of the layers: two blocks of e4m3 are 16 bytes a lane.
template <int N> struct Blocks {
  uint4 v[FP8 ? N / 2 : N];
  MEMBER void load(const uint4* w, int lane) {
#pragma unroll
    for (int i = 0; i < (FP8 ? N / 2 : N); i++) v[i] = load16(w + i * 32 + lane);
  }
  MEMBER uint4 at(int i) const {
#if FP8
    const u32 first = i & 1 ? v[i >> 1].z : v[i >> 1].x, second = i & 1 ? v[i >> 1].w : v[i >> 1].y;
    return make_uint4(halves_of_low(first), halves_of_high(first), halves_of_low(second), halves_of_high(second));
#else
    return v[i];
#endif
  }
};

DEV void add_product(Rows& h, const uint4& a, const uint4* w, int lane) {  // one k step, w: KS blocks
  Blocks<KS> b;
  b.load(w, lane);
#pragma unroll
  for (int np = 0; np < KS; np++) {
    const uint4 block = b.at(np);
    add_mma(h[2 * np], a, block.x, block.y);
    add_mma(h[2 * np + 1], a, block.z, block.w);
  }
}

DEV void add_products(Block& h, const uint4 (&a)[TILES], const uint4* w, int lane) {
  Blocks<KS> packed;
  uint4 b[KS];
  packed.load(w, lane);
#pragma unroll
  for (int np = 0; np < KS; np++) b[np] = packed.at(np);
#pragma unroll
  for (int mt = 0; mt < TILES; mt++)
#pragma unroll
    for (int np = 0; np < KS; np++) {
      add_mma(h[mt][2 * np], a[mt], b[np].x, b[np].y);
      add_mma(h[mt][2 * np + 1], a[mt], b[np].z, b[np].w);
    }
}

// h += W2 relu(W1 y + b1) over the hidden chunks (16 channels each) first .. last - 1. y: operands [TILES][KS1][32] in
// shared memory; w1: [chunks][KS1 blocks]; b1: of all `hidden` channels, FP8: then their scales.
template <int KS1>
DEV void add_mlp(Block& h, const uint4* y, const uint4* w1, const float* b1, const uint4* w2, int channels, int first, int last,
                 int lane) {
  Blocks<KS1> b;
  if (AHEAD) b.load(w1 + first * KS1 * WORDS, lane);  // while the chunk before it is used
#pragma unroll 1
  for (int chunk = first; chunk < last; chunk++) {
    if (!AHEAD) b.load(w1 + chunk * KS1 * WORDS, lane);
    float hidden[TILES][2][4];
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const float2 v = FP8 ? make_float2(0, 0) : *(const float2*)(b1 + chunk * 16 + nt * 8 + (lane & 3) * 2);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) hidden[mt][nt][0] = hidden[mt][nt][2] = v.x, hidden[mt][nt][1] = hidden[mt][nt][3] = v.y;
    }
#pragma unroll
    for (int ks = 0; ks < KS1; ks++) {
      const uint4 block = b.at(ks);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) {
        const uint4 a = y[(mt * KS1 + ks) * 32 + lane];
        add_mma(hidden[mt][0], a, block.x, block.y);
        add_mma(hidden[mt][1], a, block.z, block.w);
      }
    }
    if (AHEAD) b.load(w1 + min(chunk + 1, last - 1) * KS1 * WORDS, lane);
#if FP8
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const int c = chunk * 16 + nt * 8 + (lane & 3) * 2;
      const float2 v = *(const float2*)(b1 + c), s = *(const float2*)(b1 + channels + c);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) {
        float(&t)[4] = hidden[mt][nt];
        t[0] = fmaf(t[0], s.x, v.x), t[1] = fmaf(t[1], s.y, v.y), t[2] = fmaf(t[2], s.x, v.x), t[3] = fmaf(t[3], s.y, v.y);
      }
    }
#endif
    uint4 a2[TILES];
#pragma unroll
    for (int mt = 0; mt < TILES; mt++) a2[mt] = operand_relu(hidden[mt][0], hidden[mt][1]);
    add_products(h, a2, w2 + chunk * KS * WORDS, lane);
  }
}

// The sum of the eight warps' parts, in a fixed order; tile m of it is in the h of warp m. part: 4 blocks of rows.
DEV void sum_warps(Rows& h, Block& mine, float4* part, int warp, int lane) {
  auto place = [&](int w, int mt, int nt) { return part + ((w * TILES + mt) * NT + nt) * 32 + lane; };
  if (warp >= 4) {
#pragma unroll
    for (int i = 0; i < TILES * NT; i++) {
      const float(&v)[4] = mine[i / NT][i % NT];
      *place(warp - 4, i / NT, i % NT) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  block_sync();
  if (warp < 4) {
#pragma unroll
    for (int i = 0; i < TILES * NT; i++) {
      float(&v)[4] = mine[i / NT][i % NT];
      float4 p = *place(warp, i / NT, i % NT);
      p.x += v[0], p.y += v[1], p.z += v[2], p.w += v[3];
      *place(warp, i / NT, i % NT) = p;
    }
  }
  block_sync();
  if (warp < TILES) {
    clear(h);
#pragma unroll
    for (int w = 0; w < 4; w++) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const float4 v = *place(w, warp, nt);
        h[nt][0] += v.x, h[nt][1] += v.y, h[nt][2] += v.z, h[nt][3] += v.w;
      }
    }
  }
}

// Two warps each of e_mul, e_add, x_mul, x_add; to [graphs][16][4 lanes][mul x 4, add x 4]. y: operands [TILES][KS][32] in
// shared memory; w: [4][16][KS blocks] of the four; vec: their biases, FP8: then their scales.
DEV void film(const uint4* y, const uint4* w, const float* vec, uint2* film_e, uint2* film_x, int first, int warp, int lane) {
  const int kind = warp >> 1;
  uint2* to = kind < 2 ? film_e : film_x;
#pragma unroll UNROLL
  for (int np = (warp & 1) * 8; np < (warp & 1) * 8 + 8; np++) {
    Blocks<KS> b;
    b.load(w + (kind * 16 + np) * KS * WORDS, lane);
    float o[TILES][2][4];
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const float2 v = FP8 ? make_float2(0, 0) : *(const float2*)(vec + kind * 256 + np * 16 + nt * 8 + (lane & 3) * 2);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) o[mt][nt][0] = o[mt][nt][2] = v.x, o[mt][nt][1] = o[mt][nt][3] = v.y;
    }
#pragma unroll
    for (int ks = 0; ks < KS; ks++) {
      const uint4 block = b.at(ks);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) {
        const uint4 a = y[(mt * KS + ks) * 32 + lane];
        add_mma(o[mt][0], a, block.x, block.y);
        add_mma(o[mt][1], a, block.z, block.w);
      }
    }
#if FP8
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const int c = kind * 256 + np * 16 + nt * 8 + (lane & 3) * 2;
      const float2 v = *(const float2*)(vec + c), s = *(const float2*)(vec + 1024 + c);
#pragma unroll
      for (int mt = 0; mt < TILES; mt++) {
        float(&t)[4] = o[mt][nt];
        t[0] = fmaf(t[0], s.x, v.x), t[1] = fmaf(t[1], s.y, v.y), t[2] = fmaf(t[2], s.x, v.x), t[3] = fmaf(t[3], s.y, v.y);
      }
    }
#endif
#pragma unroll
    for (int mt = 0; mt < TILES; mt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const int graph = (first + mt) * 16 + hi * 8 + (lane >> 2);
        to[((graph * 16 + np) * 4 + (lane & 3)) * 2 + (kind & 1)] =
            make_uint2(pair_of(o[mt][0][2 * hi], o[mt][0][2 * hi + 1]), pair_of(o[mt][1][2 * hi], o[mt][1][2 * hi + 1]));
      }
  }
}

DEV void store_y(const uint4 (&a)[KS], uint4* shared, uint4* y, int lane) {  // at the tile
#pragma unroll
  for (int ks = 0; ks < KS; ks++) y[ks * 32 + lane] = a[ks], shared[ks * 32 + lane] = operand(a[ks]);
}

// features [tiles][32]; y [tiles][KS][32], a multiple of TILES tiles; w: packed [HIDDEN_Y, 16], [DY, HIDDEN_Y], film; vec:
// their biases, FP8: the scales of film.
KERNEL(256, 1)
graph_in(const uint4* features, uint4* y, uint2* film_e, uint2* film_x, const uint4* w, const float* vec) {
  SHARED(shared);
  uint4* ys = (uint4*)shared;  // [TILES][KS][32]
  const int warp = THREAD >> 5, lane = THREAD & 31, first = BLOCK * TILES;
  if (warp < TILES) {
    const uint4 f = load16(features + (first + warp) * 32 + lane);
    const uint4* w2 = w + HIDDEN_Y * 2;
    uint4 a[KS];
    Rows h;
    clear(h);
#pragma unroll 2
    for (int chunk = 0; chunk < HIDDEN_Y / 16; chunk++) {
      float hidden[2][4];
#pragma unroll
      for (int nt = 0; nt < 2; nt++) {
        const float2 v = *(const float2*)(vec + chunk * 16 + nt * 8 + (lane & 3) * 2);
        hidden[nt][0] = hidden[nt][2] = v.x, hidden[nt][1] = hidden[nt][3] = v.y;
      }
      const uint4 b = load16(w + chunk * 32 + lane);
      mma(hidden[0], f, b.x, b.y, hidden[0]);
      mma(hidden[1], f, b.z, b.w, hidden[1]);
      add_product16(h, pack_tile_relu(hidden[0], hidden[1]), w2 + chunk * KS * 32, lane);
    }
    bias_to(h, vec + HIDDEN_Y, lane);
    relu_rows(h);
    to_tiles(a, h);
    store_y(a, ys + warp * KS * 32, y + (first + warp) * KS * 32, lane);
  }
  block_sync();
  film(ys, w + HIDDEN_Y * 2 + HIDDEN_Y / 16 * KS * 32, vec + HIDDEN_Y + DY, film_e, film_x, first, warp, lane);
}

// z: what pool wrote; y is replaced. w: [DY, DY + 1280] of (y_y, x_y, e_y), y_out.0, y_out.2 (one k step after the other),
// lin_y1 (one hidden chunk after the other), lin_y2, film of the next layer; vec: sum of the three biases (FP8: and their
// three scales), y_out.0, y_out.2, norm 1 (gamma, beta), lin_y1, lin_y2, norm 2, film.
KERNEL(256, 1)
graph_mid(const uint4* z, uint4* y, uint2* film_e, uint2* film_x, const uint4* w, const float* vec) {
  SHARED(shared);
  float4* part = (float4*)shared;                     // [4][TILES][NT][32]
  uint4* ys = (uint4*)(part + 4 * TILES * NT * 32);   // [TILES][KS][32], operands
  uint4* kept = FP8 ? ys + TILES * KS * 32 : ys;      // the same, before rounding
  const int warp = THREAD >> 5, lane = THREAD & 31, first = BLOCK * TILES, own = first + warp;
  const int from = warp * (KS + POOL_KS) / 8, to = (warp + 1) * (KS + POOL_KS) / 8;
  Block all;
  Rows h;
#pragma unroll
  for (int mt = 0; mt < TILES; mt++) clear(all[mt]);
#pragma unroll UNROLL
  for (int ks = from; ks < to; ks++) {
    uint4 in[TILES];
#if FP8
    if (ks > from && (ks == KS || ks == KS + 64)) {  // sums are in the scale of the present Linear
      const float *before = vec + (ks == KS ? DY : 2 * DY), *now = before + DY;
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const int c = nt * 8 + (lane & 3) * 2;
        const float x = before[c] / now[c], y1 = before[c + 1] / now[c + 1];
#pragma unroll
        for (int mt = 0; mt < TILES; mt++)
          all[mt][nt][0] *= x, all[mt][nt][1] *= y1, all[mt][nt][2] *= x, all[mt][nt][3] *= y1;
      }
    }
#endif
#pragma unroll
    for (int mt = 0; mt < TILES; mt++)
      in[mt] = ks < KS ? operand(y[((first + mt) * KS + ks) * 32 + lane])
                       : load16(z + ((first + mt) * POOL_KS + ks - KS) * 32 + lane);
    add_products(all, in, w + ks * KS * WORDS, lane);
  }
#if FP8
#pragma unroll
  for (int mt = 0; mt < TILES; mt++) scale_rows(all[mt], vec + (to <= KS ? 1 : to <= KS + 64 ? 2 : 3) * DY, lane);
#endif
  sum_warps(h, all, part, warp, lane);
  const float* v = vec + (FP8 ? 4 : 1) * DY;
  if (warp < TILES) {
    bias_to(h, vec, lane);
    uint4 a[KS];
    const uint4* m = w + (KS + POOL_KS) * KS * WORDS;
#pragma unroll 1
    for (int layer = 0; layer < 2; layer++) {
      to_tiles(a, h);
#pragma unroll
      for (int ks = 0; ks < KS; ks++) ys[(warp * KS + ks) * 32 + lane] = operand(a[ks]);  // a lane reads what it wrote
      clear(h);
#pragma unroll UNROLL_ALL
      for (int ks = 0; ks < KS; ks++) add_product(h, ys[(warp * KS + ks) * 32 + lane], m + ks * KS * WORDS, lane);
      finish(h, v, lane);
      if (layer == 0) relu_rows(h);
      m += KS * KS * WORDS, v += LINEAR * DY;
    }
#pragma unroll
    for (int ks = 0; ks < KS; ks++) add_y(h[2 * ks], h[2 * ks + 1], y[(own * KS + ks) * 32 + lane]);
    layer_norm<NT>(h, v, v + DY, lane);
    to_tiles(a, h);
#pragma unroll
    for (int ks = 0; ks < KS; ks++) {
      const int place = (warp * KS + ks) * 32 + lane;
      kept[place] = a[ks];
      if (FP8) ys[place] = operand(a[ks]);
    }
  }
  block_sync();

  w += ((KS + POOL_KS) + 2 * KS) * KS * WORDS, vec += ((FP8 ? 4 : 1) + 2 * LINEAR + 2) * DY;
#pragma unroll
  for (int mt = 0; mt < TILES; mt++) clear(all[mt]);
  add_mlp<KS>(all, ys, w, vec, w + KS * (FFY / 16) * WORDS, FFY, warp * (FFY / 128), (warp + 1) * (FFY / 128), lane);
  sum_warps(h, all, part, warp, lane);
  w += 2 * KS * (FFY / 16) * WORDS, vec += LINEAR * FFY;
  if (warp < TILES) {
    uint4 a[KS];
    finish(h, vec, lane);
#pragma unroll
    for (int ks = 0; ks < KS; ks++) add_y(h[2 * ks], h[2 * ks + 1], kept[(warp * KS + ks) * 32 + lane]);
    layer_norm<NT>(h, vec + LINEAR * DY, vec + (LINEAR + 1) * DY, lane);
    to_tiles(a, h);
    store_y(a, ys + warp * KS * 32, y + own * KS * 32, lane);
  }
  block_sync();
  film(ys, w, vec + (LINEAR + 2) * DY, film_e, film_x, first, warp, lane);
}
