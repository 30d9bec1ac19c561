// Feed-forward net of E (see edge_ffn_wg.cu) with products of 8-bit floats; in the last layer also the output MLP of E,
// which stays in bf16.
//
// Rows are f16 in memory: a cast to e4m3 is one instruction a pair. What a product gives is scaled, cast and fed to the
// next from registers. Operations an edge: 16,384 MAC = 4 tensor clocks of an SM, 256 bytes of global memory: bound by it.
#include "hopper.cuh"
#include "fp8.cuh"

// vec: a float4 (scale, scale, bias, bias) a pair of channels.
template <int NT>
DEV void finish(float (&h)[NT][4], const float* vec, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    if (nt % 2 == 0) no_load_crosses();  // there are 128 registers
    const float4 v = *(const float4*)(vec + (nt * 4 + (lane & 3)) * 4);
    h[nt][0] = fmaf(h[nt][0], v.x, v.z), h[nt][1] = fmaf(h[nt][1], v.y, v.w);
    h[nt][2] = fmaf(h[nt][2], v.x, v.z), h[nt][3] = fmaf(h[nt][3], v.y, v.w);
  }
}

template <bool OUT>
DEV void run(u8* shared, const uint4* E1, uint4* E, int m_tiles, const u8* w, const float* vec, float* logits) {
  u8* W1 = shared;           // 2 slabs of 128 rows
  u8* W2 = W1 + 8192;        // 4 slabs of 64 rows
  u8* W3 = W2 + 8192;        // 4 slabs of 128 rows, bf16
  u8* W4 = W3 + 16384;       // 8 slabs of 16 rows, bf16
  const int bytes = OUT ? 2 * 8192 + 16384 + 4096 : 2 * 8192;
  float* V = (float*)(shared + bytes);  // linE1 256, linE2 128, norm 64, then the output MLP 256 and 16
  u64* arrived = (u64*)(V + (OUT ? 720 : 448));
  if (THREAD == 0) {
    barrier_init(arrived, 1);
    barrier_init_done();
    barrier_expect(arrived, bytes);
    copy_bulk(shared, w, bytes, arrived);
  }
  for (int i = THREAD; i < (OUT ? 720 : 448); i += 256) V[i] = vec[i];
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
    if (!OUT) load(tile + BLOCKS * 8);
    float h[8][4];
    uint4 a2[4];
    const u64 first = slab(W1, 128);
    uint4 a1[2];
#pragma unroll
    for (int s = 0; s < 2; s++)
      a1[s] = make_uint4(bytes4(a[2 * s].x, a[2 * s].z), bytes4(a[2 * s].y, a[2 * s].w), bytes4(a[2 * s + 1].x, a[2 * s + 1].z),
                         bytes4(a[2 * s + 1].y, a[2 * s + 1].w));
#pragma unroll
    for (int half = 0; half < 2; half++) {  // of the hidden channels: there are 128 registers
      float hidden[8][4];
      products_begin();
#pragma unroll
      for (int s = 0; s < 2; s++) product8(hidden, a1[s], first + (s * 4096 + half * 1024 >> 4), s);
      products_commit();
      products_wait<0>();
      finish(hidden, V + half * 128, lane);
#pragma unroll
      for (int s = 0; s < 2; s++)
        a2[half * 2 + s] = byte_tile_relu(hidden[4 * s], hidden[4 * s + 1], hidden[4 * s + 2], hidden[4 * s + 3]);
    }
    const u64 second = slab(W2, 64);
    products_begin();
#pragma unroll
    for (int s = 0; s < 4; s++) product8(h, a2[s], second + s * (2048 >> 4), s);
    products_commit();
    products_wait<0>();
    u32 e[8][2];
#pragma unroll
    for (int np = 0; np < 4; np++) {
      no_load_crosses();
      const float4 *v0 = (const float4*)(V + 256) + np * 8 + (lane & 3), *v1 = v0 + 4;
      finish_tile(e[2 * np], e[2 * np + 1], h[2 * np], h[2 * np + 1], *v0, *v1, a[np]);
    }
    half_norm<8>(e, (const uint2*)(V + 384), lane);
    if (!OUT && tile < m_tiles)
#pragma unroll
      for (int np = 0; np < 4; np++)
        E[((u64)tile * 4 + np) * 32 + lane] = make_uint4(e[2 * np][0], e[2 * np][1], e[2 * np + 1][0], e[2 * np + 1][1]);
    if (OUT) {
      float hidden[16][4], o[2][4];
      uint4 a4[8];
#pragma unroll
      for (int nt = 0; nt < 8; nt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) e[nt][hi] = pack2(half_low(e[nt][hi]), half_high(e[nt][hi]));
#pragma unroll
      for (int np = 0; np < 4; np++) a[np] = make_uint4(e[2 * np][0], e[2 * np][1], e[2 * np + 1][0], e[2 * np + 1][1]);
      load(tile + BLOCKS * 8);
      const u64 third = slab(W3, 128), fourth = slab(W4, 16);
      products_begin();
#pragma unroll
      for (int ks = 0; ks < 4; ks++) product(hidden, a[ks], third + ks * (4096 >> 4), ks);
      products_commit();
      products_wait<0>();
      finish(hidden, V + 448, lane);
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
}

// E1, E: f16 [m_tiles][4][32]; w: slabs of linE1 (2 of 128 rows), of linE2 (4 of 64); vec: theirs, then
// 32 pairs of f16 (gamma, gamma), (beta, beta).
KERNEL(256, 2)
edge_ffn(const uint4* E1, uint4* E, const u8* w, const float* vec, int m_tiles) {
  SHARED(shared);
  run<false>(shared, E1, E, m_tiles, w, vec, 0);
}

// logits: float [m_tiles][16][8]; w continues with the output MLP in bf16 (4 slabs of 128 rows, 8 of 16), vec with its
// first Linear and 16 biases.
KERNEL(256, 2)
edge_ffn_out(const uint4* E1, const u8* w, const float* vec, int m_tiles, float* logits) {
  SHARED(shared);
  run<true>(shared, E1, 0, m_tiles, w, vec, logits);
}
