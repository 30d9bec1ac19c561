// Edge attention of one layer (see edge_attend.cu), for Hopper: scores and e_out of different edges at the same time.
//
// The m-tiles (16 rows (graph, i) at one j) of a block's query tiles are taken in groups of four, 64 edges. Per group:
//   scores: all 16 warps; warp w owns channels 16w..16w+15. e_mul and e_add of its channels stay in registers for the
//           whole kernel; a lane holds rows r, r + 8 and 4 channels, so the softmax over j is a running sum per lane.
//           Scores leave as bf16 through FiLM into shared memory (Z, slabs of 64 rows), never to global memory.
//   e_out:  one warpgroup, in turn: 16 asynchronous products of 64 x 64 from Z and weights in shared memory, + E,
//           LayerNorm, stored as E1, one m-tile a warp. It runs one group behind its own scores, so that nobody waits.
// Barriers in shared memory order the rings: E arrived (bulk copies, 4 groups ahead), Z written, Z read.
// Shared memory: Z 4 x 32 KB, e_out 32 KB, E 4 x 8 KB, vectors 5 KB = 197 KB: one block of 512 threads an SM.
// Operations an edge: 32,768 MAC by mma.sync, 16,384 by wgmma, 256 ex2, about 1,000 other lane instructions.
//
// Scores are kept times log2(e): q, e_add and FiLM carry the factor, so a weight of the softmax is one ex2. The sum needs
// no maximum unless it leaves [2^-60, 2^100]; then that element alone is computed again with one (exact.cuh).
#include "hopper.cuh"
#include "exact.cuh"

#define RING 4      // groups in Z and in E
#define Z_BYTES 32768
#define E_BYTES 8192

struct Barriers {
  u64 e_full[RING], z_full[RING], z_empty[RING], weights;
  int first, t_end;  // the block's share; read where needed, registers are short
};

