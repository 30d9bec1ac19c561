// Rows of y of a block of graph_path.cu: what a warp does to them. In bf16, or with 8-bit floats where FP8 is set.
//
// A tile is 16 graphs in fragment order; DY, NT, KS, TILES and the like are those of the source that includes this.
#pragma once
#include "warp.cuh"
#if FP8
#include "fp8.cuh"
#endif

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
