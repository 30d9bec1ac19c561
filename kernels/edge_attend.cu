// Edge attention of one layer: scores, softmax over j, gathered values, e_out, residual and LayerNorm of E.
//
// A query tile is 16 rows (graph, i); its m-tiles are its 16 x 64 slices of E at j = 0, 1, ... (2 KB each, fragment
// order, contiguous). A block of 16 warps walks the m-tiles of a contiguous range of query tiles, 16 m-tiles at a time:
//   phase 1: warp w owns channels 16w..16w+15 for all 16 m-tiles. e_mul and e_add of its channels stay in registers for
//            the whole kernel; a lane holds rows r, r+8 and 4 channels, so the softmax over j is a running sum per lane.
//            Scores leave as bf16 through FiLM into shared memory (Z, 8 KB an m-tile), never to global memory.
//   phase 2: warp w owns m-tile w: e_out (K = 256, N = 64), + E, LayerNorm, stored as E1.
// Shared memory: Z 128 KB, e_out 32 KB, E tiles 2 x 32 KB, vectors 2.8 KB = 227 KB: one block of 512 threads an SM.
// Operations an edge: 49,152 MAC, 256 ex2, about 1,600 other lane instructions.
//
// Scores are kept times log2(e): q, e_add and FiLM carry the factor, so a weight of the softmax is one ex2. The sum needs
// no maximum unless it leaves [2^-60, 2^100]; then that element alone is computed again with one (exact_gather).
#include "warp.cuh"

#ifndef STEPS
#define STEPS 16  // m-tiles a round; fewer where an SM has less shared memory
#endif

struct Element {  // where the scores of one (row, channel) come from
  const u16 *E, *kv, *w_mul, *w_add;
  float q, b_mul, b_add;
  int m_tile, row, row0, n, channel;
};

DEV float score(const Element& e, int j) {
  float mul = e.b_mul, add = e.b_add;
  const u16* tile = e.E + (u64)(e.m_tile + j) * 1024;
#pragma unroll 1
  for (int k = 0; k < 64; k++) {
    const float x = from_bf16(tile[tile_offset(e.row, k)]);
    mul += x * from_bf16(e.w_mul[weight_offset(e.channel, k, 16)]);
    add += x * from_bf16(e.w_add[weight_offset(e.channel, k, 16)]);
  }
  const int c = e.channel & 15;
  const int at = (e.channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1);
  return fmaf(e.q * from_bf16(e.kv[(u64)(e.row0 + j) * 512 + at]), mul, add);
}

DEV float exact_gather(const Element& e) {
  float top = score(e, 0);
#pragma unroll 1
  for (int j = 1; j < e.n; j++) top = fmaxf(top, score(e, j));
  float sum = 0, gathered = 0;
  const int c = e.channel & 15;
  const int at = (e.channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1) + 4;
#pragma unroll 1
  for (int j = 0; j < e.n; j++) {
    const float p = exp2_fast(score(e, j) - top);
    sum += p;
    gathered += p * from_bf16(e.kv[(u64)(e.row0 + j) * 512 + at]);
  }
  return gathered / sum;
}

