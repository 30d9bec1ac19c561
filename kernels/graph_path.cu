// The y path: pooling of X and E, the update of y, and the FiLM vectors that y gives the next layer.
//
// pool: a warp a graph, rows in order, so the result is a function of the graph only. Padded rows all hold one vector per
// layer (method: a masked row is LayerNorm of a constant), so they enter by count. Output in fragment order.
// graph_in, graph_mid: a block of 4 warps a tile of 16 graphs; y stays in registers, the four warps share the long
// sums (K = 1,344 of the pooled rows; 2,048 hidden channels) and add their parts in a fixed order.
#include "warp.cuh"

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
constexpr int UNROLL = DY > 64 ? 1 : 2;  // of the hidden chunks; wider rows leave no registers for two

struct Pool {
  float sum, sq, low, high, origin;  // sums of x - origin: no cancellation in the variance
  MEMBER void start(float x) { origin = x, sum = sq = 0, low = high = x; }
  MEMBER void add(float x) {
    const float d = x - origin;
    sum += d, sq += d * d, low = fminf(low, x), high = fmaxf(high, x);
  }
  MEMBER void finish(float pad, int count, int total, float (&out)[4]) {
    const float d = pad - origin, more = (float)(total - count);
    if (count < total) low = fminf(low, pad), high = fmaxf(high, pad);
    const float s = sum + more * d, mean = s / total;
    const float var = (sq + more * d * d - s * mean) / (total - 1);
    out[0] = origin + mean, out[1] = low, out[2] = high, out[3] = sqrtf(fmaxf(var, 0.0f));
  }
};

// X [tiles][16][32], E [m-tiles][4][32]; graphs [graphs] {first row, n}; pad: rows' constants, 256 of X then 64 of E;
// z [graphs / 16][80][32]: mean, min, max, std of X, then of E.
KERNEL(128, 8)
pool(const u32* __restrict__ X, const u32* __restrict__ E, const int* __restrict__ tile_start, const int2* __restrict__ graphs,
     const float* __restrict__ pad, u16* __restrict__ z, int count, int n_pad) {
  const int b = BLOCK * 4 + (THREAD >> 5), lane = THREAD & 31;
  if (b >= count) return;
  const int row0 = graphs[b].x, n = graphs[b].y;
  u16* out = z + (u64)(b >> 4) * (POOL_KS * 256);
  float f[4];

#pragma unroll 1
  for (int part = 0; part < 4; part++) {  // a lane owns the pair of channels c, c + 1
    const int c = (part * 32 + lane) * 2;
    const int at = ((c >> 4) * 32 + ((c & 7) >> 1)) * 4 + ((c >> 3) & 1) * 2;
    Pool p0, p1;
    for (int i = 0; i < n; i++) {
      const int row = row0 + i;
      const u32 v = X[(u64)(row >> 4) * 2048 + at + (row & 7) * 16 + (row >> 3 & 1)];
      if (i == 0) p0.start(low(v)), p1.start(high(v));
      p0.add(low(v)), p1.add(high(v));
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      (e ? p1 : p0).finish(pad[c + e], n, n_pad, f);
      for (int k = 0; k < 4; k++) out[tile_offset(b & 15, k * 256 + c + e)] = to_bf16(f[k]);
    }
  }

  const int c = lane * 2, at = ((c >> 4) * 32 + ((c & 7) >> 1)) * 4 + ((c >> 3) & 1) * 2;
  Pool p0, p1;
  for (int i = 0; i < n; i++) {
    const int row = row0 + i;
    const u32* from = E + (u64)tile_start[row >> 4] * 512 + at + (row & 7) * 16 + (row >> 3 & 1);
#pragma unroll 4
    for (int j = 0; j < n; j++) {
      const u32 v = from[j * 512];
      if (i + j == 0) p0.start(low(v)), p1.start(high(v));
      p0.add(low(v)), p1.add(high(v));
    }
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    (e ? p1 : p0).finish(pad[256 + c + e], n * n, n_pad * n_pad, f);
    for (int k = 0; k < 4; k++) out[tile_offset(b & 15, 1024 + k * 64 + c + e)] = to_bf16(f[k]);
  }
}

typedef float Rows[NT][4];

DEV void bias_to(Rows& h, const float* b, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const float2 v = *(const float2*)(b + nt * 8 + (lane & 3) * 2);
    h[nt][0] += v.x, h[nt][1] += v.y, h[nt][2] += v.x, h[nt][3] += v.y;
  }
}

