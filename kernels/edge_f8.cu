// Edge attention of one layer (see edge_wg.cu) for 8-bit floats: half of the instructions an element.
//
// The work is shared out as in edge_wg.cu: groups of four m-tiles (64 edges), all 16 warps score, a warpgroup in turn makes
// e_out of the group before. What is different:
//   scores: E is rounded to e4m3 once a group, each warp a 16 x 16 block, into a ring of its own (Eq). Products of mma.sync
//           have f16 operands that hold e4m3 values, and f16 sums: codes are bounded, so no sum can overflow (pack.py).
//           Everything up to the sum over j is arithmetic on pairs of f16: q holds 1 / sqrt(df), log2(e) and the scale of
//           e_mul; of e_add a scale and a bias are left. The modulated score is cast to e4m3: Z.
//   e_out:  asynchronous products of e4m3 from Z and weights in shared memory.
//   X:      what was gathered leaves as e4m3, the input of x_out.
// A weight of the softmax is 2^score, in f16: 2^10 at most; values are kept times 2^-4, FiLM of X times 2^4. A score beyond
// that raises the shift of its own (row, channel) and scales what was summed; fewer than one in a thousand do. A sum that
// is out of range in spite of that is computed again in float (exact_f8.cuh). Neither depends on other graphs.
//   keys, values, queries and places of a tile arrive in shared memory by bulk copies while the tile before it is scored,
//           where the rows that a tile can read fit (NEAR: KV_ROWS of them); else keys and values come from L2 as they are
//           read. FiLM of E of the next tile and of X of this one are asked for before the last m-tile of a tile.
// Shared memory: Z 4 x 16 KB, e_out 16 KB, E 4 x 8 KB, Eq 4 x 8 KB, vectors 1 KB, NEAR: 2 x 40 KB = 145 or 226 KB.
#include "hopper.cuh"
#include "exact_f8.cuh"

#ifndef KV_ROWS  // 16 + 2 (n_pad - 1) if that is at most 32, else 0
#define KV_ROWS 32
#endif
#define NEAR (KV_ROWS > 0)
#define NEAR_BYTES (KV_ROWS * 1024 + 8192 + 256)  // keys and values, queries, places
#define RING 4  // groups in Z, E and Eq
#define Z_BYTES 16384
#define E_BYTES 8192
#define TOP 0x49004900u        // 10, 10
#define SMALLEST 0x08000800u   // 2^-13, 2^-13
#define LARGEST 0x7b007b00u    // 57344

struct Barriers {
  u64 e_full[RING], q_full[RING], z_full[RING], z_empty[RING], weights, kv_full[2], kv_empty[2];
  int first, t_first, t_end;  // the block's share; read where needed, registers are short
};

