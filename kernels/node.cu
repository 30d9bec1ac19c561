// Everything a layer does to rows of X, three variants of one chain of 256 x 256 products:
//   node_in:  input MLP,                                       then q, k, v of layer 0
//   node_mid: x_out + X, LayerNorm, linX1, linX2, LayerNorm,   then q, k, v of the next layer
//   node_out: the same of the last layer,                      then the output MLP: logits
//
// A block of 8 warps owns 8 query tiles (128 rows x 256 channels; 4 where an SM has less than 132 KB of shared memory).
// Activations live in shared memory in fragment order (X 64 KB, hidden 64 KB), weights stream from L2 straight into B
// fragments (both warps that share one take it from L1). Warp (m, n) = (warp / 4, warp % 4) computes 4 tiles x 64
// channels: 128 float accumulators a lane, 32 products for each 8 loads of 16 bytes. Operations a row: 6 x 65,536 MAC;
// bytes a row: 0.5 KB X, 0.5 KB gathered in, 2 KB out.
#include "warp.cuh"

#ifndef NODE_TILES
#define NODE_TILES 8
#endif
#define TILES NODE_TILES
#define MT (TILES / 2)  // of a warp

struct Place {
  int m, n, lane;
  MEMBER int tile(int mt) const { return m * MT + mt; }
  MEMBER int channel(int nt) const { return n * 64 + nt * 8 + (lane & 3) * 2; }
  MEMBER int at(int mt, int np) const { return (tile(mt) * 16 + n * 4 + np) * 32 + lane; }
};

typedef float Acc[MT][8][4];

// acc = bias + A W^T. A: [TILES][16][32] in shared memory, W: packed [256, 16 KS] in global memory.
template <int KS>
DEV void product(Acc& acc, const uint4* A, const uint4* __restrict__ W, const float* __restrict__ bias, const Place& at) {
#pragma unroll
  for (int nt = 0; nt < 8; nt++) {
    const float2 b = *(const float2*)(bias + at.channel(nt));
#pragma unroll
    for (int mt = 0; mt < MT; mt++) acc[mt][nt][0] = acc[mt][nt][2] = b.x, acc[mt][nt][1] = acc[mt][nt][3] = b.y;
  }
  uint4 b[4];
#pragma unroll
  for (int np = 0; np < 4; np++) b[np] = load16(W + (at.n * 4 + np) * 32 + at.lane);
#pragma unroll 2
  for (int ks = 0; ks < KS; ks++) {
    uint4 next[4];
    if (ks + 1 < KS) {
#pragma unroll
      for (int np = 0; np < 4; np++) next[np] = load16(W + ((ks + 1) * 16 + at.n * 4 + np) * 32 + at.lane);
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const uint4 a = A[(at.tile(mt) * 16 + ks) * 32 + at.lane];
#pragma unroll
      for (int np = 0; np < 4; np++) {
        mma(acc[mt][2 * np], a, b[np].x, b[np].y, acc[mt][2 * np]);
        mma(acc[mt][2 * np + 1], a, b[np].z, b[np].w, acc[mt][2 * np + 1]);
      }
    }
#pragma unroll
    for (int np = 0; np < 4; np++) b[np] = next[np];
  }
}

DEV void relu_all(Acc& acc) {
#pragma unroll
  for (int i = 0; i < MT * 32; i++) acc[i >> 5][i >> 2 & 7][i & 3] = relu(acc[i >> 5][i >> 2 & 7][i & 3]);
}

DEV void to_shared(const Acc& acc, uint4* to, const Place& at) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int np = 0; np < 4; np++) to[at.at(mt, np)] = pack_tile(acc[mt][2 * np], acc[mt][2 * np + 1]);
}

DEV void add_shared(Acc& acc, const uint4* from, const Place& at) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int np = 0; np < 4; np++) add_tile(acc[mt][2 * np], acc[mt][2 * np + 1], from[at.at(mt, np)]);
}

// Sum over the 256 channels of each row, spread over a quad of lanes and four warps. part: [16 TILES rows][4].
DEV void row_sums(float (&sum)[MT][2], float* part, const Place& at) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      const float s = quad_sum(sum[mt][hi]);
      if ((at.lane & 3) == 0) part[(at.tile(mt) * 16 + hi * 8 + (at.lane >> 2)) * 4 + at.n] = s;
    }
  block_sync();
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      const float4 p = *(const float4*)(part + (at.tile(mt) * 16 + hi * 8 + (at.lane >> 2)) * 4);
      sum[mt][hi] = (p.x + p.y) + (p.z + p.w);
    }
}

