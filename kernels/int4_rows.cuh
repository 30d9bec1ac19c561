// A warp's 16 MT rows of 64 CHUNKS channels as the input of 4-bit Linears, in registers, and products with them. With BYTES
// of Linears whose inputs have codes of 5 to 8 bit, and weights of 3 to 8.
//
// A lane has 8 channels of a row at once, k = 8 l and 32 + 8 l of 64, and is the only one to touch them: the order of k in a
// product is free, so they are its part of every A operand.
//   codes:    range and scale by two shuffles a row; the word of 8 codes is where the integer product wants it.
//   side:     x times P = (L R^T + S) / s_w by bf16 products: on tensor cores a dense P costs less than walking lists.
//   outliers: x where it is one, else 0, times the codes unpacked to bf16 (exact) into the same sums. These operands wait in
//             shared memory, where a lane reads only what it wrote.
// Weights stream from L2 and L1 in fragment order. Channels are in such an order that a lane ends with 8 neighbours of a row.
#pragma once
#include "int4.cuh"

#define CHANNELS 32  // of a round

// How a row's input is rounded: |x| beyond tau (a channel) or factor times its norm is an outlier; neither: none is.
struct Limits {
  const float* tau;
  const double* factor;
  long long top;  // the largest code; of 4 bit it is not read
};

struct Weights {        // see pack in int4.py
  const uint4* w;       // words of 8 codes [K / 64][N / 16][32 lanes][4]
  const float* vec;     // scale [N], bias [N]
  const int* row_sums;  // [N] of the codes
  const uint4* side;    // bf16 [K / 16][N / 16][32 lanes][8], or null
  long long wide;       // a byte a weight: w is [K / 64][N / 16][2 n-tiles][32 lanes][16]. Only with BYTES
};

// Codes i and i + 4 of a word as a pair of bf16.
DEV u32 code_pair(u32 word, int i) {
  const u32 above = (word >> 4 * i & 0x000f000fu) ^ 0x43084308u;  // 128 + (code + 8)
  return fma2(above, 0x3f803f80u, 0xc308c308u);
}

// Codes j and j + 2 of a word of bytes as a pair of bf16.
DEV u32 byte_pair(u32 word, int j) { return pack2((float)((int)(word << (24 - 8 * j)) >> 24), (float)((int)(word << (8 - 8 * j)) >> 24)); }

// KEPT: x as bf16 stays where it is, in shared memory, instead of in registers.
template <int CHUNKS, int MT, bool ASYMMETRIC, bool KEPT = false>
struct Tokens {
  uint4 own[KEPT ? 1 : MT][CHUNKS][2][2];  // [tile][64 channels][half of them][row r, r + 8]: x as bf16
  const uint4* kept;                       // [CHUNKS][2][4: row r or r + 8, of every other tile][32 lanes]
  uint4 codes[MT][CHUNKS][A_WORDS];
  float scale[MT][2];
  int zero[MT][2];
  uint4* apart;  // [MT][CHUNKS][4 steps of 16][32 lanes]: outliers; null where there are none

  MEMBER uint4 row(int mt, int c, int h, int hi) const { return KEPT ? kept[((c * 2 + h) * 4 + mt * 2 + hi) * 32] : own[KEPT ? 0 : mt][c][h][hi]; }