// E, E1: f16 [m-tiles][4][32]; q: f16 [tiles][16][32]; kv: f16 [rows][16][4 lanes][k x 4, v x 4]; film_e, film_x: f16
// [graphs][16][4][mul x 4, add x 4]; gathered: e4m3 [tiles][8][32]; tile_start, rows, block_tile: see graphs.py.
// w_mul, w_add: f16 [4][16][32]; lines [16 warps][2 n-tiles][4 lanes]: pairs of e_mul's bias (1 +), of the scale and the
// bias of e_add; w_out: 8 slabs of 64 rows; vec: 32 float4 (scale, scale, bias, bias) of e_out, then 32 pairs of f16
// (gamma, gamma), (beta, beta).
KERNEL(512, 1)
edge_attend(const uint4* __restrict__ E, uint4* __restrict__ E1, const uint4* __restrict__ q, const uint4* __restrict__ kv,
            const uint4* __restrict__ film_e, const uint4* __restrict__ film_x, uint2* __restrict__ gathered,
            const int* __restrict__ tile_start, const int4* __restrict__ rows, const int* __restrict__ block_tile,
            const uint4* __restrict__ w_mul, const uint4* __restrict__ w_add, const uint4* __restrict__ lines,
            const u8* __restrict__ w_out, const float* __restrict__ vec) {
  SHARED(shared);
  u8* Z = shared;                                    // [RING][8 slabs][2][64 rows][16 bytes]
  u8* Wo = Z + RING * Z_BYTES;                       // 8 slabs of 64 rows
  uint4* Es = (uint4*)(Wo + 16384);                  // [RING][4 m-tiles][4][32]
  uint4* Eq = Es + RING * 512;                       // the same, rounded
  float* Vs = (float*)(Eq + RING * 512);             // 192, in the room of 256
  Barriers* at = (Barriers*)(Vs + 256);
#if NEAR
  u8* Near = (u8*)(Vs + 256 + 64);                   // [2][KV_ROWS][64], then [16][32] of q, then [16] places
#endif

  const int warp = THREAD >> 5, lane = THREAD & 31, l = lane & 3, r = lane >> 2, wg = warp >> 2;
  int t = block_tile[BLOCK];
  if (t >= block_tile[BLOCK + 1]) return;
  const volatile Barriers* share = at;
  const int m_tiles = tile_start[block_tile[BLOCK + 1]] - tile_start[t];

  if (THREAD == 0) {
    const int t_end = block_tile[BLOCK + 1], g0 = tile_start[t];
    at->first = g0, at->t_first = t, at->t_end = t_end;
    for (int i = 0; i < 2; i++) barrier_init(at->kv_full + i, 1), barrier_init(at->kv_empty + i, 16);
    for (int i = 0; i < RING; i++) {
      barrier_init(at->e_full + i, 1), barrier_init(at->q_full + i, 16);
      barrier_init(at->z_full + i, 16), barrier_init(at->z_empty + i, 4);
    }
    barrier_init(&at->weights, 1);
    barrier_init_done();
    barrier_expect(&at->weights, 16384);
    copy_bulk(Wo, w_out, 16384, &at->weights);
    for (int k = 0; k < RING && 4 * k < m_tiles; k++) {
      const int bytes = min(4, m_tiles - 4 * k) * 2048;
      barrier_expect(at->e_full + k, bytes);
      copy_bulk(Es + k * 512, E + (u64)(g0 + 4 * k) * 128, bytes, at->e_full + k);
    }
  }
  if (THREAD < 192) Vs[THREAD] = vec[THREAD];

  uint4 bm[4], ba[4];
  auto load_weights = [&]() {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      bm[ks] = load16(w_mul + (ks * 16 + warp) * 32 + lane);
      ba[ks] = load16(w_add + (ks * 16 + warp) * 32 + lane);
    }
  };
  load_weights();
  const uint4 line0 = load16(lines + warp * 8 + l), line1 = load16(lines + warp * 8 + 4 + l);
  const u32 one[2] = {line0.x, line1.x}, scale[2] = {line0.y, line1.y}, bias[2] = {line0.z, line1.z};
  block_sync();

  // what a lane knows of its query tile: rows r and r + 8; key and value of row j. [n-tile][row]
  u32 sum[2][2], wv[2][2], shift[2][2], fa[2][2], fm[2][2];
  uint4 qt, key0, key1;
  int j = 0, sizes = 0, graph0, graph1;  // sizes: n of row r, n of row r + 8, n of the tile
  u32 kv0, kv1;
  bool mixed = false;
  // Keys, values and queries of one tile to L2, see edge_wg.cu.
  auto prefetch_tile = [&](int tile) {
    prefetch_bulk(kv + tile * 1024, 16384);
    prefetch_bulk(q + tile * 512, 8192);
  };
