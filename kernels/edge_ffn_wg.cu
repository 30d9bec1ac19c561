// Feed-forward net of E, residual and LayerNorm (see edge_ffn.cu), for Hopper; in the last layer also the output MLP of E.
//
// Rows are independent: a warp holds one m-tile (16 rows x 64 channels, 2 KB), a warpgroup four. 64 -> 128 -> 64 are
// asynchronous products of 64 rows whose A operand and sums stay in registers (64 sums a thread for the hidden channels),
// weights are slabs in shared memory, 32 KB (52 with the output MLP). While a tile is computed the next one is loaded.
// Operations an edge: 16,384 MAC = 8 tensor clocks of an SM, 256 bytes of global memory: bound by memory (39 us a layer of
// 640,000 edges at 4.2 TB/s).
#include "hopper.cuh"

DEV void bias_relu(uint4 (&a)[8], float (&h)[16][4], const float* b, int lane) {
#pragma unroll
  for (int nt = 0; nt < 16; nt++) {
    const float2 v = *(const float2*)(b + nt * 8 + (lane & 3) * 2);
    h[nt][0] += v.x, h[nt][1] += v.y, h[nt][2] += v.x, h[nt][3] += v.y;
  }
#pragma unroll
  for (int ks = 0; ks < 8; ks++) a[ks] = pack_tile_relu(h[2 * ks], h[2 * ks + 1]);
}

// out = W2 relu(W1 a + b1). W1: 4 slabs of 128 rows; W2: 8 slabs of N rows.
template <int N>
DEV void mlp(float (&out)[N / 8][4], const uint4 (&a)[4], const u8* W1, const float* b1, const u8* W2, int lane) {
  float hidden[16][4];
  uint4 a2[8];
  const u64 first = slab(W1, 128), second = slab(W2, N);
  products_begin();
#pragma unroll
  for (int ks = 0; ks < 4; ks++) product(hidden, a[ks], first + ks * (4096 >> 4), ks);
  products_commit();
  products_wait<0>();
  bias_relu(a2, hidden, b1, lane);
  products_begin();
#pragma unroll
  for (int ks = 0; ks < 8; ks++) product(out, a2[ks], second + ks * (N * 32 >> 4), ks);
  products_commit();
  products_wait<0>();
}

template <bool OUT>
DEV void run(u8* shared, const uint4* E1, uint4* E, int m_tiles, const u8* w, const float* vec, float* logits) {
  u8* W1 = shared;            // 4 slabs of 128 rows
  u8* W2 = W1 + 16384;        // 8 slabs of 64 rows
  u8* W3 = W2 + 16384;        // 4 slabs of 128 rows
  u8* W4 = W3 + 16384;        // 8 slabs of 16 rows
  const int bytes = OUT ? 3 * 16384 + 4096 : 2 * 16384;
  float* V = (float*)(shared + bytes);  // b1 128, b2 64, gamma 64, beta 64, then b3 128, b4 16
  u64* arrived = (u64*)(V + (OUT ? 464 : 320));
  if (THREAD == 0) {
    barrier_init(arrived, 1);
    barrier_init_done();
    barrier_expect(arrived, bytes);
    copy_bulk(shared, w, bytes, arrived);
  }
  for (int i = THREAD; i < (OUT ? 464 : 320); i += 256) V[i] = vec[i];
  block_sync();

  const int lane = THREAD & 31, warps = BLOCKS * 8;
  int tile = BLOCK * 8 + (THREAD >> 5);
  uint4 a[4], next[4];
  auto load = [&](int from) {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) next[ks] = load16(E1 + ((u64)min(from, m_tiles - 1) * 4 + ks) * 32 + lane);
  };
  load(tile);
  barrier_wait(arrived, 0);
  // a warpgroup stays together: its last round may hold tiles beyond the end, which are copies of the last
#pragma unroll 1
  for (; (tile & ~3) < m_tiles; tile += warps) {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) a[ks] = next[ks];
    if (!OUT) load(tile + warps);
    float h[8][4];
    mlp<64>(h, a, W1, V, W2, lane);
#pragma unroll
    for (int np = 0; np < 4; np++) {
      add_tile(h[2 * np], h[2 * np + 1], a[np]);
#pragma unroll
      for (int nt = 2 * np; nt < 2 * np + 2; nt++) {
        const float2 b = *(const float2*)(V + 128 + nt * 8 + (lane & 3) * 2);
        h[nt][0] += b.x, h[nt][1] += b.y, h[nt][2] += b.x, h[nt][3] += b.y;
      }
    }
    layer_norm<8>(h, V + 192, V + 256, lane);
#pragma unroll
    for (int np = 0; np < 4; np++) {
      a[np] = pack_tile(h[2 * np], h[2 * np + 1]);
      if (!OUT && tile < m_tiles) E[((u64)tile * 4 + np) * 32 + lane] = a[np];
    }
    if (OUT) {
      float o[2][4];
      load(tile + warps);
      mlp<16>(o, a, W3, V + 320, W4, lane);
      if (tile < m_tiles) {
        const float2 b = *(const float2*)(V + 448 + (lane & 3) * 2);
        float* to = logits + (u64)tile * 128 + (lane >> 2) * 8 + (lane & 3) * 2;
        *(float2*)to = make_float2(o[0][0] + b.x, o[0][1] + b.y);
        *(float2*)(to + 64) = make_float2(o[0][2] + b.x, o[0][3] + b.y);
      }
    }
  }
}

// E1, E: [m_tiles][4][32]; w: slabs of linE1 (4 of 128 rows), of linE2 (8 of 64); vec: their biases, gamma, beta.
KERNEL(256, 2)
edge_ffn(const uint4* E1, uint4* E, const u8* w, const float* vec, int m_tiles) {
  SHARED(shared);
  run<false>(shared, E1, E, m_tiles, w, vec, 0);
}

// logits: float [m_tiles][16][8]; w continues with the output MLP (4 slabs of 128 rows, 8 of 16), vec with its biases.
KERNEL(256, 2)
edge_ffn_out(const uint4* E1, const u8* w, const float* vec, int m_tiles, float* logits) {
  SHARED(shared);
  run<true>(shared, E1, 0, m_tiles, w, vec, logits);
}
