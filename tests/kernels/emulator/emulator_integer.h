// The integer products of integer.cuh on the CPU, from the PTX manual's tables of fragments.
#pragma once

#ifndef NATIVE
#define NATIVE 0
#endif

namespace emu {
inline int code_at(u32 word, int i, int bits, bool is_signed) {
  const int v = (int)(word >> (bits * i) & ((1u << bits) - 1));
  return is_signed && v >> (bits - 1) ? v - (1 << bits) : v;
}
// m16n8k(256 / bits): a lane holds 32 / bits neighbours of k in a word; rows g, g + 8, then the upper half of k.
template <int BITS, bool A_SIGNED>
inline void integer_product(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const u32 in[10] = {a.x, a.y, a.z, a.w, b0, b1, (u32)d[0], (u32)d[1], (u32)d[2], (u32)d[3]};
  u32* out = meet(in, 10, [](Warp& w) {
    constexpr int EACH = 32 / BITS, HALF = 4 * EACH;
    int A[16][2 * HALF], B[2 * HALF][8];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < EACH; i++) {
        const int g = lane / 4, k = lane % 4 * EACH + i;
        for (int reg = 0; reg < 4; reg++) A[g + reg % 2 * 8][k + reg / 2 * HALF] = code_at(w.in[lane][reg], i, BITS, A_SIGNED);
        for (int reg = 0; reg < 2; reg++) B[k + reg * HALF][g] = code_at(w.in[lane][4 + reg], i, BITS, true);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        int sum = (int)w.in[lane][6 + i];
        for (int k = 0; k < 2 * HALF; k++) sum += A[row][k] * B[k][col];
        w.out[lane][i] = (u32)sum;
      }
  });
  for (int i = 0; i < 4; i++) d[i] = (int)out[i];
}
}  // namespace emu

DEV void mma_s4(int (&d)[4], const uint4& a, u32 b0, u32 b1) { emu::integer_product<4, true>(d, a, b0, b1); }
DEV void mma_u4(int (&d)[4], const uint4& a, u32 b0, u32 b1) { emu::integer_product<4, false>(d, a, b0, b1); }
DEV void mma_s8(int (&d)[4], const uint4& a, u32 b0, u32 b1) { emu::integer_product<8, true>(d, a, b0, b1); }
DEV void mma_u8(int (&d)[4], const uint4& a, u32 b0, u32 b1) { emu::integer_product<8, false>(d, a, b0, b1); }