// LayerNorm over 256 channels; norm: gamma then beta. Two barriers inside: all products before it are over after it.
DEV void row_norm(Acc& acc, const float* norm, float* part, const Place& at) {
  float mean[MT][2], sq[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      mean[mt][hi] = 0;
#pragma unroll
      for (int nt = 0; nt < 8; nt++) mean[mt][hi] += acc[mt][nt][2 * hi] + acc[mt][nt][2 * hi + 1];
    }
  row_sums(mean, part, at);
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      sq[mt][hi] = 0;
#pragma unroll
      for (int nt = 0; nt < 8; nt++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& v = acc[mt][nt][2 * hi + e];
          v -= mean[mt][hi] * (1.0f / 256);
          sq[mt][hi] += v * v;
        }
    }
  row_sums(sq, part + TILES * 16 * 4, at);
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) sq[mt][hi] = rsqrtf(sq[mt][hi] * (1.0f / 256) + 1e-5f);
#pragma unroll
  for (int nt = 0; nt < 8; nt++) {
    const float2 gamma = *(const float2*)(norm + at.channel(nt)), beta = *(const float2*)(norm + 256 + at.channel(nt));
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        acc[mt][nt][2 * hi] = acc[mt][nt][2 * hi] * sq[mt][hi] * gamma.x + beta.x;
        acc[mt][nt][2 * hi + 1] = acc[mt][nt][2 * hi + 1] * sq[mt][hi] * gamma.y + beta.y;
      }
  }
}

DEV void to_global(const Acc& acc, uint4* to, int first, int tiles, const Place& at) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
    if (first + at.tile(mt) < tiles)
#pragma unroll
      for (int np = 0; np < 4; np++)
        to[(u64)first * 512 + at.at(mt, np)] = pack_tile(acc[mt][2 * np], acc[mt][2 * np + 1]);
}

// Keys (half 0) or values (half 1) by row: [rows][16 channels / 4 lanes][k0..3 v0..3].
DEV void to_rows(const Acc& acc, uint2* kv, int half, int first, int tiles, const Place& at) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
    if (first + at.tile(mt) < tiles)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const int row = (first + at.tile(mt)) * 16 + hi * 8 + (at.lane >> 2);
#pragma unroll
        for (int np = 0; np < 4; np++) {
          const float(&a)[4] = acc[mt][2 * np], (&b)[4] = acc[mt][2 * np + 1];
          kv[((u64)row * 64 + (at.n * 4 + np) * 4 + (at.lane & 3)) * 2 + half] =
              make_uint2(pack2(a[2 * hi], a[2 * hi + 1]), pack2(b[2 * hi], b[2 * hi + 1]));
        }
      }
}

DEV void tiles_to_shared(uint4* to, const uint4* from, int first, int tiles, int words) {
  const int n = min(TILES, tiles - first) * words;
  for (int i = THREAD; i < TILES * words; i += 256) {  // what is beyond the last tile is a copy of it
    const int word = i < n ? i : n - words + i % words;
    copy16_async(to + (i / words) * 512 + i % words, from + (u64)first * words + word);
  }
}

// w: six packed [256, 256] (x_out, lin1, lin2, q, k, v); vec: 256 each of their six biases, then two norms (gamma, beta).
DEV void update(Acc& acc, uint4* X, uint4* H, float* part, const uint4* w, const float* vec, const Place& at) {
  product<16>(acc, H, w, vec, at);
  add_shared(acc, X, at);
  row_norm(acc, vec + 6 * 256, part, at);
  to_shared(acc, X, at);
  block_sync();
  product<16>(acc, X, w + 8192, vec + 256, at);
  relu_all(acc);
  to_shared(acc, H, at);
  block_sync();
  product<16>(acc, H, w + 2 * 8192, vec + 2 * 256, at);
  add_shared(acc, X, at);
  row_norm(acc, vec + 8 * 256, part, at);
  to_shared(acc, X, at);
}

DEV void queries(Acc& acc, const uint4* X, const uint4* w, const float* vec, uint4* q, uint4* kv, int first, int tiles,
                 const Place& at) {
  product<16>(acc, X, w, vec, at);
  to_global(acc, q, first, tiles, at);
  product<16>(acc, X, w + 8192, vec + 256, at);
  to_rows(acc, (uint2*)kv, 0, first, tiles, at);
  product<16>(acc, X, w + 2 * 8192, vec + 512, at);
  to_rows(acc, (uint2*)kv, 1, first, tiles, at);
}

