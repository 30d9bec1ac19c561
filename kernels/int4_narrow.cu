// A Linear in 4-bit weights and 4-bit inputs of 64, 128 or 256 channels, with all its side branches, in registers:
//
//     y = s_w (s_x Q(x_D) codes^T + x_S codes^T + x P^T) + b       P = (L R^T + S) / s_w, one matrix of bf16
//
// A warp owns 16 MT rows from first to last (int4_rows.cuh) and talks to no other. Nothing is summed by atomics, no list has a
// length that x decides: a row's result depends on the row alone.
// Operations a row: K N MAC of 4 bit (8 bit on sm_90), K N of bf16 for P, K N of bf16 for outliers; bytes a row: x and y.
#include "int4_rows.cuh"

#define WIDE 4  // flag

template <int CHUNKS, int MT, bool ASYMMETRIC>
DEV void narrow(const void* __restrict__ x, void* __restrict__ y, const Weights& by, const Limits& limits, int M, int N, int flags,
                u8* shared) {
  const int warp = THREAD >> 5, lane = THREAD & 31, r = lane >> 2, l = lane & 3;
  const int first = (BLOCK * (THREADS >> 5) + warp) * 16 * MT, K = 64 * CHUNKS;
  if (first >= M) return;
  Tokens<CHUNKS, MT, ASYMMETRIC> tokens;
  auto at = [&](int mt, int c, int h, int hi) { return (u64)(first + mt * 16 + hi * 8 + r) * K + c * 64 + h * 32 + l * 8; };
  if (flags & BF16_INPUT)
#pragma unroll
    for (int i = 0; i < MT * CHUNKS * 4; i++) {
      const int mt = i / (CHUNKS * 4), c = i / 4 % CHUNKS, h = i >> 1 & 1, hi = i & 1;
      tokens.own[mt][c][h][hi] = make_uint4(0, 0, 0, 0);
      if (first + mt * 16 + hi * 8 + r < M) tokens.own[mt][c][h][hi] = load16((const u16*)x + at(mt, c, h, hi));
    }
  auto get = [&](float (&v)[8], int mt, int c, int h, int hi) {
    if (flags & BF16_INPUT) return unpack8(v, tokens.own[mt][c][h][hi]);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0;
    if (first + mt * 16 + hi * 8 + r < M) load8(v, (const float*)x + at(mt, c, h, hi));  // read again, from L1
  };
  tokens.take(get, limits, (uint4*)shared + warp * (MT * CHUNKS * 128), lane);
#pragma unroll 1
  for (int n0 = 0; n0 < N; n0 += CHANNELS) {
    float out[MT][2][8];
    tokens.multiply(out, by, N, n0, lane);
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const int m = first + mt * 16 + hi * 8 + r;
        if (m >= M) continue;
        const u64 place = (u64)m * N + n0 + l * 8;
        if (flags & BF16_INPUT) *(uint4*)((u16*)y + place) = pack8(out[mt][hi]);
        else store8((float*)y + place, out[mt][hi]);
      }
  }
}

// x: [M][K], y: [M][N], float32 or (flag 1) bf16. Flag WIDE, top: see Weights and Limits. w, vec, row_sums, side: see Weights. tau [K] or factor: one double, or neither.
#define INT4_NARROW(NAME, BLOCKS, CHUNKS, MT, ASYMMETRIC)                                                                     \
  KERNEL(128, BLOCKS)                                                                                                        \
  NAME(const void* x, void* y, const uint4* w, const float* vec, const int* row_sums, const float* tau, const double* factor, \
       const uint4* side, int M, int N, int flags, int top) {                                                                \
    SHARED(shared);                                                                                                          \
    narrow<CHUNKS, MT, ASYMMETRIC>(x, y, Weights{w, vec, row_sums, side, flags & WIDE}, Limits{tau, factor, top}, M, N, flags, \
                                   shared);                                                                                  \
  }
INT4_NARROW(int4_64, BYTES ? 2 : 3, 1, 2, false)
INT4_NARROW(int4_64_asymmetric, BYTES ? 2 : 3, 1, 2, true)
INT4_NARROW(int4_128, BYTES ? 3 : 4, 2, 1, false)
INT4_NARROW(int4_128_asymmetric, BYTES ? 3 : 4, 2, 1, true)
INT4_NARROW(int4_256, 2, 4, 1, false)
INT4_NARROW(int4_256_asymmetric, 2, 4, 1, true)
