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

#include "graph_rows.cuh"

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
