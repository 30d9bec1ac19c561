// The y path: pooling of X and E, the update of y, and the FiLM vectors that y gives the next layer.
//
// pool: a block owns some graphs that lie one after the other, 16 channels of E and 64 of X. E is read tile by tile, 16 bytes
// a lane: a lane sums the slices of its two rows in order, then a thread sums the rows of a graph in order, so the result is
// a function of the graph and not of its place in a tile. Padded rows all hold one vector per layer (method: a masked row
// is LayerNorm of a constant), so they enter by count. Output in fragment order. 10 instructions a pair of channels of E.
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

constexpr u32 INFINITE = FP8 ? 0x7c007c00u : 0x7f807f80u;  // a pair

struct Pool {  // of a pair of channels; sums of x - origin, so that the variance is not the difference of large numbers
  float sum0, sum1, sq0, sq1;
  u32 low2, high2;
  MEMBER void start() { sum0 = sum1 = sq0 = sq1 = 0, low2 = INFINITE, high2 = INFINITE | 0x80008000u; }
  MEMBER void add(u32 v, float2 origin) {
    const float d0 = first_of(v) - origin.x, d1 = second_of(v) - origin.y;
    sum0 += d0, sum1 += d1, sq0 = fmaf(d0, d0, sq0), sq1 = fmaf(d1, d1, sq1);
    low2 = smaller(low2, v), high2 = larger(high2, v);
  }
  MEMBER void add(const float4& sums, const uint2& range) {
    sum0 += sums.x, sum1 += sums.y, sq0 += sums.z, sq1 += sums.w;
    low2 = smaller(low2, range.x), high2 = larger(high2, range.y);
  }
  // Rows of the padding hold the origin: they add nothing to the sums. out: pairs of mean, min, max, std.
  MEMBER void finish(float2 origin, bool padded, float inverse_total, float inverse_less, u32 (&out)[4]) {
    const float m0 = sum0 * inverse_total, m1 = sum1 * inverse_total;
    const u32 pad = pair_of(origin.x, origin.y);
    if (padded) low2 = smaller(low2, pad), high2 = larger(high2, pad);
    out[0] = input(pair_of(origin.x + m0, origin.y + m1)), out[1] = input(low2), out[2] = input(high2);
    out[3] = input(pair_of(sqrt_fast(fmaxf((sq0 - sum0 * m0) * inverse_less, 0.0f)),
                           sqrt_fast(fmaxf((sq1 - sum1 * m1) * inverse_less, 0.0f))));
  }
};