  // get(v, mt, c, h, hi): the lane's 8 channels as float, asked for three times at most.
  template <class Get>
  MEMBER void take(const Get& get, const Limits& limits, uint4* shared, int lane) {
    const int l = lane & 3;
    apart = limits.tau || limits.factor ? shared + lane : (uint4*)0;
    const int top_code = BYTES ? (int)limits.top : top_of_4_bit<ASYMMETRIC>();
    float limit[MT][2], inverse[MT][2];
    auto tops = [&](float (&top)[8], int mt, int c, int h, int hi) {
      if (limits.tau) return load8(top, limits.tau + c * 64 + h * 32 + l * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) top[i] = limit[mt][hi];
    };
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        float v[8], top[8];
        limit[mt][hi] = as_float(0x7f800000u);
        if (limits.factor) {
          double sum = 0;
#pragma unroll
          for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              get(v, mt, c, h, hi);
#pragma unroll
              for (int i = 0; i < 8; i++) sum += (double)v[i] * (double)v[i];
            }
          sum += lane_xor_double(sum, 1), sum += lane_xor_double(sum, 2);
          limit[mt][hi] = (float)(sqrt(sum) * *limits.factor);
        }
        float least = 0, most = 0, broken = 0;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            get(v, mt, c, h, hi), tops(top, mt, c, h, hi);
#pragma unroll
            for (int i = 0; i < 8; i++) {
              broken = fmaf(v[i], 0.0f, broken);  // NaN if one is not finite
              const float t = fabsf(v[i]) <= top[i] ? v[i] : 0.0f;
              if (ASYMMETRIC) least = fminf(least, t);
              most = fmaxf(most, ASYMMETRIC ? t : fabsf(t));
            }
          }
        most = quad_max(most), broken = quad_sum(broken);
        if (ASYMMETRIC) least = -quad_max(-least);
        token_scale<ASYMMETRIC>(least, most, top_code, scale[mt][hi], inverse[mt][hi], zero[mt][hi]);
        if (broken != 0) scale[mt][hi] = as_float(0x7fffffffu);
      }
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        u32 even[2][2], odd[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          u32 out[2][4];
#pragma unroll
          for (int hi = 0; hi < 2; hi++) {
            float v[8], top[8];
            u32 code[8];
            bool in[8];
            get(v, mt, c, h, hi), tops(top, mt, c, h, hi);
#pragma unroll
            for (int i = 0; i < 8; i++) {
              in[i] = fabsf(v[i]) <= top[i];
              code[i] = token_code<ASYMMETRIC>(in[i] ? v[i] : 0.0f, top_code, inverse[mt][hi], zero[mt][hi]);
            }
            even[h][hi] = bytes_of(code[0], code[2], code[4], code[6]), odd[h][hi] = bytes_of(code[1], code[3], code[5], code[7]);
            if (!KEPT) own[KEPT ? 0 : mt][c][h][hi] = make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
#pragma unroll
            for (int i = 0; i < 4; i++) out[hi][i] = pack2(in[i] ? 0.0f : v[i], in[i + 4] ? 0.0f : v[i + 4]);
          }
          if (apart)
#pragma unroll
            for (int s = 0; s < 2; s++)
              apart[((mt * CHUNKS + c) * 4 + h * 2 + s) * 32] =
                  make_uint4(out[0][2 * s], out[1][2 * s], out[0][2 * s + 1], out[1][2 * s + 1]);
        }
#if NATIVE
        auto word = [&](int h, int hi) { return (even[h][hi] & 0x0f0f0f0fu) | (odd[h][hi] & 0x0f0f0f0fu) << 4; };
        codes[mt][c][0] = make_uint4(word(0, 0), word(0, 1), word(1, 0), word(1, 1));
#else
#pragma unroll
        for (int h = 0; h < 2; h++) codes[mt][c][h] = make_uint4(even[h][0], even[h][1], odd[h][0], odd[h][1]);
#endif
      }
  }

  // out[tile][row r, r + 8]: channels n0 + 8 l .. + 7 of N of the Linear. Without branches to the last bit quant/linear.py's.
  MEMBER void multiply(float (&out)[MT][2][8], const Weights& by, int N, int n0, int lane) const {
    int acc[MT][4][4];
    float sum[MT][4][4];
#pragma unroll
    for (int i = 0; i < MT * 16; i++) acc[i >> 4][i >> 2 & 3][i & 3] = 0, sum[i >> 4][i >> 2 & 3][i & 3] = 0;
    auto words = [&](int c, int np) { return load16(by.w + (c * (N >> 4) + (n0 >> 4) + np) * 32 + lane); };
#if BYTES
    auto bytes = [&](int c, int nt) { return load16(by.w + ((c * (N >> 4) + (n0 >> 4)) * 2 + nt) * 32 + lane); };
    const bool wide = by.wide;
    if (wide)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int nt = 0; nt < 4; nt++) {
          const uint4 b = bytes(c, nt);
#pragma unroll
          for (int mt = 0; mt < MT; mt++) add_bytes<!ASYMMETRIC>(acc[mt][nt], codes[mt][c], b);
        }