// E, E1, q, kv, film_e, film_x, gathered, tile_start, rows, block_tile, w_mul, w_add: as in edge_attend.
// bias [16 warps][2 n-tiles][4 lanes][2]: float4 (b, b', b, b') of e_mul (1 +) and of e_add; w_out: 16 slabs of 64 rows.
// vec: e_out.bias, gamma, beta [64 each].
KERNEL(512, 1)
edge_attend(const uint4* __restrict__ E, uint4* __restrict__ E1, const uint4* __restrict__ q, const uint4* __restrict__ kv,
            const uint4* __restrict__ film_e, const uint4* __restrict__ film_x, uint4* __restrict__ gathered,
            const int* __restrict__ tile_start, const int4* __restrict__ rows, const int* __restrict__ block_tile,
            const uint4* __restrict__ w_mul, const uint4* __restrict__ w_add, const float4* __restrict__ bias,
            const u8* __restrict__ w_out, const float* __restrict__ vec) {
  SHARED(shared);
  u8* Z = shared;                                   // [RING][16 slabs][2][64 rows][16 bytes]
  u8* Wo = Z + RING * Z_BYTES;                      // 16 slabs of 64 rows
  uint4* Es = (uint4*)(Wo + 32768);                 // [RING][4 m-tiles][4][32]
  float4* Bs = (float4*)((u8*)Es + RING * E_BYTES);  // [16][2][4][2]
  float* Vs = (float*)(Bs + 256);                   // 192
  Barriers* at = (Barriers*)(Vs + 192);

  const int warp = warp_number(), lane = THREAD & 31, l = lane & 3, r = lane >> 2, wg = warp >> 2;
  int t = block_tile[BLOCK];
  if (t >= block_tile[BLOCK + 1]) return;
  const volatile Barriers* share = at;
  const int m_tiles = tile_start[block_tile[BLOCK + 1]] - tile_start[t];

  if (THREAD == 0) {
    const int t_end = block_tile[BLOCK + 1], g0 = tile_start[t];
    at->first = g0, at->t_end = t_end;
    for (int i = 0; i < RING; i++) barrier_init(at->e_full + i, 1), barrier_init(at->z_full + i, 16), barrier_init(at->z_empty + i, 4);
    barrier_init(&at->weights, 1);
    barrier_init_done();
    barrier_expect(&at->weights, 32768);
    copy_bulk(Wo, w_out, 32768, &at->weights);
    for (int k = 0; k < RING && 4 * k < m_tiles; k++) {
      const int bytes = min(4, m_tiles - 4 * k) * 2048;
      barrier_expect(at->e_full + k, bytes);
      copy_bulk(Es + k * 512, E + (u64)(g0 + 4 * k) * 128, bytes, at->e_full + k);
    }
  }
  if (THREAD < 192) Vs[THREAD] = vec[THREAD];
  if (THREAD < 256) Bs[THREAD] = bias[THREAD];

  uint4 bm[4], ba[4];
  auto load_weights = [&]() {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      bm[ks] = load16(w_mul + (ks * 16 + warp) * 32 + lane);
      ba[ks] = load16(w_add + (ks * 16 + warp) * 32 + lane);
    }
  };
  load_weights();
  block_sync();

  // what a lane knows of its query tile: rows r and r + 8; key and value of row j
  float sum[2][4], wv[2][4];
  uint4 qt, film0, film1, key0, key1;
  int j = 0, n = 0, sizes = 0, graph0, graph1;  // sizes: n of row r, n of row r + 8; n: the tile's
  u32 kv0, kv1;
  bool mixed = false;
  auto load_keys = [&]() { key0 = load16(kv + kv0), key1 = load16(kv + kv1); };  // j >= n of the row: of other rows, finite
  auto load_tile = [&](int tile) {
    load_keys();
    film0 = load16(film_e + (graph0 * 16 + warp) * 4 + l), film1 = load16(film_e + (graph1 * 16 + warp) * 4 + l);
    qt = load16(q + (tile * 16 + warp) * 32 + lane);
  };
  // Keys, values and queries of one tile to L2: a large batch has 110 MB of them, more than L2 holds. The graphs of
  // a tile lie side by side, so the rows of consecutive tiles are what consecutive tiles read.
  auto prefetch_tile = [&](int tile) {
    prefetch_bulk(kv + tile * 1024, 16384);
    prefetch_bulk(q + tile * 512, 8192);
  };
  auto open_tile = [&](const int4& row0, const int4& row1) {
    if (THREAD == 0 && t + 2 < share->t_end) prefetch_tile(t + 2);
    sizes = row0.z | row1.z << 8, n = tile_start[t + 1] - tile_start[t];
    mixed = warp_any(row0.z < n || row1.z < n);
    graph0 = row0.x, graph1 = row1.x;
    kv0 = row0.y * 64 + warp * 4 + l, kv1 = row1.y * 64 + warp * 4 + l;
    load_tile(t);
    prefetch(film_x + (graph0 * 16 + warp) * 4 + l), prefetch(film_x + (graph1 * 16 + warp) * 4 + l);
    j = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i >> 2][i & 3] = wv[i >> 2][i & 3] = 0.0f;
  };
  // One m-tile: its scores to z_row, its part of the softmax. The next keys are asked for as soon as there are registers,
  // unless a fence follows, which would wait for them.
  auto step = [&](const uint4* a_tile, u8* z_row, bool fence) {
    float mul[2][4], add[2][4];
    const uint4 tile[4] = {a_tile[0], a_tile[32], a_tile[64], a_tile[96]};
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {  // not kept in registers: there are 128
      const float4 m = Bs[((warp * 2 + nt) * 4 + l) * 2], a = Bs[((warp * 2 + nt) * 4 + l) * 2 + 1];
      mul[nt][0] = m.x, mul[nt][1] = m.y, mul[nt][2] = m.z, mul[nt][3] = m.w;
      add[nt][0] = a.x, add[nt][1] = a.y, add[nt][2] = a.z, add[nt][3] = a.w;
    }
    no_load_crosses();  // all of them before the first product: not one wait each
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      const uint4& a = tile[ks];
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
        const u32 qk = mul2(qs[nt][hi], ks_[nt][hi]);
        const float y0 = fmaf(low(qk), mul[nt][2 * hi], add[nt][2 * hi]);
        const float y1 = fmaf(high(qk), mul[nt][2 * hi + 1], add[nt][2 * hi + 1]);
        z[nt][hi] = fma2(pack2(y0, y1), fm[nt][hi], fa[nt][hi]);
        p[nt][2 * hi] = exp2_fast(y0), p[nt][2 * hi + 1] = exp2_fast(y1);
      }
    store_matrices(z_row, make_uint4(z[0][0], z[0][1], z[1][0], z[1][1]));
    if (j + 1 < n) {
      kv0 += 64, kv1 += 64;
      if (!fence) load_keys();
    }
    if (mixed) {  // a tile of graphs of several sizes
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
  };
  // The end of a tile. x0, x1: FiLM of X for the two rows.
  auto close_tile = [&](const uint4& x0, const uint4& x1) {
    u32 bad = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float v = sum[i >> 2][i & 3];
      bad |= (v > 8.7e-19f && v < 1.2e30f) ? 0u : 1u << i;
      wv[i >> 2][i & 3] *= reciprocal_fast(v);
    }
    if (warp_any(bad)) {
#pragma unroll 1
      for (int i = 0; i < 8; i++) {
        if (!(bad >> i & 1)) continue;
        const int nt = i >> 2, hi = i >> 1 & 1;
        const u32 pair = nt ? (hi ? qt.w : qt.z) : (hi ? qt.y : qt.x);
        const float exact = exact_gather((const u16*)E, (const u16*)kv, (const u16*)w_mul, (const u16*)w_add,
                                         (const float*)(bias + ((warp * 2 + nt) * 4 + l) * 2) + (i & 1),
                                         i & 1 ? high(pair) : low(pair), tile_start[t], rows[t * 16 + r + 8 * hi],
                                         r + 8 * hi, warp * 16 + nt * 8 + l * 2 + (i & 1));
#pragma unroll
        for (int e = 0; e < 8; e++) wv[e >> 2][e & 3] = e == i ? exact : wv[e >> 2][e & 3];
      }
      load_weights();  // not kept meanwhile
    }
    uint4 out;
    out.x = pack2(fmaf(low(x0.x), wv[0][0], low(x0.z)), fmaf(high(x0.x), wv[0][1], high(x0.z)));
    out.y = pack2(fmaf(low(x1.x), wv[0][2], low(x1.z)), fmaf(high(x1.x), wv[0][3], high(x1.z)));
    out.z = pack2(fmaf(low(x0.y), wv[1][0], low(x0.w)), fmaf(high(x0.y), wv[1][1], high(x0.w)));
    out.w = pack2(fmaf(low(x1.y), wv[1][2], low(x1.w)), fmaf(high(x1.y), wv[1][3], high(x1.w)));
    gathered[(t * 16 + warp) * 32 + lane] = out;
  };
  if (THREAD == 0 && t + 1 < share->t_end) prefetch_tile(t + 1);
  open_tile(rows[t * 16 + r], rows[t * 16 + r + 8]);