// X [tiles][16][32], E [m-tiles][4][32]; heads [graphs] {graph, first row, n, 0} in the order of the rows; rows [16 tiles]
// {.., .., n, ..}; pad: rows' constants, 256 of X then 64 of E; z [graphs / 16][80][32]: mean, min, max, std of X, then of E.
// A block owns `each` graphs in the order of rows, 16 channels of E and 64 of X, in shared memory for `tiles` tiles.
#define AHEAD_J 3  // slices in flight
#if __CUDA_ARCH__ >= 900
#define POOL_BLOCKS 4  // for which there is shared memory
#else
#define POOL_BLOCKS 3
#endif
KERNEL(288, POOL_BLOCKS)
pool(const uint4* __restrict__ X, const uint4* __restrict__ E, const int* __restrict__ tile_start,
     const int4* __restrict__ heads, const int4* __restrict__ rows, const float* __restrict__ pad, u32* __restrict__ z,
     int count, int n_pad, int each, int tiles) {
  SHARED(shared);
  uint4* xs = (uint4*)shared;                    // [tiles][4][32], as in X
  float4* sums = (float4*)(xs + tiles * 128);    // [16 tiles rows][8 pairs] of a row of E: sums, squares
  uint2* ranges = (uint2*)(sums + tiles * 128);  // the same: min, max
  int4* own = (int4*)(ranges + tiles * 128);     // [each] of heads
  float2* origins = (float2*)(own + each);       // [5][8 pairs]: of 16 channels of E, of 64 of X
  float2* inverses = origins + 40;               // of the number of values of a channel, and of one less: E, X
  int* words = (int*)(inverses + 2);             // [16 tiles] of a row in xs
  const int part = BLOCK & 3, first = (BLOCK >> 2) * each, mine = min(each, count - first);
  const int lane = THREAD & 31, r = lane >> 2;
  const int begin = heads[first].y, end = heads[first + mine - 1].y + heads[first + mine - 1].z, tile0 = begin >> 4;
  const int owned = ((end - 1) >> 4) - tile0 + 1;

#pragma unroll 1
  for (int i = THREAD; i < owned * 128; i += THREADS)
    copy16_async(xs + i, X + (u64)(tile0 + (i >> 7)) * 512 + part * 128 + (i & 127));
  if (THREAD < mine) copy16_async(own + THREAD, heads + first + THREAD);
  if (THREAD < 20)
    copy16_async((float4*)origins + THREAD, pad + (THREAD < 4 ? 256 + part * 16 : part * 64 - 16) + THREAD * 4);
  for (int j = THREAD; j < owned * 16; j += THREADS) words[j] = (j >> 4) * 512 + (j & 7) * 16 + (j >> 3 & 1);
  if (THREAD < 2) {
    const float total = (float)(THREAD ? n_pad : n_pad * n_pad);
    inverses[THREAD] = make_float2(1.0f / total, 1.0f / (total - 1));
  }

  const float2 low_origin = *(const float2*)(pad + 256 + part * 16 + (lane & 3) * 2);
  const float2 high_origin = *(const float2*)(pad + 264 + part * 16 + (lane & 3) * 2);
  for (int t = warp_number(); t < owned; t += THREADS >> 5) {
    const int row = (tile0 + t) * 16 + r;
    if (row + 8 < begin || row >= end) continue;  // both rows are of other blocks
    const uint4* from = E + (u64)tile_start[tile0 + t] * 128 + part * 32 + lane;
    const int n0 = rows[row].z, n8 = rows[row + 8].z;  // n0 >= n8 >= 1
    Pool p[4];
#pragma unroll
    for (int k = 0; k < 4; k++) p[k].start();
    uint4 v[AHEAD_J];
#pragma unroll
    for (int j = 0; j < AHEAD_J; j++)
      if (j < n8) v[j] = load16(from + j * 128);
    int left = n8;
    for (; left >= AHEAD_J; left -= AHEAD_J) {
      from += AHEAD_J * 128;
#pragma unroll
      for (int j = 0; j < AHEAD_J; j++) {
        p[0].add(v[j].x, low_origin), p[1].add(v[j].y, low_origin);
        p[2].add(v[j].z, high_origin), p[3].add(v[j].w, high_origin);
        if (left > AHEAD_J + j) v[j] = load16(from + j * 128);
      }
    }
#pragma unroll
    for (int j = 0; j < AHEAD_J - 1; j++)
      if (left > j) {
        p[0].add(v[j].x, low_origin), p[1].add(v[j].y, low_origin);
        p[2].add(v[j].z, high_origin), p[3].add(v[j].w, high_origin);
      }
#pragma unroll 1
    for (int j = left; j < left + n0 - n8; j++) {  // where sizes meet
      const uint4 last = load16(from + j * 128);
      p[0].add(last.x, low_origin), p[2].add(last.z, high_origin);
    }
    const int place = (t * 16 + r) * 8 + (lane & 3);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int at = place + (k & 1) * 64 + (k >> 1) * 4;
      sums[at] = make_float4(p[k].sum0, p[k].sum1, p[k].sq0, p[k].sq1);
      ranges[at] = make_uint2(p[k].low2, p[k].high2);
    }
  }
  copy_wait();
  block_sync();

  // a thread a graph and two pairs of channels: 4 of E, then 4 x 4 of X
  for (int i = THREAD; i < mine * 20; i += THREADS) {
    const int l = i & 3;
    int kind = 0, g = i >> 2;
    while (g >= mine) g -= mine, kind++;
    const int4 head = own[g];
    const int row0 = head.y - tile0 * 16, n = head.z;
    const float2 origin0 = origins[kind * 8 + l], origin1 = origins[kind * 8 + l + 4], inverse = inverses[kind > 0];
    Pool p0, p1;
    p0.start(), p1.start();
    if (kind == 0)
      for (int j = row0; j < row0 + n; j++) {
        p0.add(sums[j * 8 + l], ranges[j * 8 + l]);
        p1.add(sums[j * 8 + l + 4], ranges[j * 8 + l + 4]);
      }
    else {
      const u32* from = (const u32*)(xs + (kind - 1) * 32 + l);
      for (int j = row0; j < row0 + n; j++) p0.add(from[words[j]], origin0), p1.add(from[words[j] + 2], origin1);
    }
    u32 f0[4], f1[4];
    p0.finish(origin0, n < n_pad, inverse.x, inverse.y, f0);
    p1.finish(origin1, n < n_pad, inverse.x, inverse.y, f1);
    const int ks = kind == 0 ? 64 + part : part * 4 + kind - 1, apart = kind == 0 ? 512 : 2048;  // to min, max, std
    u32* out = z + (u64)(head.x >> 4) * (POOL_KS * 128) + (ks * 32 + (head.x & 7) * 4 + l) * 4 + (head.x >> 3 & 1);
#pragma unroll
    for (int k = 0; k < 4; k++) out[k * apart] = f0[k], out[k * apart + 2] = f1[k];
  }
}

// features [tiles][32]; y [tiles][KS][32], a multiple of TILES tiles; w: packed [HIDDEN_Y, 16], [DY, HIDDEN_Y], film; vec:
// their biases, FP8: the scales of film.
KERNEL(256, 1)
graph_in(const uint4* features, uint4* y, uint2* film_e, uint2* film_x, const uint4* w, const float* vec) {
  SHARED(shared);
  uint4* ys = (uint4*)shared;  // [TILES][KS][32]
  const int warp = warp_number(), lane = THREAD & 31, first = BLOCK * TILES;
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
  const int warp = warp_number(), lane = THREAD & 31, first = BLOCK * TILES, own = first + warp;
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