#if NEAR
  bool owed = false;  // the copy of tile t + 1: its place was not free yet
  auto near = [&](int tile) { return Near + ((tile - share->t_first) & 1) * NEAR_BYTES; };
  auto copy_tile = [&](int tile) {  // one thread
    const int base = rows[tile * 16].y, many = rows[tile * 16 + 15].y + rows[tile * 16 + 15].z - base;
    u8* to = near(tile);
    u64* full = at->kv_full + ((tile - share->t_first) & 1);
    barrier_expect(full, many * 1024 + 8192 + 256);
    copy_bulk(to, kv + (u64)base * 64, many * 1024, full);
    copy_bulk(to + KV_ROWS * 1024, q + (u64)tile * 512, 8192, full);
    copy_bulk(to + KV_ROWS * 1024 + 8192, rows + tile * 16, 256, full);
  };
  auto pay = [&](bool now) {  // tile t + 1 takes the place of t - 1 when all warps have left that
    if (THREAD != 0 || !owed) return;
    const int before = t - 1 - share->t_first;
    u64* empty = at->kv_empty + (before & 1);
    if (now) barrier_wait(empty, before >> 1 & 1);
    if (now || barrier_passed(empty, before >> 1 & 1)) copy_tile(t + 1), owed = false;
  };
  auto load_keys = [&]() { key0 = ((const uint4*)Near)[kv0], key1 = ((const uint4*)Near)[kv1]; };
  auto places = [&](int tile) {  // of its rows, when they have arrived
    const int c = tile - share->t_first;
    barrier_wait(at->kv_full + (c & 1), c >> 1 & 1);
    return (const int4*)(near(tile) + KV_ROWS * 1024 + 8192);
  };
#else
  auto load_keys = [&]() { key0 = load16(kv + kv0), key1 = load16(kv + kv1); };  // j >= n of the row: of other rows, finite
  auto places = [&](int tile) { return rows + tile * 16; };
#endif
  auto ask_film = [&](uint4& film0, uint4& film1, int tile) {
    const int4* place = places(tile);
    film0 = load16(film_e + (place[r].x * 16 + warp) * 4 + l), film1 = load16(film_e + (place[r + 8].x * 16 + warp) * 4 + l);
  };
  auto open_tile = [&](const uint4& film0, const uint4& film1) {
    if (THREAD == 0 && t + 2 < share->t_end) prefetch_tile(t + 2);
    const int4* place = places(t);
    const int4 row0 = place[r], row1 = place[r + 8];
    const int n = place[0].z;  // the largest comes first
    sizes = row0.z | row1.z << 8 | n << 16;
    mixed = warp_any(row0.z < n || row1.z < n);
    graph0 = row0.x, graph1 = row1.x;
#if NEAR
    const u32 from = ((t - share->t_first) & 1) * (NEAR_BYTES / 16) + warp * 4 + l;
    kv0 = (row0.y - place[0].y) * 64 + from, kv1 = (row1.y - place[0].y) * 64 + from;
    qt = ((const uint4*)(near(t) + KV_ROWS * 1024))[warp * 32 + lane];
    owed = t > share->t_first && t + 1 < share->t_end;
#else
    kv0 = row0.y * 64 + warp * 4 + l, kv1 = row1.y * 64 + warp * 4 + l;
    load_keys();
    qt = load16(q + (t * 16 + warp) * 32 + lane);
#endif
    prefetch(film_x + (graph0 * 16 + warp) * 4 + l), prefetch(film_x + (graph1 * 16 + warp) * 4 + l);
    j = 0;
    fm[0][0] = film0.x, fm[1][0] = film0.y, fm[0][1] = film1.x, fm[1][1] = film1.y;
    fa[0][0] = film0.z, fa[1][0] = film0.w, fa[0][1] = film1.z, fa[1][1] = film1.w;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int nt = i >> 1, hi = i & 1;
      sum[nt][hi] = wv[nt][hi] = 0;
      shift[nt][hi] = bias[nt];
    }
  };
  // One m-tile: its scores to z_row, its part of the softmax.
  auto step = [&](const uint4* a_tile, u8* z_row) {
    const uint4 tile[4] = {a_tile[0], a_tile[32], a_tile[64], a_tile[96]};
#if NEAR
    load_keys();
#endif
    u32 mul[2][2], add[2][2];
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      const uint4& a = tile[ks];
      mma_half(mul[0], a, bm[ks].x, bm[ks].y, ks ? mul[0][0] : one[0], ks ? mul[0][1] : one[0]);
      mma_half(mul[1], a, bm[ks].z, bm[ks].w, ks ? mul[1][0] : one[1], ks ? mul[1][1] : one[1]);
      mma_half(add[0], a, ba[ks].x, ba[ks].y, ks ? add[0][0] : 0, ks ? add[0][1] : 0);
      mma_half(add[1], a, ba[ks].z, ba[ks].w, ks ? add[1][0] : 0, ks ? add[1][1] : 0);
    }
    // a pair: row r + 8 hi, channels 8 nt + 2 l, + 1
    const u32 qs[2][2] = {{qt.x, qt.y}, {qt.z, qt.w}};
    const u32 ks_[2][2] = {{key0.x, key1.x}, {key0.y, key1.y}}, vs[2][2] = {{key0.z, key1.z}, {key0.w, key1.w}};
    u32 y[2][2], z[2][2];