#pragma unroll 1
  for (int k = 0; 4 * (k - 1) < m_tiles; k++) {
    const int slot = k & (RING - 1), turn = k / RING & 1;
    const int count = min(4, m_tiles - 4 * k);
    if (count > 0) {
      barrier_wait(at->e_full + slot, turn);
      barrier_wait(at->z_empty + slot, turn ^ 1);
      // lane i gives the address of row i % 8 of matrix i / 8: rows 0..7, 8..15 of k 0..7, then of k 8..15
      u8* z_row = Z + slot * Z_BYTES + warp * 2048 + (lane >> 4) * 1024 + (lane & 15) * 16;
      const uint4* a_tile = Es + slot * 512 + lane;

#pragma unroll 1
      for (int s = 0; s < count; s++, a_tile += 128, z_row += 256) {
        step(a_tile, z_row, s + 1 == count);
        if (++j == n) {
          const uint4 x0 = load16(film_x + (graph0 * 16 + warp) * 4 + l), x1 = load16(film_x + (graph1 * 16 + warp) * 4 + l);
          const int next = min(t + 1, share->t_end - 1) * 16 + r;
          const int4 next0 = rows[next], next1 = rows[next + 8];
          close_tile(x0, x1);
          if (++t < share->t_end) open_tile(next0, next1);
        }
      }
      fence_async();
      warp_sync();
      if (lane == 0) barrier_arrive(at->z_full + slot);
    }

    const int own = k - 1;  // the group before
    if (own < 0 || (own & 3) != wg) {
      load_keys();
      continue;
    }
    const int own_slot = own & (RING - 1), m = warp & 3;
    if (own == wg) barrier_wait(&at->weights, 0);
    barrier_wait(at->z_full + own_slot, own / RING & 1);
    float h[8][4];
    const u64 z_slab = slab(Z + own_slot * Z_BYTES, 64), w_slab = slab(Wo, 64);
    products_begin();
#pragma unroll
    for (int ks = 0; ks < 16; ks++) product(h, z_slab + ks * (2048 >> 4), w_slab + ks * (2048 >> 4), ks);
    products_commit();
    products_wait<0>();
    if (lane == 0) barrier_arrive(at->z_empty + own_slot);
#pragma unroll
    for (int np = 0; np < 4; np++) {
      add_tile(h[2 * np], h[2 * np + 1], Es[((own_slot * 4 + m) * 4 + np) * 32 + lane]);
#pragma unroll
      for (int nt = 2 * np; nt < 2 * np + 2; nt++) {
        const float2 b = *(const float2*)(Vs + nt * 8 + l * 2);
        h[nt][0] += b.x, h[nt][1] += b.y, h[nt][2] += b.x, h[nt][3] += b.y;
      }
    }
    named_sync(1 + wg, 128);
    if ((THREAD & 127) == 0 && 4 * (own + RING) < m_tiles) {
      const int bytes = min(4, m_tiles - 4 * (own + RING)) * 2048;
      barrier_expect(at->e_full + own_slot, bytes);
      copy_bulk(Es + own_slot * 512, E + (u64)(share->first + 4 * (own + RING)) * 128, bytes, at->e_full + own_slot);
    }
    layer_norm<8>(h, Vs + 64, Vs + 128, lane);
    const int g = 4 * own + m;
    if (g < m_tiles)
#pragma unroll
      for (int np = 0; np < 4; np++) E1[((u64)(share->first + g) * 4 + np) * 32 + lane] = pack_tile(h[2 * np], h[2 * np + 1]);
    load_tile(min(t, share->t_end - 1));  // again, rather than kept over the products: there are 128 registers
  }
}
