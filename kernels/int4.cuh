// What both kernels of 4-bit Linears (int4.cu, int4_narrow.cu) do to a row: range, scale, codes, as quant/linear.py defines them.
#pragma once
#include "integer.cuh"

#define BF16_INPUT 1  // flags
#define OUTLIERS 2
#define TINY 1.17549435e-38f
#define EVEN 12582912.0f  // 1.5 * 2^23

DEV double lane_xor_double(double v, int mask) {
  u64 bits;
  memcpy(&bits, &v, 8);
  const u32 lo = bits_of(lane_xor(as_float((u32)bits), mask)), hi = bits_of(lane_xor(as_float((u32)(bits >> 32)), mask));
  bits = (u64)hi << 32 | lo;
  memcpy(&v, &bits, 8);
  return v;
}

DEV void unpack8(float (&v)[8], const uint4& p) {
  v[0] = low(p.x), v[1] = high(p.x), v[2] = low(p.y), v[3] = high(p.y);
  v[4] = low(p.z), v[5] = high(p.z), v[6] = low(p.w), v[7] = high(p.w);
}
DEV void load8(float (&v)[8], const float* x) {
  const uint4 p = load16(x), q = load16(x + 4);
  v[0] = as_float(p.x), v[1] = as_float(p.y), v[2] = as_float(p.z), v[3] = as_float(p.w);
  v[4] = as_float(q.x), v[5] = as_float(q.y), v[6] = as_float(q.z), v[7] = as_float(q.w);
}

// The largest code of 4 bit.
template <bool ASYMMETRIC>
DEV int top_of_4_bit() { return ASYMMETRIC ? 15 : 7; }

// Scale and zero point of a row whose inliers reach from `least` to `most` (in absolute value, of symmetric codes) with codes
// up to `top`.
template <bool ASYMMETRIC>
DEV void token_scale(float least, float most, int top, float& scale, float& inverse, int& zero) {  // one rounding an operation
  const float step = reciprocal((float)top);
  scale = fmaxf(ASYMMETRIC ? mul_rn(add_rn(most, -least), step) : mul_rn(most, step), TINY);
  inverse = reciprocal(scale), zero = ASYMMETRIC ? (int)rintf(mul_rn(least, inverse)) : 0;
}

// The code of v in the lowest byte: half to even; of a row that is not broken it is within its limits.
template <bool ASYMMETRIC>
DEV u32 token_code(float v, int top, float inverse, int zero) {
  const u32 code = bits_of(add_rn(mul_rn(v, inverse), EVEN));
  return ASYMMETRIC ? (u32)min((int)(code - bits_of(EVEN)) - zero, top) : code;
}

// The lowest bytes of four words.
DEV u32 bytes_of(u32 a, u32 b, u32 c, u32 d) { return pick_bytes(pick_bytes(a, b, 0x0040), pick_bytes(c, d, 0x0040), 0x5410); }