#pragma unroll
    for (int nt = 0; nt < 2; nt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        y[nt][hi] = half_fma(half_mul(qs[nt][hi], ks_[nt][hi]), mul[nt][hi], half_fma(add[nt][hi], scale[nt], shift[nt][hi]));
        z[nt][hi] = half_fma(y[nt][hi], fm[nt][hi], fa[nt][hi]);
      }
    *(u32*)z_row = bytes4(z[0][0], z[1][0]);
    *(u32*)(z_row + 128) = bytes4(z[0][1], z[1][1]);
    if (mixed) {  // a tile of graphs of several sizes: weight 0 beyond the own
#pragma unroll
      for (int hi = 0; hi < 2; hi++)
        if (j >= (sizes >> 8 * hi & 255)) y[0][hi] = y[1][hi] = 0xfc00fc00u;
    }
    if (half_any_above(half_max(half_max(y[0][0], y[0][1]), half_max(y[1][0], y[1][1])), TOP)) {
#pragma unroll
      for (int nt = 0; nt < 2; nt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) {
          const u32 above = half_above(y[nt][hi], TOP);  // 1 or 0: an element's shift is its own affair
          const u32 grow = half_mul(half_max(y[nt][hi], 0), above), factor = half_exp2(half_sub(0, grow));
          y[nt][hi] = half_sub(y[nt][hi], grow), shift[nt][hi] = half_sub(shift[nt][hi], grow);
          fa[nt][hi] = half_fma(grow, fm[nt][hi], fa[nt][hi]);
          sum[nt][hi] = half_mul(sum[nt][hi], factor), wv[nt][hi] = half_mul(wv[nt][hi], factor);
        }
    }
