// Edge attention of one layer (see edge_wg.cu) for 8-bit floats, and the feed-forward net of E behind it.
//
// Groups of four m-tiles (64 edges). 16 warps only score, 16 channels each; a warpgroup of its own finishes:
//   group k + 2 is rounded to e4m3 (each warp one m-tile) into a ring of its own (Eq), group k becomes e_out, residual and
//   LayerNorm, its place in E is filled with group k + 4, and the feed-forward net (edge_ffn_rows.cuh) takes the rows from
//   registers. The result goes to another buffer than E: scores that are computed again read E (exact_f8.cuh). In the
//   last layer (no `ffn`) what is stored is the input of edge_ffn_out.
// That Eq has group k says more: Z of group k - 3 has been read, since the same warps arrive after they have done that.
//   scores: Products of mma.sync have f16 operands that hold e4m3 values, and f16 sums: codes are bounded, so no sum can
//           overflow (pack.py). Everything up to the sum over j is arithmetic on pairs of f16: q holds 1 / sqrt(df),
//           log2(e) and the scale of e_mul; of e_add a scale and a bias are left. The modulated score is cast to e4m3: Z.
//   e_out:  asynchronous products of e4m3 from Z and weights in shared memory.
//   X:      what was gathered leaves as e4m3, the input of x_out.
// A weight of the softmax is 2^score, in f16: 2^10 at most; values are kept times 2^-4, FiLM of X times 2^4. A score beyond
// that raises the shift of its own (row, channel) and scales what was summed; fewer than one in a thousand do. A sum that
// is out of range in spite of that is computed again in float (exact_f8.cuh). Neither depends on other graphs.
//   keys, values: from L2, a step ahead; a bulk prefetch brings those of the tile after next there. All else that a tile
//           needs (places, queries, FiLM) is copied to shared memory a tile ahead, by the warp that reads it.
// Shared memory: Z 4 x 16 KB, weights 32 KB, E 4 x 8 KB, Eq 4 x 8 KB, next tiles 58 KB, vectors 3 KB = 221 KB.
#include "exact_f8.cuh"
#include "edge_ffn_rows.cuh"

#define SCORERS 16
#define RING 4  // groups in Z, E and Eq
#define Z_BYTES (RING * 16384)
#define TOP 0x49004900u        // 10, 10
#define SMALLEST 0x08000800u   // 2^-13, 2^-13
#define LARGEST 0x7b007b00u    // 57344

struct Barriers {
  u64 e_full[RING][4], q_full[RING], z_full[RING], weights;
  int t_end;  // read where needed, registers are short
};