// features: [tiles][IN_KS][32]; X, q: [tiles][16][32]; kv: [rows][64]; w: packed [256, 16 IN_KS], then [256, 256] second
// input Linear, q, k, v; vec: their five biases.
#ifndef IN_KS
#define IN_KS 1
#endif
KERNEL(256, 1)
node_in(const uint4* features, uint4* X, uint4* q, uint4* kv, const uint4* w, const float* vec, int tiles) {
  SHARED(shared);
  uint4 *Xs = (uint4*)shared, *Hs = Xs + TILES * 512;
  const Place at = {THREAD >> 7, THREAD >> 5 & 3, THREAD & 31};
  const int first = BLOCK * TILES;
  Acc acc;
  tiles_to_shared(Hs, features, first, tiles, IN_KS * 32);
  copy_wait();
  block_sync();
  product<IN_KS>(acc, Hs, w, vec, at);
  relu_all(acc);
  to_shared(acc, Xs, at);
  block_sync();
  product<16>(acc, Xs, w + IN_KS * 512, vec + 256, at);
  relu_all(acc);
  to_shared(acc, Hs, at);
  to_global(acc, X, first, tiles, at);
  block_sync();
  queries(acc, Hs, w + IN_KS * 512 + 8192, vec + 512, q, kv, first, tiles, at);
}

// gathered: [tiles][16][32], what edge_attend wrote; X is replaced; w, vec: see update.
KERNEL(256, 1)
node_mid(const uint4* gathered, uint4* X, uint4* q, uint4* kv, const uint4* w, const float* vec, int tiles) {
  SHARED(shared);
  uint4 *Xs = (uint4*)shared, *Hs = Xs + TILES * 512;
  float* part = (float*)(Hs + TILES * 512);
  const Place at = {THREAD >> 7, THREAD >> 5 & 3, THREAD & 31};
  const int first = BLOCK * TILES;
  Acc acc;
  tiles_to_shared(Hs, gathered, first, tiles, 512);
  tiles_to_shared(Xs, X, first, tiles, 512);
  copy_wait();
  block_sync();
  update(acc, Xs, Hs, part, w, vec, at);
  to_global(acc, X, first, tiles, at);
  block_sync();
  queries(acc, Xs, w + 3 * 8192, vec + 3 * 256, q, kv, first, tiles, at);
}

// logits: float [tiles][16 rows][16]; w: x_out, lin1, lin2, first output Linear, then packed [16, 256] of the second;
// vec: as in update with the biases of the output MLP in the places of q (256) and k (16).
KERNEL(256, 1)
node_out(const uint4* gathered, const uint4* X, float* logits, const uint4* w, const float* vec, int tiles) {
  SHARED(shared);
  uint4 *Xs = (uint4*)shared, *Hs = Xs + TILES * 512;
  float* part = (float*)(Hs + TILES * 512);
  const Place at = {THREAD >> 7, THREAD >> 5 & 3, THREAD & 31};
  const int first = BLOCK * TILES;
  Acc acc;
  tiles_to_shared(Hs, gathered, first, tiles, 512);
  tiles_to_shared(Xs, X, first, tiles, 512);
  copy_wait();
  block_sync();
  update(acc, Xs, Hs, part, w, vec, at);
  block_sync();
  product<16>(acc, Xs, w + 3 * 8192, vec + 3 * 256, at);
  relu_all(acc);
  to_shared(acc, Hs, at);
  block_sync();

  const int mt = THREAD >> 5, c = (at.lane & 3) * 2;  // one tile a warp
  if (mt >= TILES) return;
  float o[2][4];
#pragma unroll
  for (int nt = 0; nt < 2; nt++) {
    const float2 b = *(const float2*)(vec + 4 * 256 + nt * 8 + c);
    o[nt][0] = o[nt][2] = b.x, o[nt][1] = o[nt][3] = b.y;
  }
#pragma unroll 4
  for (int ks = 0; ks < 16; ks++) {
    const uint4 a = Hs[(mt * 16 + ks) * 32 + at.lane], b = load16(w + 4 * 8192 + ks * 32 + at.lane);
    mma(o[0], a, b.x, b.y, o[0]);
    mma(o[1], a, b.z, b.w, o[1]);
  }
  if (first + mt < tiles)
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      float* to = logits + (u64)(first + mt) * 256 + (at.lane >> 2) * 16 + nt * 8 + c;
      *(float2*)to = make_float2(o[nt][0], o[nt][1]);
      *(float2*)(to + 128) = make_float2(o[nt][2], o[nt][3]);
    }
}