#pragma unroll
    for (int nt = 0; nt < 2; nt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const u32 p = half_exp2(y[nt][hi]);
        sum[nt][hi] = half_add(sum[nt][hi], p);
        wv[nt][hi] = half_fma(p, vs[nt][hi], wv[nt][hi]);
      }
  };
  // The end of a tile. x0, x1: FiLM of X for the two rows.
  auto close_tile = [&](const uint4& x0, const uint4& x1) {
    float w[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int nt = i >> 1, hi = i & 1;
      w[nt][2 * hi] = half_low(wv[nt][hi]) * reciprocal_fast(half_low(sum[nt][hi]));
      w[nt][2 * hi + 1] = half_high(wv[nt][hi]) * reciprocal_fast(half_high(sum[nt][hi]));
    }
    const u32 least = half_min(half_min(sum[0][0], sum[0][1]), half_min(sum[1][0], sum[1][1]));
    u32 most = half_max(half_max(sum[0][0], sum[0][1]), half_max(sum[1][0], sum[1][1]));
#pragma unroll
    for (int i = 0; i < 4; i++) most = half_max(most, wv[i >> 1][i & 1] & 0x7fff7fff);
    const u32 bad = !half_all_above(least, SMALLEST) || !half_all_above(LARGEST, most);
    if (warp_any(bad)) {
#pragma unroll 1
      for (int i = 0; i < 8; i++) {
        const int nt = i >> 2, hi = i >> 1 & 1;
        const u32 own_sum = nt ? (hi ? sum[1][1] : sum[1][0]) : (hi ? sum[0][1] : sum[0][0]);
        const u32 own_wv = nt ? (hi ? wv[1][1] : wv[1][0]) : (hi ? wv[0][1] : wv[0][0]);
        const float s = i & 1 ? half_high(own_sum) : half_low(own_sum), v = i & 1 ? half_high(own_wv) : half_low(own_wv);
        if (s > half_low(SMALLEST) && s < half_low(LARGEST) && fabsf(v) < half_low(LARGEST)) continue;
        const u32 pair = nt ? (hi ? qt.w : qt.z) : (hi ? qt.y : qt.x);
        const uint4 line = load16(lines + warp * 8 + nt * 4 + l);
        Element e;
        e.E = (const u16*)E, e.kv = (const u16*)kv, e.w_mul = (const u16*)w_mul, e.w_add = (const u16*)w_add;
        e.q = i & 1 ? half_high(pair) : half_low(pair);
        e.b_mul = i & 1 ? half_high(line.x) : half_low(line.x), e.s_add = i & 1 ? half_high(line.y) : half_low(line.y);
        e.b_add = i & 1 ? half_high(line.z) : half_low(line.z);
        e.m_tile = tile_start[t], e.row = r + 8 * hi, e.channel = warp * 16 + nt * 8 + l * 2 + (i & 1);
        const float exact = exact_gather(e, rows[t * 16 + r + 8 * hi]);
#pragma unroll
        for (int k = 0; k < 8; k++) w[k >> 2][k & 3] = k == i ? exact : w[k >> 2][k & 3];
      }
      load_weights();  // not kept meanwhile
    }
    auto film = [](float v, u32 m, u32 a, int e) { return e ? fmaf(half_high(m), v, half_high(a)) : fmaf(half_low(m), v, half_low(a)); };
    uint2 out;
    out.x = bytes4(film(w[0][0], x0.x, x0.z, 0), film(w[0][1], x0.x, x0.z, 1), film(w[1][0], x0.y, x0.w, 0), film(w[1][1], x0.y, x0.w, 1));
    out.y = bytes4(film(w[0][2], x1.x, x1.z, 0), film(w[0][3], x1.x, x1.z, 1), film(w[1][2], x1.y, x1.w, 0), film(w[1][3], x1.y, x1.w, 1));
    gathered[((t * 8 + (warp >> 1)) * 32 + lane) * 2 + (warp & 1)] = out;
  };
  // This warp's block of group k, rounded.
  auto round_group = [&](int k) {
    const int slot = k & (RING - 1);
    barrier_wait(at->e_full + slot, k / RING & 1);
    if (4 * k + wg < m_tiles) {
      const int place = slot * 512 + warp * 32 + lane;  // m-tile warp / 4, channels 16 (warp % 4)
      Eq[place] = rounded_tile(Es[place]);
    }
    warp_sync();
    if (lane == 0) barrier_arrive(at->q_full + slot);
  };
  if (THREAD == 0 && t + 1 < share->t_end) prefetch_tile(t + 1);
#if NEAR
  if (THREAD == 0)
    for (int i = t; i < t + 2 && i < share->t_end; i++) copy_tile(i);
#endif
  {
    uint4 film0, film1;
    ask_film(film0, film1, t);
    open_tile(film0, film1);
  }
  round_group(0);

