// Feed-forward net (edge_ffn_rows.cuh) and output MLP of E in the last layer; elsewhere edge_f8.cu has the net.
//
// Rows are f16 in memory; the output MLP stays in bf16.
#include "edge_ffn_rows.cuh"

#define BYTES (FFN_BYTES + 16384 + 4096)

// E1: f16 [m_tiles][4][32]; logits: float [m_tiles][16][8]; w: that of the net, then the output MLP in bf16 (4 slabs of 128
// rows, 8 of 16); vec: that of the net, then the output MLP's first Linear (256) and 16 biases.
KERNEL(256, 2)
edge_ffn_out(const uint4* E1, const u8* w, const float* vec, int m_tiles, float* logits) {
  SHARED(shared);
  float* V = (float*)(shared + BYTES);
  u64* arrived = (u64*)(V + 720);
  if (THREAD == 0) {
    barrier_init(arrived, 1);
    barrier_init_done();
    barrier_expect(arrived, BYTES);
    copy_bulk(shared, w, BYTES, arrived);
  }
  for (int i = THREAD; i < 720; i += 256) V[i] = vec[i];
  block_sync();

  const int lane = THREAD & 31;
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
  for (; (tile & ~3) < m_tiles; tile += BLOCKS * 8) {
#pragma unroll
    for (int ks = 0; ks < 4; ks++) a[ks] = next[ks];
    u32 e[8][2];
    feed_forward(e, a, shared, V, lane);
    float hidden[16][4], o[2][4];
    uint4 a4[8];
#pragma unroll
    for (int nt = 0; nt < 8; nt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) e[nt][hi] = pack2(half_low(e[nt][hi]), half_high(e[nt][hi]));
#pragma unroll
    for (int np = 0; np < 4; np++) a[np] = make_uint4(e[2 * np][0], e[2 * np][1], e[2 * np + 1][0], e[2 * np + 1][1]);
    load(tile + BLOCKS * 8);
    const u64 third = slab(shared + FFN_BYTES, 128), fourth = slab(shared + FFN_BYTES + 16384, 16);
    products_begin();
#pragma unroll
    for (int ks = 0; ks < 4; ks++) product(hidden, a[ks], third + ks * (4096 >> 4), ks);
    products_commit();
    products_wait<0>();
    finish(hidden, V + FFN_FLOATS, lane);
#pragma unroll
    for (int ks = 0; ks < 8; ks++) a4[ks] = pack_tile_relu(hidden[2 * ks], hidden[2 * ks + 1]);
    products_begin();
#pragma unroll
    for (int ks = 0; ks < 8; ks++) product(o, a4[ks], fourth + ks * (512 >> 4), ks);
    products_commit();
    products_wait<0>();
    if (tile < m_tiles) {
      const float2 b = *(const float2*)(V + 704 + (lane & 3) * 2);
      float* to = logits + (u64)tile * 128 + (lane >> 2) * 8 + (lane & 3) * 2;
      *(float2*)to = make_float2(o[0][0] + b.x, o[0][1] + b.y);
      *(float2*)(to + 64) = make_float2(o[0][2] + b.x, o[0][3] + b.y);
    }
  }
}