// E [m-tiles][4][32], E1 likewise; q [tiles][16][32]; kv [rows + n_pad][16 channels / 4 lanes][k0..3 v0..3];
// film_e, film_x [graphs][16][4 lanes][mul x 4, add x 4]; gathered [tiles][16][32] (after FiLM by x), all uint4.
// tile_start [tiles + 1] in m-tiles; rows [rows] {graph, first row of the graph, n, i}; block_tile [blocks + 1].
// w_mul, w_add: packed [256, 64]; bias [128][4]: 1 + e_mul.bias and
// e_add.bias of two channels; w_out: packed [64, 256];
// vec: e_out.bias, gamma, beta [64 each].
KERNEL(512, 1)
edge_attend(const uint4* __restrict__ E, uint4* __restrict__ E1, const uint4* __restrict__ q, const uint4* __restrict__ kv,
            const uint4* __restrict__ film_e, const uint4* __restrict__ film_x, uint4* __restrict__ gathered,
            const int* __restrict__ tile_start, const int4* __restrict__ rows, const int* __restrict__ block_tile,
            const uint4* __restrict__ w_mul, const uint4* __restrict__ w_add, const float* __restrict__ bias,
            const uint4* __restrict__ w_out, const float* __restrict__ vec) {
  SHARED(shared);
  uint4* Z = (uint4*)shared;             // [STEPS][16][32]
  uint4* Wo = Z + STEPS * 16 * 32;       // [16][4][32]
  uint4* Es = Wo + 16 * 4 * 32;          // [2][STEPS][4][32]
  float* Vs = (float*)(Es + 2 * STEPS * 4 * 32);

  const int warp = THREAD >> 5, lane = THREAD & 31, l = lane & 3, r = lane >> 2;
  int t = block_tile[BLOCK];
  const int t_end = block_tile[BLOCK + 1];
  if (t >= t_end) return;
  int g = tile_start[t];
  const int g_end = tile_start[t_end];

  for (int i = THREAD; i < 16 * 4 * 32; i += 512) copy16_async(Wo + i, w_out + i);
  for (int i = THREAD; i < min(STEPS, g_end - g) * 128; i += 512)
    copy16_async(Es + (g / STEPS & 1) * STEPS * 128 + i, E + (u64)g * 128 + i);
  if (THREAD < 192) Vs[THREAD] = vec[THREAD];
  Vs[192 + THREAD] = bias[THREAD];

  uint4 bm[4], ba[4];
#pragma unroll
  for (int ks = 0; ks < 4; ks++) {
    bm[ks] = load16(w_mul + (ks * 16 + warp) * 32 + lane);
    ba[ks] = load16(w_add + (ks * 16 + warp) * 32 + lane);
  }

  float sum[2][4], wv[2][4];
  uint4 qt = make_uint4(0, 0, 0, 0), film0 = qt, film1 = qt;
  int j = 0, sizes = 0;  // bytes of sizes: n of row r, n of row r + 8, m-tiles of the query tile
  u32 kv0 = 0, kv1 = 0;

  for (; g < g_end; g += STEPS) {
    const int count = min(STEPS, g_end - g), stage = g / STEPS & 1;
    copy_wait();
    block_sync();  // E tiles are there; phase 2 of the last round is over everywhere
    {
      const int next = min(STEPS, g_end - g - STEPS);
      uint4* to = Es + (stage ^ 1) * STEPS * 128;
      for (int i = THREAD; i < next * 128; i += 512) copy16_async(to + i, E + (u64)(g + STEPS) * 128 + i);
    }

#pragma unroll 1
    for (int s = 0; s < count; s++) {
      if (j == 0) {
        const int4 row0 = rows[t * 16 + r], row1 = rows[t * 16 + r + 8];
        sizes = row0.z | row1.z << 8 | (tile_start[t + 1] - tile_start[t]) << 16;
        kv0 = row0.y * 64 + warp * 4 + l, kv1 = row1.y * 64 + warp * 4 + l;
        film0 = load16(film_e + (row0.x * 16 + warp) * 4 + l);
        film1 = load16(film_e + (row1.x * 16 + warp) * 4 + l);
        qt = load16(q + (t * 16 + warp) * 32 + lane);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i >> 2][i & 3] = wv[i >> 2][i & 3] = 0.0f;
      }
      const uint4 key0 = load16(kv + kv0);
      const uint4 key1 = load16(kv + kv1);  // where j >= n: of other rows, finite
      kv0 += 64, kv1 += 64;

      float mul[2][4], add[2][4];
#pragma unroll
      for (int nt = 0; nt < 2; nt++) {  // not kept in registers: there are 128
        const float4 b = *(const float4*)(Vs + 192 + (warp * 8 + nt * 4 + l) * 4);
        mul[nt][0] = mul[nt][2] = b.x, mul[nt][1] = mul[nt][3] = b.y;
        add[nt][0] = add[nt][2] = b.z, add[nt][1] = add[nt][3] = b.w;
      }
      const uint4* a_tile = Es + (stage * STEPS + s) * 128 + lane;
#pragma unroll
      for (int ks = 0; ks < 4; ks++) {
        const uint4 a = a_tile[ks * 32];
        mma(mul[0], a, bm[ks].x, bm[ks].y, mul[0]);
        mma(mul[1], a, bm[ks].z, bm[ks].w, mul[1]);
        mma(add[0], a, ba[ks].x, ba[ks].y, add[0]);
        mma(add[1], a, ba[ks].z, ba[ks].w, add[1]);
      }
      // element i of n-tile nt: row r + 8 (i / 2), channel 8 nt + 2 l + i % 2
      const u32 qs[2][2] = {{qt.x, qt.y}, {qt.z, qt.w}};
      const u32 ks_[2][2] = {{key0.x, key1.x}, {key0.y, key1.y}}, vs[2][2] = {{key0.z, key1.z}, {key0.w, key1.w}};
      const u32 fm[2][2] = {{film0.x, film1.x}, {film0.y, film1.y}}, fa[2][2] = {{film0.z, film1.z}, {film0.w, film1.w}};
      u32 z[2][2];
      float p[2][4];
#pragma unroll
      for (int nt = 0; nt < 2; nt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) {
          const float y0 = fmaf(low(qs[nt][hi]) * low(ks_[nt][hi]), mul[nt][2 * hi], add[nt][2 * hi]);
          const float y1 = fmaf(high(qs[nt][hi]) * high(ks_[nt][hi]), mul[nt][2 * hi + 1], add[nt][2 * hi + 1]);
          z[nt][hi] = fma2(pack2(y0, y1), fm[nt][hi], fa[nt][hi]);
          p[nt][2 * hi] = exp2_fast(y0), p[nt][2 * hi + 1] = exp2_fast(y1);
        }
      Z[(s * 16 + warp) * 32 + lane] = make_uint4(z[0][0], z[0][1], z[1][0], z[1][1]);
      if (warp_any(j >= (sizes & 255) || j >= (sizes >> 8 & 255))) {  // a tile of graphs of several sizes
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (j >= (sizes >> (i & 2 ? 8 : 0) & 255)) p[i >> 2][i & 3] = 0.0f;
      }
#pragma unroll
      for (int nt = 0; nt < 2; nt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) {
          sum[nt][2 * hi] += p[nt][2 * hi], sum[nt][2 * hi + 1] += p[nt][2 * hi + 1];
          wv[nt][2 * hi] = fmaf(p[nt][2 * hi], low(vs[nt][hi]), wv[nt][2 * hi]);
          wv[nt][2 * hi + 1] = fmaf(p[nt][2 * hi + 1], high(vs[nt][hi]), wv[nt][2 * hi + 1]);
        }

      if (++j == sizes >> 16) {
        const int4 row0 = rows[t * 16 + r], row1 = rows[t * 16 + r + 8];
        u32 bad = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float v = sum[i >> 2][i & 3];
          bad |= (v > 8.7e-19f && v < 1.2e30f) ? 0u : 1u << i;
          wv[i >> 2][i & 3] = div_fast(wv[i >> 2][i & 3], v);
        }
#pragma unroll 1
        for (int i = 0; i < 8 && bad >> i; i++) {
          if (!(bad >> i & 1)) continue;
          const int nt = i >> 2, hi = i >> 1 & 1;
          Element e;
          e.E = (const u16*)E, e.kv = (const u16*)kv, e.w_mul = (const u16*)w_mul, e.w_add = (const u16*)w_add;
          const u32 pair = nt ? (hi ? qt.w : qt.z) : (hi ? qt.y : qt.x);
          e.q = i & 1 ? high(pair) : low(pair);
          e.m_tile = tile_start[t], e.row = r + 8 * hi, e.row0 = hi ? row1.y : row0.y, e.n = hi ? row1.z : row0.z;
          e.channel = warp * 16 + nt * 8 + l * 2 + (i & 1);
          e.b_mul = bias[(e.channel >> 1) * 4 + (i & 1)], e.b_add = bias[(e.channel >> 1) * 4 + 2 + (i & 1)];
          const float exact = exact_gather(e);
#pragma unroll
          for (int k = 0; k < 8; k++) wv[k >> 2][k & 3] = k == i ? exact : wv[k >> 2][k & 3];
        }
        const uint4 x0 = load16(film_x + (row0.x * 16 + warp) * 4 + l), x1 = load16(film_x + (row1.x * 16 + warp) * 4 + l);
        uint4 out;
        out.x = pack2(fmaf(low(x0.x), wv[0][0], low(x0.z)), fmaf(high(x0.x), wv[0][1], high(x0.z)));
        out.y = pack2(fmaf(low(x1.x), wv[0][2], low(x1.z)), fmaf(high(x1.x), wv[0][3], high(x1.z)));
        out.z = pack2(fmaf(low(x0.y), wv[1][0], low(x0.w)), fmaf(high(x0.y), wv[1][1], high(x0.w)));
        out.w = pack2(fmaf(low(x1.y), wv[1][2], low(x1.w)), fmaf(high(x1.y), wv[1][3], high(x1.w)));
        gathered[(t * 16 + warp) * 32 + lane] = out;
        t++, j = 0;
      }
    }
    block_sync();  // Z is complete

    if (warp < count) {
      float h[8][4];
#pragma unroll
      for (int nt = 0; nt < 8; nt++) {
        const float2 b = *(const float2*)(Vs + nt * 8 + l * 2);
        h[nt][0] = h[nt][2] = b.x, h[nt][1] = h[nt][3] = b.y;
      }
#pragma unroll 2
      for (int ks = 0; ks < 16; ks++) {
        const uint4 a = Z[(warp * 16 + ks) * 32 + lane];
#pragma unroll
        for (int np = 0; np < 4; np++) {
          const uint4 b = Wo[(ks * 4 + np) * 32 + lane];
          mma(h[2 * np], a, b.x, b.y, h[2 * np]);
          mma(h[2 * np + 1], a, b.z, b.w, h[2 * np + 1]);
        }
      }
#pragma unroll
      for (int np = 0; np < 4; np++) add_tile(h[2 * np], h[2 * np + 1], Es[((stage * STEPS + warp) * 4 + np) * 32 + lane]);
      layer_norm<8>(h, Vs + 64, Vs + 128, lane);
#pragma unroll
      for (int np = 0; np < 4; np++) E1[((u64)(g + warp) * 4 + np) * 32 + lane] = pack_tile(h[2 * np], h[2 * np + 1]);
    }
  }
}