// E, out: f16 [m-tiles][4][32]; q: f16 [tiles][16][32]; kv: f16 [rows][16][4 lanes][k x 4, v x 4]; film_e, film_x: f16
// [graphs][16][4][mul x 4, add x 4]; gathered: e4m3 [tiles][8][32]; tile_start, rows, block_tile: see graphs.py.
// w_mul, w_add: f16 [4][16][32]; lines [16 warps][2 n-tiles][4 lanes]: pairs of e_mul's bias (1 +), of the scale and the
// bias of e_add; w_out: 8 slabs of 64 rows; vec: 32 float4 (scale, scale, bias, bias) of e_out, then 32 pairs of f16
// (gamma, gamma), (beta, beta); ffn, ffn_vec: see edge_ffn_rows.cuh, or null.
KERNEL(640, 1)
edge_attend(const uint4* __restrict__ E, uint4* __restrict__ out, const uint4* __restrict__ q, const uint4* __restrict__ kv,
            const uint4* __restrict__ film_e, const uint4* __restrict__ film_x, uint2* __restrict__ gathered,
            const int* __restrict__ tile_start, const int4* __restrict__ rows, const int* __restrict__ block_tile,
            const uint4* __restrict__ w_mul, const uint4* __restrict__ w_add, const uint4* __restrict__ lines,
            const u8* __restrict__ w_out, const float* __restrict__ vec, const u8* __restrict__ ffn,
            const float* __restrict__ ffn_vec) {
  SHARED(shared);
  u8* Z = shared;                                    // [8 slabs][2][RING groups of 64 rows][16 bytes]
  u8* Wo = Z + Z_BYTES;                              // 8 slabs of 64 rows
  u8* Wf = Wo + 16384;
  uint4* Es = (uint4*)(Wf + FFN_BYTES);              // [RING][4 m-tiles][4][32]
  uint4* Eq = Es + RING * 512;                       // the same, rounded
  uint4* Next = Eq + RING * 512;                     // [SCORERS][232]: places of two tiles, next q, FiLM of E, of X; lines, q
  float* Vs = (float*)(Next + SCORERS * 232);        // 192, then the net's
  Barriers* at = (Barriers*)(Vs + 192 + FFN_FLOATS);

  const int warp = warp_number(), lane = THREAD & 31, l = lane & 3, r = lane >> 2;
  int t = block_tile[BLOCK];
  if (t >= block_tile[BLOCK + 1]) return;
  const int first = tile_start[t], m_tiles = tile_start[block_tile[BLOCK + 1]] - first;

  if (THREAD == 0) {
    at->t_end = block_tile[BLOCK + 1];
    for (int i = 0; i < RING; i++) {
      for (int m = 0; m < 4; m++) barrier_init(at->e_full[i] + m, 1);
      barrier_init(at->q_full + i, 4), barrier_init(at->z_full + i, SCORERS);
    }
    barrier_init(&at->weights, 1);
    barrier_init_done();
    barrier_expect(&at->weights, 16384 + (ffn ? FFN_BYTES : 0));
    copy_bulk(Wo, w_out, 16384, &at->weights);
    if (ffn) copy_bulk(Wf, ffn, FFN_BYTES, &at->weights);
  }
  if (THREAD < 192) Vs[THREAD] = vec[THREAD];
  if (THREAD < FFN_FLOATS && ffn) Vs[192 + THREAD] = ffn_vec[THREAD];
  block_sync();

  if (warp >= SCORERS) {
    const int m = warp - SCORERS;  // of the m-tiles of a group
    auto fetch = [&](int k) {
      const int slot = k & (RING - 1);
      if (lane != 0 || 4 * k + m >= m_tiles) return;
      barrier_expect(at->e_full[slot] + m, 2048);
      copy_bulk(Es + (slot * 4 + m) * 128, E + (u64)(first + 4 * k + m) * 128, 2048, at->e_full[slot] + m);
    };
    auto round = [&](int k) {
      const int slot = k & (RING - 1);
      if (4 * k + m < m_tiles) {
        barrier_wait(at->e_full[slot] + m, k / RING & 1);
        const int place = (slot * 4 + m) * 128 + lane;
#pragma unroll
        for (int ks = 0; ks < 4; ks++) Eq[place + ks * 32] = rounded_tile(Es[place + ks * 32]);
      }
      warp_sync();
      if (lane == 0) barrier_arrive(at->q_full + slot);
    };
    for (int k = 0; k < RING; k++) fetch(k);
    round(0), round(1);
    barrier_wait(&at->weights, 0);
#pragma unroll 1
    for (int k = 0; 4 * k < m_tiles; k++) {
      const int slot = k & (RING - 1), g = 4 * k + m;
      round(k + 2);  // all warps have read group k - 2
      barrier_wait(at->z_full + slot, k / RING & 1);
      float h[8][4];
      const u64 z_slab = slab(Z + slot * 1024, RING * 64), w_slab = slab(Wo, 64);
      products_begin();
#pragma unroll
      for (int ks = 0; ks < 8; ks++) product8(h, z_slab + ks * (RING * 2048 >> 4), w_slab + ks * (2048 >> 4), ks);
      products_commit();
      products_wait<0>();
      u32 e[8][2];
#pragma unroll
      for (int np = 0; np < 4; np++) {
        no_load_crosses();
        const float4 *v0 = (const float4*)Vs + np * 8 + l, *v1 = v0 + 4;
        finish_tile(e[2 * np], e[2 * np + 1], h[2 * np], h[2 * np + 1], *v0, *v1, Es[((slot * 4 + m) * 4 + np) * 32 + lane]);
      }
      warp_sync();
      fetch(k + RING);
      half_norm<8>(e, (const uint2*)(Vs + 128), lane);
      if (ffn) {  // rows beyond the end are of anything, and stay alone
        uint4 a[4];
#pragma unroll
        for (int np = 0; np < 4; np++) a[np] = make_uint4(e[2 * np][0], e[2 * np][1], e[2 * np + 1][0], e[2 * np + 1][1]);
        feed_forward(e, a, Wf, Vs + 192, lane);
      }
      if (g < m_tiles)
#pragma unroll
        for (int np = 0; np < 4; np++)
          out[((u64)(first + g) * 4 + np) * 32 + lane] = make_uint4(e[2 * np][0], e[2 * np][1], e[2 * np + 1][0], e[2 * np + 1][1]);
    }
    return;
  }

  const volatile Barriers* share = at;
  uint4 bm[4], ba[4];
  auto load_weights = [&]() {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      bm[ks] = load16(w_mul + (ks * 16 + warp) * 32 + lane);
      ba[ks] = load16(w_add + (ks * 16 + warp) * 32 + lane);
    }
  };
  load_weights();
  uint4* next = Next + warp * 232;
  if (lane < 4) {  // (1, 1) twice, as the products start; (scale, scale, bias, bias): of both n-tiles, read where needed
    const uint4 line0 = lines[warp * 8 + l], line1 = lines[warp * 8 + 4 + l];
    next[192 + l] = make_uint4(line0.x, line0.x, line1.x, line1.x);
    next[196 + l] = make_uint4(line0.y, line1.y, line0.z, line1.z);
  }

  // what a lane knows of its query tile: rows r and r + 8; key and value of row j. [n-tile][row]
  u32 sum[2][2], wv[2][2], shift[2][2], fa[2][2], fm[2][2];
  uint4 key0, key1;
  int left, beyond;  // steps of the tile; those without row r, without row r + 8
  u32 kv0, kv1;
  bool mixed;
  auto load_keys = [&]() { key0 = load16(kv + kv0), key1 = load16(kv + kv1); };  // j >= n of the row: of other rows, finite
  auto places = [&](int tile) { return (const int4*)next + (tile & 1) * 16; };
  // Keys, values and queries of one tile to L2, see edge_wg.cu.
  auto prefetch_tile = [&](int tile) {
    prefetch_bulk(kv + tile * 1024, 16384);
    prefetch_bulk(q + tile * 512, 8192);
  };
  auto ask_places = [&](int tile) {
    if (lane < 16) copy16_async(next + (tile & 1) * 16 + lane, rows + tile * 16 + lane);
  };
  auto ask_tile = [&](int tile) {  // of places that have arrived
    const int4* place = places(tile);
    copy16_async(next + 32 + lane, q + (tile * 16 + warp) * 32 + lane);
    copy16_async(next + 64 + lane, film_e + (place[r].x * 16 + warp) * 4 + l);
    copy16_async(next + 96 + lane, film_e + (place[r + 8].x * 16 + warp) * 4 + l);
  };
  auto arrived = [&]() {
    copy_wait();
    warp_sync();
  };
  auto open_tile = [&]() {  // all that was asked for has arrived
    const int4 row0 = places(t)[r], row1 = places(t)[r + 8];
    const int n = places(t)[0].z;  // the largest comes first
    const uint4 film0 = next[64 + lane], film1 = next[96 + lane];
    next[200 + lane] = next[32 + lane];
    kv0 = row0.y * 64 + warp * 4 + l, kv1 = row1.y * 64 + warp * 4 + l;
    load_keys();
    left = n, beyond = (n - row0.z) | (n - row1.z) << 8;
    mixed = warp_any(beyond != 0);  // and all have read the places
    copy16_async(next + 128 + lane, film_x + (row0.x * 16 + warp) * 4 + l);
    copy16_async(next + 160 + lane, film_x + (row1.x * 16 + warp) * 4 + l);
    const int t_end = share->t_end;
    if (t + 1 < t_end) ask_tile(t + 1);
    if (t + 2 < t_end) {
      ask_places(t + 2);
      if (THREAD == 0) prefetch_tile(t + 2);
    }
    const uint2 shifts = ((const uint2*)(next + 196 + l))[1];
    fm[0][0] = film0.x, fm[1][0] = film0.y, fm[0][1] = film1.x, fm[1][1] = film1.y;
    fa[0][0] = film0.z, fa[1][0] = film0.w, fa[0][1] = film1.z, fa[1][1] = film1.w;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int nt = i >> 1, hi = i & 1;
      sum[nt][hi] = wv[nt][hi] = 0;
      shift[nt][hi] = nt ? shifts.y : shifts.x;
    }
  };
  // One m-tile: its scores to z_row, its part of the softmax.
  auto step = [&](const uint4* a_tile, u8* z_row) {
    const uint4 tile[4] = {a_tile[0], a_tile[32], a_tile[64], a_tile[96]};
    const uint4 one = next[192 + l];
    const uint2 scales = *(const uint2*)(next + 196 + l);
    const u32 scale[2] = {scales.x, scales.y};
    u32 mul[2][2], add[2][2];
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      const uint4& a = tile[ks];
      mma_half(mul[0], a, bm[ks].x, bm[ks].y, ks ? mul[0][0] : one.x, ks ? mul[0][1] : one.y);
      mma_half(mul[1], a, bm[ks].z, bm[ks].w, ks ? mul[1][0] : one.z, ks ? mul[1][1] : one.w);
      mma_half(add[0], a, ba[ks].x, ba[ks].y, ks ? add[0][0] : 0, ks ? add[0][1] : 0);
      mma_half(add[1], a, ba[ks].z, ba[ks].w, ks ? add[1][0] : 0, ks ? add[1][1] : 0);
    }
    // a pair: row r + 8 hi, channels 8 nt + 2 l, + 1
    const uint4 qt = next[200 + lane];
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
        if (left <= (beyond >> 8 * hi & 255)) y[0][hi] = y[1][hi] = 0xfc00fc00u;
    }
    if (warp_any(half_any_above(half_max(half_max(y[0][0], y[0][1]), half_max(y[1][0], y[1][1])), TOP))) {
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
  // The end of a tile.
  auto close_tile = [&]() {
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
        const uint4 qt = next[200 + lane];
        const u32 pair = nt ? (hi ? qt.w : qt.z) : (hi ? qt.y : qt.x);
        const uint4 ones = next[192 + l], line = next[196 + l];
        Element e;
        e.E = (const u16*)E, e.kv = (const u16*)kv, e.w_mul = (const u16*)w_mul, e.w_add = (const u16*)w_add;
        e.q = i & 1 ? half_high(pair) : half_low(pair);
        const u32 one = nt ? ones.z : ones.x, scale = nt ? line.y : line.x, bias = nt ? line.w : line.z;
        e.b_mul = i & 1 ? half_high(one) : half_low(one), e.s_add = i & 1 ? half_high(scale) : half_low(scale);
        e.b_add = i & 1 ? half_high(bias) : half_low(bias);
        e.m_tile = tile_start[t], e.row = r + 8 * hi, e.channel = warp * 16 + nt * 8 + l * 2 + (i & 1);
        const float exact = exact_gather(e, rows[t * 16 + r + 8 * hi]);
#pragma unroll
        for (int k = 0; k < 8; k++) w[k >> 2][k & 3] = k == i ? exact : w[k >> 2][k & 3];
      }
      load_weights();  // not kept meanwhile
    }
    const uint4 x0 = next[128 + lane], x1 = next[160 + lane];  // FiLM of X for the two rows
    auto film = [](float v, u32 m, u32 a, int e) { return e ? fmaf(half_high(m), v, half_high(a)) : fmaf(half_low(m), v, half_low(a)); };
    uint2 out;
    out.x = bytes4(film(w[0][0], x0.x, x0.z, 0), film(w[0][1], x0.x, x0.z, 1), film(w[1][0], x0.y, x0.w, 0), film(w[1][1], x0.y, x0.w, 1));
    out.y = bytes4(film(w[0][2], x1.x, x1.z, 0), film(w[0][3], x1.x, x1.z, 1), film(w[1][2], x1.y, x1.w, 0), film(w[1][3], x1.y, x1.w, 1));
    gathered[((t * 8 + (warp >> 1)) * 32 + lane) * 2 + (warp & 1)] = out;
  };
  ask_places(t);
  if (t + 1 < share->t_end) {
    ask_places(t + 1);
    if (THREAD == 0) prefetch_tile(t + 1);
  }
  arrived();
  ask_tile(t);
  arrived();
  open_tile();

#pragma unroll 1
  for (int i = 0; i < m_tiles;) {
    barrier_wait(at->q_full + (i >> 2 & RING - 1), i / (4 * RING) & 1);
    bool more;  // m-tiles in the group
#pragma unroll 1
    do {
      const int place = i & 4 * RING - 1;
      step(Eq + place * 128 + lane, Z + warp * (RING * 1024) + place * 256 + lane * 4);
      i++;
      more = (i & 3) != 0 && i < m_tiles;
      if (!more) {  // before anything is loaded: the fence would wait for it
        fence_async();
        warp_sync();
        if (lane == 0) barrier_arrive(at->z_full + (i - 1 >> 2 & RING - 1));
      }
      if (--left > 0) {
        kv0 += 64, kv1 += 64;
        load_keys();
      } else {
        arrived();
        close_tile();
        if (++t < share->t_end) open_tile();
      }
    } while (more);
  }
}