#else
    const bool wide = false;
#endif
    if (!wide)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int np = 0; np < 2; np++) {
          const uint4 b = words(c, np);
#pragma unroll
          for (int mt = 0; mt < MT; mt++) {
            add_codes<!ASYMMETRIC>(acc[mt][2 * np], codes[mt][c], b.x, b.y);
            add_codes<!ASYMMETRIC>(acc[mt][2 * np + 1], codes[mt][c], b.z, b.w);
          }
        }
    if (by.side)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
          for (int np = 0; np < 2; np++) {
            const uint4 b = load16(by.side + ((c * 4 + s) * (N >> 4) + (n0 >> 4) + np) * 32 + lane);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
              const uint4 x0 = row(mt, c, s >> 1, 0), x1 = row(mt, c, s >> 1, 1);
              const uint4 a = s & 1 ? make_uint4(x0.z, x1.z, x0.w, x1.w) : make_uint4(x0.x, x1.x, x0.y, x1.y);
              mma(sum[mt][2 * np], a, b.x, b.y, sum[mt][2 * np]);
              mma(sum[mt][2 * np + 1], a, b.z, b.w, sum[mt][2 * np + 1]);
            }
          }
#if BYTES
    if (apart && wide)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int nt = 0; nt < 4; nt++) {
          const uint4 b = bytes(c, nt);
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const u32 p = byte_pair(s < 2 ? b.x : b.z, s & 1), q = byte_pair(s < 2 ? b.y : b.w, s & 1);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) mma(sum[mt][nt], apart[((mt * CHUNKS + c) * 4 + s) * 32], p, q, sum[mt][nt]);
          }
        }
#endif
    if (apart && !wide)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int np = 0; np < 2; np++) {
          const uint4 b = words(c, np);
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const u32 b0 = s < 2 ? b.x : b.y, b1 = s < 2 ? b.z : b.w;
            const u32 p0 = code_pair(b0, 2 * (s & 1)), q0 = code_pair(b0, 2 * (s & 1) + 1);
            const u32 p1 = code_pair(b1, 2 * (s & 1)), q1 = code_pair(b1, 2 * (s & 1) + 1);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
              const uint4 a = apart[((mt * CHUNKS + c) * 4 + s) * 32];
              mma(sum[mt][2 * np], a, p0, q0, sum[mt][2 * np]);
              mma(sum[mt][2 * np + 1], a, p1, q1, sum[mt][2 * np + 1]);
            }
          }
        }
    const int n = n0 + (lane & 3) * 8;  // the lane's 8 channels: two of each n-tile
    int sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = ASYMMETRIC ? by.row_sums[n + i] : 0;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        float s[8], b[8];
        load8(s, by.vec + n), load8(b, by.vec + N + n);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int total = (acc[mt][i >> 1][2 * hi + (i & 1)] >> (wide ? 0 : SUM_SHIFT)) + zero[mt][hi] * sums[i];
          const float v = add_rn(mul_rn((float)total, scale[mt][hi]), sum[mt][i >> 1][2 * hi + (i & 1)]);
          out[mt][hi][i] = add_rn(mul_rn(v, s[i]), b[i]);
        }
      }
  }
};

DEV uint4 pack8(const float (&v)[8]) { return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7])); }
DEV void store8(float* at, const float (&v)[8]) {
  ((float4*)at)[0] = make_float4(v[0], v[1], v[2], v[3]), ((float4*)at)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