#pragma unroll 1
  for (int k = 0; 4 * (k - 1) < m_tiles; k++) {
    const int slot = k & (RING - 1), turn = k / RING & 1;
    const int count = min(4, m_tiles - 4 * k);
    if (count > 0) {
      barrier_wait(at->q_full + slot, turn);  // all warps have read group k - 2: group k + 1 may overwrite k - 3
      if (4 * (k + 1) < m_tiles) round_group(k + 1);
#if NEAR
      pay(false);
#endif
      barrier_wait(at->z_empty + slot, turn ^ 1);
      u8* z_row = Z + slot * Z_BYTES + warp * 1024 + lane * 4;
      const uint4* a_tile = Eq + slot * 512 + lane;

#pragma unroll 1
      for (int s = 0; s < count; s++, a_tile += 128, z_row += 256) {
        const bool last = j + 1 == sizes >> 16;
        uint4 x0, x1, film0, film1;
        if (last) {  // asked for now, needed after the step
          //x0 = load16(film_x + (graph0 * 16 + warp) * 4 + l), x1 = load16(film_x + (graph1 * 16 + warp) * 4 + l);
#if NEAR
          pay(true);
#endif
        }
        step(a_tile, z_row);
        if (!last) {
          j++;
#if NEAR
          if (j < (sizes & 255)) kv0 += 64;  // beyond the own graph: the last key again, with weight 0
          if (j < (sizes >> 8 & 255)) kv1 += 64;
#else
          kv0 += 64, kv1 += 64;
          if (s + 1 < count) load_keys();  // else later: the fence would wait for them
#endif
        } else {
          x0 = load16(film_x + (graph0 * 16 + warp) * 4 + l), x1 = load16(film_x + (graph1 * 16 + warp) * 4 + l);
          ask_film(film0, film1, min(t + 1, share->t_end - 1));
          close_tile(x0, x1);
#if NEAR
          warp_sync();
          if (lane == 0) barrier_arrive(at->kv_empty + ((t - share->t_first) & 1));
#endif
          if (++t < share->t_end) open_tile(film0, film1);
        }
      }
      fence_async();
      warp_sync();
      if (lane == 0) barrier_arrive(at->z_full + slot);
    }

    const int own = k - 1;  // the group before
    if (own < 0 || (own & 3) != wg) {
#if !NEAR
      load_keys();
#endif
      continue;
    }
    const int own_slot = own & (RING - 1), m = warp & 3;
    if (own == wg) barrier_wait(&at->weights, 0);
    barrier_wait(at->z_full + own_slot, own / RING & 1);
    float h[8][4];
    const u64 z_slab = slab(Z + own_slot * Z_BYTES, 64), w_slab = slab(Wo, 64);
    products_begin();
#pragma unroll
    for (int ks = 0; ks < 8; ks++) product8(h, z_slab + ks * (2048 >> 4), w_slab + ks * (2048 >> 4), ks);
    products_commit();
    products_wait<0>();
    if (lane == 0) barrier_arrive(at->z_empty + own_slot);
    u32 e1[8][2];
#pragma unroll
    for (int np = 0; np < 4; np++) {
      const float4 *v0 = (const float4*)Vs + np * 8 + l, *v1 = v0 + 4;
      finish_tile(e1[2 * np], e1[2 * np + 1], h[2 * np], h[2 * np + 1], *v0, *v1, Es[((own_slot * 4 + m) * 4 + np) * 32 + lane]);
    }
    named_sync(1 + wg, 128);
    if ((THREAD & 127) == 0 && 4 * (own + RING) < m_tiles) {
      const int bytes = min(4, m_tiles - 4 * (own + RING)) * 2048;
      barrier_expect(at->e_full + own_slot, bytes);
      copy_bulk(Es + own_slot * 512, E + (u64)(share->first + 4 * (own + RING)) * 128, bytes, at->e_full + own_slot);
    }
    half_norm<8>(e1, (const uint2*)(Vs + 128), lane);
    const int g = 4 * own + m;
    if (g < m_tiles)
#pragma unroll
      for (int np = 0; np < 4; np++) 
        E1[((u64)(share->first + g) * 4 + np) * 32 + lane] = make_uint4(e1[2 * np][0], e1[2 * np][1], e1[2 * np + 1][0], e1[2 * np + 1][1]);
#if NEAR  // again, rather than kept over the products
    qt = ((const uint4*)(near(min(t, share->t_end - 1)) + KV_ROWS * 1024))[warp * 32 + lane];
#else
    load_keys();
    qt = load16(q + (min(t, share->t_end - 1) * 16 + warp) * 32 + lane);
#endif
  }
}
