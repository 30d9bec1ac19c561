// 8-bit floats (e4m3) and pairs of 16-bit floats: what the fp8 kernels use besides warp.cuh (sm_89 and later).
//
// A word of four e4m3 of a row holds what a lane has of two n-tiles: channels 2l, 2l + 1, 8 + 2l, 8 + 2l + 1 of 16. So a
// tile of 16 rows and 32 channels is 32 x 16 bytes, the A operand of an 8-bit product: x, y: rows r, r + 8 of channels
// 0..15; z, w: of 16..31; weights come in the same order of channels (pack_code_slabs). A cast saturates at 448.
// Products of mma.sync take f16 operands that hold e4m3 values: sm_90 has 8-bit floats in wgmma only, and emulates the rest.
#pragma once
#include "warp.cuh"

#ifdef BITDGDM_EMULATE
#include "emulator_fp8.h"
#else

DEV u32 halves(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEV float half_low(u32 pair) {
  float d;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(d) : "r"(pair));
  return d;
}
DEV float half_high(u32 pair) {
  float d;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(d) : "r"(pair));
  return d;
}
DEV u32 half_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEV u32 half_mul(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 half_add(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 half_sub(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 half_max(u32 a, u32 b) {  // NaN if one is
  u32 d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 half_min(u32 a, u32 b) {  // NaN if one is
  u32 d;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 half_exp2(u32 a) {
  u32 d;
  asm("ex2.approx.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
DEV u32 half_above(u32 a, u32 limits) {  // 1 where it is, else 0
  u32 d;
  asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(limits));
  return d;
}
DEV bool half_any_above(u32 a, u32 limits) {  // of the two
  int d;
  asm("{\n.reg .pred p, q;\nsetp.gt.f16x2 p|q, %1, %2;\nor.pred p, p, q;\nselp.s32 %0, 1, 0, p;\n}" : "=r"(d) : "r"(a), "r"(limits));
  return d != 0;
}DEV bool half_all_above(u32 a, u32 limits) {  // both; false for NaN
  int d;
  asm("{\n.reg .pred p, q;\nsetp.gt.f16x2 p|q, %1, %2;\nand.pred p, p, q;\nselp.s32 %0, 1, 0, p;\n}" : "=r"(d) : "r"(a), "r"(limits));
  return d != 0;
}

// Four e4m3, the first in the lowest byte.
DEV u32 bytes4(float a, float b, float c, float d) {
  u32 e;
  asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
      "mov.b32 %0, {l, h};\n}" : "=r"(e) : "f"(a), "f"(b), "f"(c), "f"(d));
  return e;
}
DEV u32 bytes4_relu(float a, float b, float c, float d) {
  u32 e;
  asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.relu.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.relu.e4m3x2.f32 h, %4, %3;\n"
      "mov.b32 %0, {l, h};\n}" : "=r"(e) : "f"(a), "f"(b), "f"(c), "f"(d));
  return e;
}
DEV u32 bytes4(u32 ab, u32 cd) {  // of pairs of f16
  u32 e;
  asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f16x2 l, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 h, %2;\nmov.b32 %0, {l, h};\n}"
      : "=r"(e) : "r"(ab), "r"(cd));
  return e;
}
DEV u32 halves_of_low(u32 bytes) {
  u32 d;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(d) : "r"(bytes));
  return d;
}
DEV u32 halves_of_high(u32 bytes) {
  u32 d;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(d) : "r"(bytes));
  return d;
}

