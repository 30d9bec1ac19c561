// The feed-forward net of E on rows in registers: linE1, ReLU, linE2, residual, LayerNorm, with products of 8-bit floats.
//
// A warpgroup does 64 rows, a warp one m-tile. What a product gives is scaled, cast and fed to the next from registers.
#pragma once
#include "hopper.cuh"
#include "fp8.cuh"

#define FFN_BYTES 16384  // linE1: 2 slabs of 128 rows; linE2: 4 of 64
#define FFN_FLOATS 448   // linE1 256, linE2 128, then 32 pairs of f16 (gamma, gamma), (beta, beta)

// vec: a float4 (scale, scale, bias, bias) a pair of channels.
template <int NT>
DEV void finish(float (&h)[NT][4], const float* vec, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    if (nt % 2 == 0) no_load_crosses();  // registers are short
    const float4 v = *(const float4*)(vec + (nt * 4 + (lane & 3)) * 4);
    h[nt][0] = fmaf(h[nt][0], v.x, v.z), h[nt][1] = fmaf(h[nt][1], v.y, v.w);
    h[nt][2] = fmaf(h[nt][2], v.x, v.z), h[nt][3] = fmaf(h[nt][3], v.y, v.w);
  }
}

// a: the rows in fragment order; w, vec: FFN_BYTES and FFN_FLOATS in shared memory; e: pairs of f16, [n-tile][row].
DEV void feed_forward(u32 (&e)[8][2], const uint4 (&a)[4], const u8* w, const float* vec, int lane) {
  float h[8][4];
  uint4 a1[2], a2[4];
  const u64 first = slab(w, 128), second = slab(w + 8192, 64);
#pragma unroll
  for (int s = 0; s < 2; s++)
    a1[s] = make_uint4(bytes4(a[2 * s].x, a[2 * s].z), bytes4(a[2 * s].y, a[2 * s].w), bytes4(a[2 * s + 1].x, a[2 * s + 1].z),
                       bytes4(a[2 * s + 1].y, a[2 * s + 1].w));
#pragma unroll
  for (int half = 0; half < 2; half++) {  // of the hidden channels: registers are short
    float hidden[8][4];
    products_begin();
#pragma unroll
    for (int s = 0; s < 2; s++) product8(hidden, a1[s], first + (s * 4096 + half * 1024 >> 4), s);
    products_commit();
    products_wait<0>();
    finish(hidden, vec + half * 128, lane);
#pragma unroll
    for (int s = 0; s < 2; s++)
      a2[half * 2 + s] = byte_tile_relu(hidden[4 * s], hidden[4 * s + 1], hidden[4 * s + 2], hidden[4 * s + 3]);
  }
  products_begin();
#pragma unroll
  for (int s = 0; s < 4; s++) product8(h, a2[s], second + s * (2048 >> 4), s);
  products_commit();
  products_wait<0>();
#pragma unroll
  for (int np = 0; np < 4; np++) {
    no_load_crosses();
    const float4 *v0 = (const float4*)(vec + 256) + np * 8 + (lane & 3), *v1 = v0 + 4;
    finish_tile(e[2 * np], e[2 * np + 1], h[2 * np], h[2 * np + 1], *v0, *v1, a[np]);
  }
  half_norm<8>(e, (const uint2*)(vec + 384), lane);
}
