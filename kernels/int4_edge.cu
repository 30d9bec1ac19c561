// All that a layer of a 4-bit network does to its edges, in one launch: the scores of attention, the softmax over j and the sum
// of values, e_out, residual and LayerNorm, the feed-forward net. No tensor [B, n, n, 256] is ever in memory.
//
// A warp owns the edges (i, j = 0 .. n - 1) of 32 / n nodes of one graph, 32 rows at most, from first to last:
//   scores: 32 of 256 channels at a time: e_mul and e_add, times q k, FiLM; what e_out will read waits as bf16 in shared memory,
//           where a lane reads only what it wrote. The softmax goes through shared memory: a lane takes one channel of a node.
//   e_out and the net: each result is in the registers of the lane that needs it for the next product (int4_rows.cuh).
// Warps of a block take the weights of a round at the same time, so that they come from L1. Sums have one order: a graph's
// result depends on the graph alone. E and sums stay in float32; inputs of products are rounded as quant/linear.py does it,
// those of branches to bf16, and what lies between two products of the net (256 and 128 channels) to bf16.
#include "int4_rows.cuh"

#define WARPS 4
#define SCORE_STRIDE 36
#define Z_WORDS (8 * 4 * 32)                       // uint4 [8 rounds][tile, row r or r + 8][32 lanes]
#define APART_WORDS 256                            // of two tiles of 64 channels
#define WARP_WORDS (Z_WORDS + APART_WORDS + 32 * SCORE_STRIDE / 4)  // the last two, 8.5 KB, hold all later outliers

DEV void as_floats(float (&v)[8], const uint4& p, const uint4& q) {
  v[0] = as_float(p.x), v[1] = as_float(p.y), v[2] = as_float(p.z), v[3] = as_float(p.w);
  v[4] = as_float(q.x), v[5] = as_float(q.y), v[6] = as_float(q.z), v[7] = as_float(q.w);
}
DEV void take8(float (&v)[8], const float* shared) { as_floats(v, ((const uint4*)shared)[0], ((const uint4*)shared)[1]); }

struct Linear {
  Weights by;
  Limits limits;
};

// LayerNorm of a row of 64 channels, 16 in each lane of a quad: 8 l + i and 32 + 8 l + i. vec: gamma [64], beta [64].
DEV void norm64(float (&v)[2][8], const float* vec, int l) {
  float sum = 0, square = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) sum += v[i >> 3][i & 7];
  const float mean = quad_sum(sum) * (1.0f / 64);
#pragma unroll
  for (int i = 0; i < 16; i++) v[i >> 3][i & 7] -= mean, square += v[i >> 3][i & 7] * v[i >> 3][i & 7];
  const float inverse = rsqrtf(quad_sum(square) * (1.0f / 64) + 1e-5f);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float gamma[8], beta[8];
    load8(gamma, vec + h * 32 + l * 8), load8(beta, vec + 64 + h * 32 + l * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) v[h][i] = fmaf(v[h][i] * inverse, gamma[i], beta[i]);
  }
}