// d = a b + c on f16 operands; sums in f16 (two words: row r, row r + 8) or in float.
DEV void mma_half(u32 (&d)[2], const uint4& a, u32 b0, u32 b1, u32 c0, u32 c1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
      : "=r"(d[0]), "=r"(d[1]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
}
DEV void mma_half(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
#endif

// Rounded to e4m3 and back.
DEV uint4 rounded_tile(const uint4& t) {
  const u32 xy = bytes4(t.x, t.y), zw = bytes4(t.z, t.w);
  return make_uint4(halves_of_low(xy), halves_of_high(xy), halves_of_low(zw), halves_of_high(zw));
}

// The result of 16 output channels of a 16-row tile as f16, in fragment order.
DEV uint4 half_tile(const float (&first)[4], const float (&second)[4]) {
  return make_uint4(halves(first[0], first[1]), halves(first[2], first[3]), halves(second[0], second[1]),
                    halves(second[2], second[3]));
}
DEV void add_half_tile(float (&first)[4], float (&second)[4], const uint4& x) {
  first[0] += half_low(x.x), first[1] += half_high(x.x), first[2] += half_low(x.y), first[3] += half_high(x.y);
  second[0] += half_low(x.z), second[1] += half_high(x.z), second[2] += half_low(x.w), second[3] += half_high(x.w);
}

// Four n-tiles (32 channels) as the A operand of an 8-bit product.
DEV uint4 byte_tile(const float (&a)[4], const float (&b)[4], const float (&c)[4], const float (&d)[4]) {
  return make_uint4(bytes4(a[0], a[1], b[0], b[1]), bytes4(a[2], a[3], b[2], b[3]), bytes4(c[0], c[1], d[0], d[1]),
                    bytes4(c[2], c[3], d[2], d[3]));
}
DEV uint4 byte_tile_relu(const float (&a)[4], const float (&b)[4], const float (&c)[4], const float (&d)[4]) {
  return make_uint4(bytes4_relu(a[0], a[1], b[0], b[1]), bytes4_relu(a[2], a[3], b[2], b[3]),
                    bytes4_relu(c[0], c[1], d[0], d[1]), bytes4_relu(c[2], c[3], d[2], d[3]));
}

// LayerNorm over the 8 * NT channels of both rows that a lane shares with its quad, on pairs of f16; sums are of floats.
// vec: (gamma, gamma), (beta, beta) a pair of channels.
template <int NT>
DEV void half_norm(u32 (&h)[NT][2], const uint2* vec, int lane) {
  const float scale = 1.0f / (8 * NT);
  // Sums by tensor cores: rows times ones; of squares the diagonal of rows times rows, 0 to 7 and 8 to 15. A row sees itself.
  float sum[4] = {0, 0, 0, 0}, near[4] = {0, 0, 0, 0}, far[4] = {0, 0, 0, 0};
#pragma unroll
  for (int ks = 0; ks < NT / 2; ks++) {
    const uint4 a = make_uint4(h[2 * ks][0], h[2 * ks][1], h[2 * ks + 1][0], h[2 * ks + 1][1]);
    mma_half(sum, a, 0x3c003c00u, 0x3c003c00u);
    mma_half(near, a, a.x, a.z), mma_half(far, a, a.y, a.w);
  }
  const int r = lane >> 2, holder = (lane & 28) | r >> 1;  // of column r of row r and of row r + 8
  const float sq[2] = {lane_from(r & 1 ? near[1] : near[0], holder), lane_from(r & 1 ? far[3] : far[2], holder)};
  u32 inverse[2], shift[2];
#pragma unroll
  for (int hi = 0; hi < 2; hi++) {
    const float mean = sum[2 * hi] * scale;
    const float inv = rsqrtf(fmaxf(sq[hi] * scale - mean * mean, 0.0f) + 1e-5f);
    inverse[hi] = halves(inv, inv), shift[hi] = halves(-mean * inv, -mean * inv);
  }
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const uint2 v = vec[nt * 4 + (lane & 3)];
#pragma unroll
    for (int hi = 0; hi < 2; hi++) h[nt][hi] = half_fma(half_fma(h[nt][hi], inverse[hi], shift[hi]), v.x, v.y);
  }
}

// acc * scale + bias of two n-tiles as f16, + x in fragment order. vec: a float4 (scale, scale, bias, bias) a pair of channels.
DEV void finish_tile(u32 (&first)[2], u32 (&second)[2], const float (&a)[4], const float (&b)[4], const float4& va, const float4& vb,
                     const uint4& x) {
  first[0] = half_add(halves(fmaf(a[0], va.x, va.z), fmaf(a[1], va.y, va.w)), x.x);
  first[1] = half_add(halves(fmaf(a[2], va.x, va.z), fmaf(a[3], va.y, va.w)), x.y);
  second[0] = half_add(halves(fmaf(b[0], vb.x, vb.z), fmaf(b[1], vb.y, vb.w)), x.z);
  second[1] = half_add(halves(fmaf(b[2], vb.x, vb.z), fmaf(b[3], vb.y, vb.w)), x.w);
}
