// The operations of fp8.cuh on the CPU, from the definition of the formats.
#pragma once

DEV u16 half_bits(double x) {
  const _Float16 h = (_Float16)x;
  u16 b;
  memcpy(&b, &h, 2);
  return b;
}
DEV float half_value(u16 b) {
  _Float16 h;
  memcpy(&h, &b, 2);
  return (float)h;
}
DEV u32 halves(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
DEV float half_low(u32 pair) { return half_value((u16)pair); }
DEV float half_high(u32 pair) { return half_value((u16)(pair >> 16)); }
template <class Op>
inline u32 half_each(u32 a, u32 b, u32 c, Op op) {
  return half_bits(op((double)half_low(a), (double)half_low(b), (double)half_low(c))) |
         (u32)half_bits(op((double)half_high(a), (double)half_high(b), (double)half_high(c))) << 16;
}
DEV u32 half_fma(u32 a, u32 b, u32 c) { return half_each(a, b, c, [](double x, double y, double z) { return x * y + z; }); }
DEV u32 half_mul(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x * y; }); }
DEV u32 half_add(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x + y; }); }
DEV u32 half_sub(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x - y; }); }
DEV u32 half_max(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x != x || y != y ? NAN : fmax(x, y); }); }
DEV u32 half_min(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x != x || y != y ? NAN : fmin(x, y); }); }
DEV u32 half_exp2(u32 a) { return half_each(a, 0, 0, [](double x, double, double) { return exp2(x); }); }
DEV u32 half_above(u32 a, u32 b) { return half_each(a, b, 0, [](double x, double y, double) { return x > y ? 1.0 : 0.0; }); }
DEV bool half_any_above(u32 a, u32 limits) { return half_low(a) > half_low(limits) || half_high(a) > half_high(limits); }
DEV bool half_all_above(u32 a, u32 limits) { return half_low(a) > half_low(limits) && half_high(a) > half_high(limits); }

DEV float byte_value(u8 b) {  // e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinity
  const int e = b >> 3 & 15, m = b & 7;
  const float v = (b & 127) == 127 ? NAN : e ? ldexpf(1 + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
  return b >> 7 ? -v : v;
}
DEV u8 byte_bits(float x) {
  if (x != x) return 127;
  const float a = fminf(fabsf(x), 448.0f);
  int best = 0;  // nearest of the 127 values, ties to the even code
  for (int c = 0; c < 127; c++) {
    const float d = fabsf(byte_value((u8)c) - a), least = fabsf(byte_value((u8)best) - a);
    if (d < least || (d == least && c % 2 == 0)) best = c;
  }
  return (u8)(best | (signbit(x) ? 128 : 0));
}
DEV u8 byte_of(float x) {
  static u8 table[65536];
  static bool ready = false;
  if (!ready) {
    for (int i = 0; i < 65536; i++) table[i] = byte_bits(as_float((u32)i << 16));
    ready = true;
  }
  const u32 b = as_bits(x);
  if (x != x) return 127;
  if ((b & 0xffff) == 0) return table[b >> 16];
  const u8 low = table[b >> 16], high = table[(b >> 16) + 1];  // bf16 neighbours: equal unless a rounding edge lies between
  return low == high ? low : byte_bits(x);
}
DEV u32 bytes4(float a, float b, float c, float d) {
  return byte_of(a) | (u32)byte_of(b) << 8 | (u32)byte_of(c) << 16 | (u32)byte_of(d) << 24;
}
DEV u32 bytes4_relu(float a, float b, float c, float d) {
  return bytes4(a > 0 ? a : 0, b > 0 ? b : 0, c > 0 ? c : 0, d > 0 ? d : 0);
}
DEV u32 bytes4(u32 ab, u32 cd) { return bytes4(half_low(ab), half_high(ab), half_low(cd), half_high(cd)); }
DEV u32 halves_of_low(u32 w) { return halves(byte_value((u8)w), byte_value((u8)(w >> 8))); }
DEV u32 halves_of_high(u32 w) { return halves_of_low(w >> 16); }

// Sums of products of f16 operands, as float.
DEV u32* half_products(const uint4& a, u32 b0, u32 b1) {
  const u32 in[6] = {a.x, a.y, a.z, a.w, b0, b1};
  return emu::meet(in, 6, [](emu::Warp& w) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, inside = lane % 4;
      for (int e = 0; e < 2; e++) {
        for (int reg = 0; reg < 4; reg++)
          A[group + (reg % 2) * 8][inside * 2 + e + (reg / 2) * 8] = half_value((u16)(w.in[lane][reg] >> (16 * e)));
        for (int reg = 0; reg < 2; reg++) B[inside * 2 + e + reg * 8][group] = half_value((u16)(w.in[lane][4 + reg] >> (16 * e)));
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += A[lane / 4 + (i / 2) * 8][k] * B[k][(lane % 4) * 2 + i % 2];
        w.out[lane][i] = as_bits(sum);
      }
  });
}
DEV void mma_half(u32 (&d)[2], const uint4& a, u32 b0, u32 b1, u32 c0, u32 c1) {
  const u32* sum = half_products(a, b0, b1);
  d[0] = halves(half_low(c0) + as_float(sum[0]), half_high(c0) + as_float(sum[1]));
  d[1] = halves(half_low(c1) + as_float(sum[2]), half_high(c1) + as_float(sum[3]));
}
DEV void mma_half(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const u32* sum = half_products(a, b0, b1);
  for (int i = 0; i < 4; i++) d[i] += as_float(sum[i]);
}
