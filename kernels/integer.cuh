// Integer products of a warp: 4-bit codes in the tensor cores of sm_80, 86 and 89; elsewhere unpacked to s8 in registers.
//
// A word of 8 codes is k .. k + 7 of a row (A) or of an output channel (B), the lowest k in the lowest nibble. A step is
// 64 k of 16 rows and 8 channels. Integer sums know no order, so both forms give the same numbers:
//     NATIVE: one mma.m16n8k64, words as they are; A unsigned or signed.
//     else:   two mma.m16n8k32 of s8; the even codes of a word are the first 16 k, the odd ones the second. A is unpacked
//             where it is made; B in registers, as 16 times the code (the nibble in the upper half of a byte): sums / 16.
// BYTES: inputs have codes of 5 to 8 bit, which every GPU multiplies as they are in the second form, signed or not; weights
// have 4 bit, or a byte each (add_bytes).
// On sm_90 mma.s4 compiles to a routine of about 180 instructions and is 18 times slower than s8.
#pragma once
#include "warp.cuh"

#ifndef BYTES
#define BYTES 0
#endif

#ifdef BITDGDM_EMULATE
#include "emulator_integer.h"
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900 && !BYTES
#define NATIVE 1
#else
#define NATIVE 0
#endif

#if NATIVE
#define BITDGDM_MMA_S4(KIND)                                                                                           \
  asm("mma.sync.aligned.m16n8k64.row.col.s32." KIND ".s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"    \
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
DEV void mma_s4(int (&d)[4], const uint4& a, u32 b0, u32 b1) { BITDGDM_MMA_S4("s4"); }
DEV void mma_u4(int (&d)[4], const uint4& a, u32 b0, u32 b1) { BITDGDM_MMA_S4("u4"); }
#else
#define BITDGDM_MMA_S8(KIND)                                                                                           \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." KIND ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"    \
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
DEV void mma_s8(int (&d)[4], const uint4& a, u32 b0, u32 b1) { BITDGDM_MMA_S8("s8"); }
DEV void mma_u8(int (&d)[4], const uint4& a, u32 b0, u32 b1) { BITDGDM_MMA_S8("u8"); }
#endif
#endif

#if NATIVE
#define A_WORDS 1  // for 8 codes
#define SUM_SHIFT 0
#else
#define A_WORDS 2
#define SUM_SHIFT 4
#endif

// d += A B over 64 k. a: A_WORDS fragments; b0: k 0..31, b1: k 32..63, 8 codes a word.
#if NATIVE
template <bool SIGNED>
DEV void add_codes(int (&d)[4], const uint4 (&a)[A_WORDS], u32 b0, u32 b1) {
  if (SIGNED) mma_s4(d, a[0], b0, b1);
  else mma_u4(d, a[0], b0, b1);
}
#else
template <bool SIGNED>
DEV void mma_bytes(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  if (SIGNED || !BYTES) mma_s8(d, a, b0, b1);
  else mma_u8(d, a, b0, b1);
}
template <bool SIGNED>
DEV void add_codes(int (&d)[4], const uint4 (&a)[A_WORDS], u32 b0, u32 b1) {
  mma_bytes<SIGNED>(d, a[0], b0 << 4 & 0xf0f0f0f0u, b0 & 0xf0f0f0f0u);
  mma_bytes<SIGNED>(d, a[1], b1 << 4 & 0xf0f0f0f0u, b1 & 0xf0f0f0f0u);
}
// The same of weights of a byte: x, y: the even and the odd ones of the 8 at k 0..31, z, w: at 32..63.
template <bool SIGNED>
DEV void add_bytes(int (&d)[4], const uint4 (&a)[A_WORDS], const uint4& b) {
  mma_bytes<SIGNED>(d, a[0], b.x, b.y);
  mma_bytes<SIGNED>(d, a[1], b.z, b.w);
}
#endif

// Where 8 codes of row `row` (of 16) at k (a multiple of 8) lie: words of fragments [K / 64][tiles][A_WORDS][32 lanes][4].
DEV int code_word(int tiles, int tile, int row, int k, int word) {
  const int half = k >> 5 & 1, lane = (row & 7) * 4 + (k >> 3 & 3);
#if NATIVE
  return (((k >> 6) * tiles + tile) * 32 + lane) * 4 + half * 2 + (row >> 3);
#else
  return ((((k >> 6) * tiles + tile) * 2 + half) * 32 + lane) * 4 + word * 2 + (row >> 3);
#endif
}