template <bool ASYMMETRIC>
DEV void edge(const float* __restrict__ E, float* __restrict__ out, const float* __restrict__ q, const float* __restrict__ k,
              const float* __restrict__ v, const float* __restrict__ film_mul, const float* __restrict__ film_add,
              const int* __restrict__ counts, float* __restrict__ gathered, const Linear* __restrict__ linears,
              const float* __restrict__ norms, int graphs, int n, u8* shared) {
  const int warp = THREAD >> 5, lane = THREAD & 31, r = lane >> 2, l = lane & 3;
  uint4* Z = (uint4*)shared + warp * WARP_WORDS;
  uint4* apart = Z + Z_WORDS;
  float* scores = (float*)(apart + APART_WORDS);
  const int nodes = 32 / n, parts = (n + nodes - 1) / nodes;  // of a warp; warps of a graph
  const int group = BLOCK * WARPS + warp;
  const bool there = group < graphs * parts;
  const int b = there ? group / parts : 0, i0 = there ? group % parts * nodes : 0;
  const int mine = there ? min(nodes, n - i0) : 0, rows = mine * n, count = counts[b];
  const u64 first = ((u64)b * n + i0) * n;  // edges (i0, 0) .. follow each other
  auto row_of = [&](int mt, int hi) { return mt * 16 + hi * 8 + r; };

  {
    Tokens<1, 2, ASYMMETRIC> e;
#pragma unroll
    for (int t = 0; t < 16; t++) {  // asked for three times, so kept in shared memory meanwhile
      const int row = row_of(t >> 3, t >> 2 & 1);
      const float* at = E + (first + row) * 64 + (t >> 1 & 1) * 32 + l * 8 + (t & 1) * 4;
      Z[t * 32 + lane] = row < rows ? load16(at) : make_uint4(0, 0, 0, 0);
    }
    auto get = [&](float (&x)[8], int mt, int, int h, int hi) {
      const uint4* at = Z + (mt * 8 + hi * 4 + h * 2) * 32 + lane;
      as_floats(x, at[0], at[32]);
    };
    e.take(get, linears[0].limits, apart, lane);
#pragma unroll 1
    for (int n0 = 0; n0 < 256; n0 += CHANNELS) {
      block_sync();  // the same weights for all
      auto place = [&](int t) { return scores + row_of(t >> 1, t & 1) * SCORE_STRIDE + l * 8; };
      {
        float mul[2][2][8];
        e.multiply(mul, linears[0].by, 256, n0, lane);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          const int row = row_of(t >> 1, t & 1);
          float x[8], y[8];
#pragma unroll
          for (int i = 0; i < 8; i++) x[i] = y[i] = 0;
          if (row < rows) {
            load8(x, q + ((u64)b * n + i0 + row / n) * 256 + n0 + l * 8);
            load8(y, k + ((u64)b * n + row % n) * 256 + n0 + l * 8);
          }
#pragma unroll
          for (int i = 0; i < 8; i++) x[i] *= y[i] * (mul[t >> 1][t & 1][i] + 1.0f);
          store8(place(t), x);
        }
      }
      {
        float add[2][2][8];
        e.multiply(add, linears[1].by, 256, n0, lane);
        float film[2][8];
        load8(film[0], film_mul + (u64)b * 256 + n0 + l * 8), load8(film[1], film_add + (u64)b * 256 + n0 + l * 8);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          float z[8], s[8];
          take8(s, place(t));
#pragma unroll
          for (int i = 0; i < 8; i++) {
            s[i] += add[t >> 1][t & 1][i];
            z[i] = fmaf(s[i], film[0][i] + 1.0f, film[1][i]);
          }
          Z[((n0 >> 5) * 4 + t) * 32 + lane] = pack8(z);
          store8(place(t), s);
        }
      }
      warp_sync();
#pragma unroll 1
      for (int node = 0; node < mine; node++) {  // one channel a lane
        const float* own = scores + node * n * SCORE_STRIDE + lane;
        const float* value = v + (u64)b * n * 256 + n0 + lane;
        float top = -3.4028235e38f, sum = 0, total = 0;
        for (int j = 0; j < count; j++) top = fmaxf(top, own[j * SCORE_STRIDE]);
        for (int j = 0; j < count; j++) {
          const float p = exp2_fast((own[j * SCORE_STRIDE] - top) * 1.44269504f);
          sum += p, total = fmaf(p, value[j * 256], total);
        }
        gathered[((u64)b * n + i0 + node) * 256 + n0 + lane] = count ? total / sum : 0.0f;
      }
      warp_sync();
    }
  }

  // A row's E between the two LayerNorms waits where its input of e_out was: rounds 4 .. 7; rounds 0 .. 3 are the net's.
  auto between = [&](int mt, int hi, int half, int part) { return Z + ((4 + half * 2 + part) * 4 + mt * 2 + hi) * 32 + lane; };