DEV void clear(Rows& h) {
#pragma unroll
  for (int i = 0; i < NT * 4; i++) h[i >> 2][i & 3] = 0;
}

DEV void relu_rows(Rows& h) {
#pragma unroll
  for (int i = 0; i < NT * 4; i++) h[i >> 2][i & 3] = relu(h[i >> 2][i & 3]);
}

DEV void to_tiles(uint4 (&a)[KS], const Rows& h) {
#pragma unroll
  for (int ks = 0; ks < KS; ks++) a[ks] = pack_tile(h[2 * ks], h[2 * ks + 1]);
}

DEV void add_product(Rows& h, const uint4& a, const uint4* w, int lane) {  // one k step, w: [KS pairs][32]
#pragma unroll
  for (int np = 0; np < KS; np++) {
    const uint4 b = load16(w + np * 32 + lane);
    mma(h[2 * np], a, b.x, b.y, h[2 * np]);
    mma(h[2 * np + 1], a, b.z, b.w, h[2 * np + 1]);
  }
}

// h += W2 relu(W1 a + b1) over the hidden chunks (16 channels each) first .. last - 1 of `chunks`.
template <int KS1>
DEV void add_mlp(Rows& h, const uint4* a, const uint4* w1, const float* b1, const uint4* w2, int chunks, int first, int last,
                 int lane) {
#pragma unroll UNROLL
  for (int chunk = first; chunk < last; chunk++) {
    float hidden[2][4];
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const float2 v = *(const float2*)(b1 + chunk * 16 + nt * 8 + (lane & 3) * 2);
      hidden[nt][0] = hidden[nt][2] = v.x, hidden[nt][1] = hidden[nt][3] = v.y;
    }
#pragma unroll
    for (int ks = 0; ks < KS1; ks++) {
      const uint4 b = load16(w1 + (ks * chunks + chunk) * 32 + lane);
      mma(hidden[0], a[ks], b.x, b.y, hidden[0]);
      mma(hidden[1], a[ks], b.z, b.w, hidden[1]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) hidden[i >> 2][i & 3] = relu(hidden[i >> 2][i & 3]);
    add_product(h, pack_tile(hidden[0], hidden[1]), w2 + chunk * KS * 32, lane);
  }
}

// The sum of the four warps' h, in the order of the warps, to all of them.
DEV void sum_warps(Rows& h, float4* part, int warp, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float4 v;
    v.x = h[nt][0], v.y = h[nt][1], v.z = h[nt][2], v.w = h[nt][3];
    part[(warp * NT + nt) * 32 + lane] = v;
  }
  block_sync();
  clear(h);
#pragma unroll
  for (int w = 0; w < 4; w++) {
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      const float4 v = part[(w * NT + nt) * 32 + lane];
      h[nt][0] += v.x, h[nt][1] += v.y, h[nt][2] += v.z, h[nt][3] += v.w;
    }
  }
  block_sync();
}

// Warp 0: e_mul, 1: e_add, 2: x_mul, 3: x_add; to [graphs][16][4 lanes][mul x 4, add x 4]. w: four packed [256, DY].
DEV void film(const uint4 (&a)[KS], const uint4* w, const float* bias, uint2* film_e, uint2* film_x, int tile, int warp,
              int lane) {
  uint2* to = warp < 2 ? film_e : film_x;
#pragma unroll UNROLL
  for (int np = 0; np < 16; np++) {
    float o[2][4];
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const float2 v = *(const float2*)(bias + warp * 256 + np * 16 + nt * 8 + (lane & 3) * 2);
      o[nt][0] = o[nt][2] = v.x, o[nt][1] = o[nt][3] = v.y;
    }
#pragma unroll
    for (int ks = 0; ks < KS; ks++) {
      const uint4 b = load16(w + ((warp * KS + ks) * 16 + np) * 32 + lane);
      mma(o[0], a[ks], b.x, b.y, o[0]);
      mma(o[1], a[ks], b.z, b.w, o[1]);
    }
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      const int graph = tile * 16 + hi * 8 + (lane >> 2);
      to[((graph * 16 + np) * 4 + (lane & 3)) * 2 + (warp & 1)] =
          make_uint2(pack2(o[0][2 * hi], o[0][2 * hi + 1]), pack2(o[1][2 * hi], o[1][2 * hi + 1]));
    }
  }
}

