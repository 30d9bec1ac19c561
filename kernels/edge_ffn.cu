// Feed-forward net of E, residual and LayerNorm; in the last layer (edge_ffn_out) also the output MLP of E.
//
// Rows are independent: a warp takes two m-tiles (32 rows x 64 channels, 4 KB) into registers, runs 64 -> 128 -> 64 in
// chunks of 16 hidden channels that never leave registers, and writes 4 KB back. Weights are in shared memory, 32 KB (52
// with the output MLP). Operations an edge: 16,384 MAC, 256 bytes of global memory: 128 FLOP a byte.
#include "warp.cuh"

DEV void load_shared(uint4* to, const uint4* from, int n) {
  for (int i = THREAD; i < n; i += 128) copy16_async(to + i, from + i);
}

// h += W2 relu(W1 a + b1), 16 hidden channels at a time. a: [2][4]; N2 n-tiles out, the packed width of W2 is PAIRS2.
template <int N2, int PAIRS2>
DEV void mlp(float (&h)[2][N2][4], const uint4 (&a)[2][4], const uint4* W1, const float* b1, const uint4* W2, int lane) {
#pragma unroll 1
  for (int chunk = 0; chunk < 8; chunk++) {
    float hidden[2][2][4];
#pragma unroll
    for (int nt = 0; nt < 2; nt++) {
      const float2 b = *(const float2*)(b1 + chunk * 16 + nt * 8 + (lane & 3) * 2);
#pragma unroll
      for (int mt = 0; mt < 2; mt++) hidden[mt][nt][0] = hidden[mt][nt][2] = b.x, hidden[mt][nt][1] = hidden[mt][nt][3] = b.y;
    }
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      const uint4 b = W1[(ks * 8 + chunk) * 32 + lane];
#pragma unroll
      for (int mt = 0; mt < 2; mt++) {
        mma(hidden[mt][0], a[mt][ks], b.x, b.y, hidden[mt][0]);
        mma(hidden[mt][1], a[mt][ks], b.z, b.w, hidden[mt][1]);
      }
    }
    uint4 a2[2];
#pragma unroll
    for (int mt = 0; mt < 2; mt++) {
#pragma unroll
      for (int i = 0; i < 8; i++) hidden[mt][i >> 2][i & 3] = relu(hidden[mt][i >> 2][i & 3]);
      a2[mt] = pack_tile(hidden[mt][0], hidden[mt][1]);
    }
#pragma unroll
    for (int np = 0; np < PAIRS2; np++) {
      const uint4 b = W2[(chunk * PAIRS2 + np) * 32 + lane];
#pragma unroll
      for (int mt = 0; mt < 2; mt++) {
        mma(h[mt][2 * np], a2[mt], b.x, b.y, h[mt][2 * np]);
        if (2 * np + 1 < N2) mma(h[mt][(2 * np + 1) % N2], a2[mt], b.z, b.w, h[mt][(2 * np + 1) % N2]);
      }
    }
  }
}

template <bool OUT>
DEV void run(u8* shared, const uint4* E1, uint4* E, int m_tiles, const uint4* w1, const uint4* w2, const float* vec,
             const uint4* w3, const uint4* w4, float* logits) {
  uint4* W1 = (uint4*)shared;                  // [4][8][32]
  uint4* W2 = W1 + 1024;                       // [8][4][32]
  uint4* W3 = W2 + 1024;                       // [4][8][32]
  uint4* W4 = W3 + (OUT ? 1024 : 0);           // [8][1][32]
  float* V = (float*)(W4 + (OUT ? 256 : 0));   // b1 128, b2 64, gamma 64, beta 64, then b3 128, b4 8
  load_shared(W1, w1, 1024);
  load_shared(W2, w2, 1024);
  if (OUT) load_shared(W3, w3, 1024), load_shared(W4, w4, 256);
  for (int i = THREAD; i < (OUT ? 456 : 320); i += 128) V[i] = vec[i];
  copy_wait();
  block_sync();

  const int lane = THREAD & 31;
  for (int first = (BLOCK * 4 + (THREAD >> 5)) * 2; first < m_tiles; first += BLOCKS * 8) {
    uint4 a[2][4];
#pragma unroll
    for (int mt = 0; mt < 2; mt++)
#pragma unroll
      for (int ks = 0; ks < 4; ks++)
        a[mt][ks] = load16(E1 + ((u64)min(first + mt, m_tiles - 1) * 4 + ks) * 32 + lane);
    float h[2][8][4];
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      const float2 b = *(const float2*)(V + 128 + nt * 8 + (lane & 3) * 2);
#pragma unroll
      for (int mt = 0; mt < 2; mt++) h[mt][nt][0] = h[mt][nt][2] = b.x, h[mt][nt][1] = h[mt][nt][3] = b.y;
    }
    mlp<8, 4>(h, a, W1, V, W2, lane);
#pragma unroll
    for (int mt = 0; mt < 2; mt++) {
#pragma unroll
      for (int np = 0; np < 4; np++) add_tile(h[mt][2 * np], h[mt][2 * np + 1], a[mt][np]);
      layer_norm<8>(h[mt], V + 192, V + 256, lane);
#pragma unroll
      for (int np = 0; np < 4; np++) {
        a[mt][np] = pack_tile(h[mt][2 * np], h[mt][2 * np + 1]);
        if (!OUT && first + mt < m_tiles) E[((u64)(first + mt) * 4 + np) * 32 + lane] = a[mt][np];
      }
    }
    if (OUT) {
      float o[2][1][4];
      const float2 b = *(const float2*)(V + 448 + (lane & 3) * 2);
#pragma unroll
      for (int mt = 0; mt < 2; mt++) o[mt][0][0] = o[mt][0][2] = b.x, o[mt][0][1] = o[mt][0][3] = b.y;
      mlp<1, 1>(o, a, W3, V + 320, W4, lane);
#pragma unroll
      for (int mt = 0; mt < 2; mt++)
        if (first + mt < m_tiles) {
          float* to = logits + (u64)(first + mt) * 128 + (lane >> 2) * 8 + (lane & 3) * 2;
          *(float2*)to = make_float2(o[mt][0][0], o[mt][0][1]);
          *(float2*)(to + 64) = make_float2(o[mt][0][2], o[mt][0][3]);
        }
    }
  }
}

// E1, E: [m_tiles][4][32]; w1 packed [128, 64], w2 packed [64, 128]; vec: linE1.bias, linE2.bias, gamma, beta.
KERNEL(128, 3)
edge_ffn(const uint4* E1, uint4* E, const uint4* w1, const uint4* w2, const float* vec, int m_tiles) {
  SHARED(shared);
  run<false>(shared, E1, E, m_tiles, w1, w2, vec, 0, 0, 0);
}

// logits: float [m_tiles][16][8]; w3 packed [128, 64], w4 packed [16, 128] (8 rows used); vec continues with both biases.
KERNEL(128, 3)
edge_ffn_out(const uint4* E1, const uint4* w1, const uint4* w2, const float* vec, int m_tiles, const uint4* w3,
             const uint4* w4, float* logits) {
  SHARED(shared);
  run<true>(shared, E1, 0, m_tiles, w1, w2, vec, w3, w4, logits);
}