#pragma unroll 1
  for (int mt = 0; mt < 2; mt++) {
    float h[2][2][8];  // [row r, r + 8][32 channels]
    Tokens<4, 1, ASYMMETRIC, true> z;
    z.kept = Z + mt * 64 + lane;
    auto get = [&](float (&x)[8], int, int c, int half, int hi) { unpack8(x, z.row(0, c, half, hi)); };
    z.take(get, linears[2].limits, apart, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float y[1][2][8];
      z.multiply(y, linears[2].by, 64, half * 32, lane);
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const int row = row_of(mt, hi), i = i0 + row / n, j = row % n;
        float e[8];
#pragma unroll
        for (int c = 0; c < 8; c++) e[c] = 0;
        if (row < rows) load8(e, E + (first + row) * 64 + half * 32 + l * 8);
#pragma unroll
        for (int c = 0; c < 8; c++) h[hi][half][c] = i < count && j < count ? e[c] + y[0][hi][c] : e[c];
      }
    }
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      norm64(h[hi], norms, l);
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float* x = h[hi][p >> 1] + (p & 1) * 4;
        *between(mt, hi, p >> 1, p & 1) = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
      }
    }
  }
  auto take_between = [&](float (&x)[8], int mt, int hi, int half) {
    as_floats(x, *between(mt, hi, half, 0), *between(mt, hi, half, 1));
  };

  {
    Tokens<1, 2, ASYMMETRIC> e;
    auto get = [&](float (&x)[8], int mt, int, int half, int hi) { take_between(x, mt, hi, half); };
    e.take(get, linears[3].limits, apart, lane);
#pragma unroll 1
    for (int n0 = 0; n0 < 128; n0 += CHANNELS) {
      float y[2][2][8];
      e.multiply(y, linears[3].by, 128, n0, lane);
#pragma unroll
      for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int i = 0; i < 8; i++) y[t >> 1][t & 1][i] = relu(y[t >> 1][t & 1][i]);
        Z[((n0 >> 5) * 4 + t) * 32 + lane] = pack8(y[t >> 1][t & 1]);
      }
    }
  }
#pragma unroll 1
  for (int mt = 0; mt < 2; mt++) {
    Tokens<2, 1, ASYMMETRIC, true> z;
    z.kept = Z + mt * 64 + lane;
    auto get = [&](float (&x)[8], int, int c, int half, int hi) { unpack8(x, z.row(0, c, half, hi)); };
    z.take(get, linears[4].limits, apart, lane);
    float h[2][2][8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float y[1][2][8];
      z.multiply(y, linears[4].by, 64, half * 32, lane);
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        take_between(h[hi][half], mt, hi, half);
#pragma unroll
        for (int i = 0; i < 8; i++) h[hi][half][i] += y[0][hi][i];
      }
    }
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      norm64(h[hi], norms + 128, l);
      if (row_of(mt, hi) < rows)
#pragma unroll
        for (int half = 0; half < 2; half++) store8(out + (first + row_of(mt, hi)) * 64 + half * 32 + l * 8, h[hi][half]);
    }
  }
}

// E, out: float32 [graphs][n][n][64], padded rows too; q (times 1 / sqrt(df)), k, v, gathered: float32 [graphs][n][256];
// film_mul, film_add: float32 [graphs][256]; counts [graphs]: nodes that are there, the first ones. linears: e_mul, e_add (its
// limits are not read), e_out, linE1, linE2; norms: gamma [64] and beta [64] of normE1, then of normE2. n <= 32.
#define INT4_EDGE(NAME, ASYMMETRIC)                                                                                              \
  KERNEL(128, 2)                                                                                                               \
  NAME(const float* E, float* out, const float* q, const float* k, const float* v, const float* film_mul, const float* film_add, \
       const int* counts, float* gathered, const Linear* linears, const float* norms, int graphs, int n) {                     \
    SHARED(shared);                                                                                                            \
    edge<ASYMMETRIC>(E, out, q, k, v, film_mul, film_add, counts, gathered, linears, norms, graphs, n, shared);                \
  }
INT4_EDGE(int4_edge, false)
INT4_EDGE(int4_edge_asymmetric, true)