// features [tiles][32]; y [tiles][KS][32]; w: packed [HIDDEN_Y, 16], [DY, HIDDEN_Y], film; vec: their biases.
KERNEL(128, DY > 64 ? 2 : 3)
graph_in(const uint4* features, uint4* y, uint2* film_e, uint2* film_x, const uint4* w, const float* vec) {
  const int warp = THREAD >> 5, lane = THREAD & 31, tile = BLOCK;
  uint4 f[1] = {load16(features + tile * 32 + lane)}, a[KS];
  Rows h;
  clear(h);
  add_mlp<1>(h, f, w, vec, w + HIDDEN_Y * 2, HIDDEN_Y / 16, 0, HIDDEN_Y / 16, lane);
  bias_to(h, vec + HIDDEN_Y, lane);
  relu_rows(h);
  to_tiles(a, h);
  if (warp == 0)
    for (int ks = 0; ks < KS; ks++) y[(tile * KS + ks) * 32 + lane] = a[ks];
  film(a, w + HIDDEN_Y * 2 + HIDDEN_Y / 16 * KS * 32, vec + HIDDEN_Y + DY, film_e, film_x, tile, warp, lane);
}

// z: what pool wrote; y is replaced. w: packed [DY, DY + 1280] of (y_y, x_y, e_y), y_out.0, y_out.2, lin_y1 [2048, DY],
// lin_y2 [DY, 2048], film of the next layer; vec: sum of the three biases, y_out.0, y_out.2, norm 1 (gamma, beta),
// lin_y1, lin_y2, norm 2, film.
KERNEL(128, DY > 64 ? 2 : 3)
graph_mid(const uint4* z, uint4* y, uint2* film_e, uint2* film_x, const uint4* w, const float* vec) {
  SHARED(shared);
  float4* part = (float4*)shared;  // [4][NT][32]
  const int warp = THREAD >> 5, lane = THREAD & 31, tile = BLOCK;
  const int steps = (KS + POOL_KS) / 4;
  uint4 a[KS];
  Rows h;
  clear(h);
#pragma unroll UNROLL
  for (int ks = warp * steps; ks < (warp + 1) * steps; ks++) {
    const uint4 in = load16(ks < KS ? y + (tile * KS + ks) * 32 + lane : z + (tile * POOL_KS + ks - KS) * 32 + lane);
    add_product(h, in, w + ks * KS * 32, lane);
  }
  sum_warps(h, part, warp, lane);
  bias_to(h, vec, lane);
  w += (KS + POOL_KS) * KS * 32, vec += DY;
#pragma unroll 1
  for (int layer = 0; layer < 2; layer++) {
    to_tiles(a, h);
    clear(h);
#pragma unroll
    for (int ks = 0; ks < KS; ks++) add_product(h, a[ks], w + ks * KS * 32, lane);
    bias_to(h, vec, lane);
    if (layer == 0) relu_rows(h);
    w += KS * KS * 32, vec += DY;
  }
#pragma unroll
  for (int ks = 0; ks < KS; ks++) add_tile(h[2 * ks], h[2 * ks + 1], y[(tile * KS + ks) * 32 + lane]);
  layer_norm<NT>(h, vec, vec + DY, lane);
  vec += 2 * DY;
  to_tiles(a, h);

  clear(h);  // y itself is still there as a
  add_mlp<KS>(h, a, w, vec, w + KS * (FFY / 16) * 32, FFY / 16, warp * (FFY / 64), (warp + 1) * (FFY / 64), lane);
  w += 2 * KS * (FFY / 16) * 32, vec += FFY;
  sum_warps(h, part, warp, lane);
  bias_to(h, vec, lane);
  vec += DY;
#pragma unroll
  for (int ks = 0; ks < KS; ks++) add_tile(h[2 * ks], h[2 * ks + 1], a[ks]);
  layer_norm<NT>(h, vec, vec + DY, lane);
  vec += 2 * DY;
  to_tiles(a, h);
  if (warp == 0)  // every warp has read y: there are barriers above
    for (int ks = 0; ks < KS; ks++) y[(tile * KS + ks) * 32 + lane] = a[ks];
  film(a, w, vec, film_e, film_x, tile, warp, lane);
}
