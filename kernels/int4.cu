// A Linear in 4-bit weights and 4-bit inputs of more than 256 channels, with all its side branches, in one pass over the
// input (fewer channels: int4_narrow.cu):
//
//     y = s_w (s_x (Q(x_D) codes^T) + x_S codes^T) + x (L R^T + S)^T + b       as quant/linear.py defines it
//
// A warp owns 16 MT rows from first to last and talks to no other; a block is only so many warps.
//   rows:     threshold, range, codes of four rows at a time, so that their loads wait together; the later ones of three
//             readings come from L1. In shared memory stay the codes in fragment order, a bit an element that is an outlier, and x as bf16,
//             rows r and r + 8 in a word, for the branches.
//   products: 64 channels at a time. Weights, 4 bit, stream from L2 in fragment order, the next 64 k or channels ahead.
//   outliers: a lane walks the bits of its rows; a transposed copy of the codes gives 16 of its channels in 8 bytes.
//   side:     x R by bf16 products once; L by one more product of 16 (32) k; S as lists of fixed width, a word an entry.
// Nothing is summed by atomics, no list has a length that x decides: a row's result depends on the row alone.
// Shared memory of a warp of 16 rows, K = 2048: codes 16 KB (32 KB unpacked), x 65 KB, bits 4 KB.
// Operations a row: K N MAC of 4 bit (8 bit on sm_90), then N (2 + rank + 2 width) others; bytes a row: x and y.
#include "int4.cuh"

#define CHANNELS 64   // of a round
#define BATCH 4

struct Rows {  // a warp's part of shared memory
  u32* codes;         // [K / 64][MT][A_WORDS][32][4]
  u32* x;             // [MT][8][row_words]: rows r and r + 8 of a tile as bf16; null where no branch needs it
  u8* outlier;        // [16 MT][K / 8]
  float* scale;       // [16 MT]
  int* zero;          // [16 MT]
};

// Where element k of a row lies in its part of Rows.x. Lanes that write 8 k each, and lanes (r, l) that read rows r at
// 2 l, meet in different banks.
DEV int place_of(int k, int K) { return (k & 7) * ((K >> 3) + 4) + (k >> 3); }
DEV int row_words(int K) { return K + 33; }

// Rows first .. first + 16 MT - 1 into `to`; rows beyond M are zeros. tau [K], or factor: sigma / sqrt(K), or neither.
template <int MT, bool ASYMMETRIC>
DEV void take_rows(const Rows& to, const void* x, const float* tau, const double* factor, int first, int M, int K, int flags,
                   int lane) {
  const int chunks = (K + 255) / 256;  // 8 elements a lane
  const bool outliers = flags & OUTLIERS;
#pragma unroll 1
  for (int base = 0; base < 16 * MT; base += BATCH) {  // the loads of so many rows wait together
    float v[BATCH][8], limit[BATCH], least[BATCH], most[BATCH], broken[BATCH];
    auto load = [&](int c) {
      const int k = (c * 32 + lane) * 8;
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const u64 at = (u64)(first + base + b) * K + k;
        if (first + base + b < M && k < K) {
          if (flags & BF16_INPUT) unpack8(v[b], load16((const u16*)x + at));
          else load8(v[b], (const float*)x + at);
        } else
#pragma unroll
          for (int i = 0; i < 8; i++) v[b][i] = 0;
      }
    };
    auto inlier = [&](int b, int i, int k) { return !outliers || fabsf(v[b][i]) <= (tau ? tau[min(k + i, K - 1)] : limit[b]); };
    if (factor) {
      double sum[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) sum[b] = 0;
      for (int c = 0; c < chunks; c++) {
        load(c);
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
          for (int i = 0; i < 8; i++) sum[b] += (double)v[b][i] * (double)v[b][i];
      }
      for (int mask = 16; mask; mask /= 2)
#pragma unroll
        for (int b = 0; b < BATCH; b++) sum[b] += lane_xor_double(sum[b], mask);
#pragma unroll
      for (int b = 0; b < BATCH; b++) limit[b] = (float)(sqrt(sum[b]) * *factor);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) least[b] = most[b] = broken[b] = 0;
    for (int c = 0; c < chunks; c++) {
      load(c);
#pragma unroll
      for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (!(fabsf(v[b][i]) < 3.4028236e38f)) broken[b] = 1;
          const float t = inlier(b, i, (c * 32 + lane) * 8) ? v[b][i] : 0.0f;
          if (ASYMMETRIC) least[b] = fminf(least[b], t);
          most[b] = fmaxf(most[b], ASYMMETRIC ? t : fabsf(t));
        }
    }
    for (int mask = 16; mask; mask /= 2)
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if (ASYMMETRIC) least[b] = fminf(least[b], lane_xor(least[b], mask));
        most[b] = fmaxf(most[b], lane_xor(most[b], mask)), broken[b] = fmaxf(broken[b], lane_xor(broken[b], mask));
      }
    float inverse[BATCH];
    int zero[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float scale;
      token_scale<ASYMMETRIC>(least[b], most[b], top_of_4_bit<ASYMMETRIC>(), scale, inverse[b], zero[b]);
      if (lane == 0) to.scale[base + b] = broken[b] > 0 ? as_float(0x7fffffffu) : scale, to.zero[base + b] = zero[b];
    }
    for (int c = 0; c < chunks; c++) {
      const int k = (c * 32 + lane) * 8;
      load(c);
      if (k >= K) continue;
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        u32 code[8], bits = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const bool in = inlier(b, i, k);
          bits |= (u32)!in << i;
          code[i] = token_code<ASYMMETRIC>(in ? v[b][i] : 0.0f, top_of_4_bit<ASYMMETRIC>(), inverse[b], zero[b]);
        }
        const int row = base + b, tile = row >> 4, inside = row & 15;
        const u32 even = bytes_of(code[0], code[2], code[4], code[6]), odd = bytes_of(code[1], code[3], code[5], code[7]);
#if NATIVE
        to.codes[code_word(MT, tile, inside, k, 0)] = (even & 0x0f0f0f0fu) | (odd & 0x0f0f0f0fu) << 4;
#else
        to.codes[code_word(MT, tile, inside, k, 0)] = even;
        to.codes[code_word(MT, tile, inside, k, 1)] = odd;
#endif
        to.outlier[row * (K >> 3) + (k >> 3)] = (u8)bits;
        if (to.x) {
          u16* at = (u16*)(to.x + (tile * 8 + (inside & 7)) * row_words(K) + place_of(k, K)) + (inside >> 3);
#pragma unroll
          for (int i = 0; i < 8; i++) at[2 * place_of(i, K)] = to_bf16(v[b][i]);
        }
      }
    }
  }
  warp_sync();
}

// x R: two products of 16 k a step and 8 components; then, packed, the A operand of the product with L.
template <int MT>
DEV void project(uint4 (&t)[2][MT], const Rows& rows, const uint4* down, int K, int ranks, int lane) {
  float sum[2][MT][2][4];
#pragma unroll
  for (int i = 0; i < 2 * MT * 8; i++) sum[i / (MT * 8)][i / 8 % MT][i / 4 % 2][i & 3] = 0;
  const int r = lane >> 2, l = lane & 3;
#pragma unroll 1
  for (int ks = 0; ks < K >> 4; ks++) {
    uint4 a[MT];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const u32* k0 = rows.x + (mt * 8 + r) * row_words(K) + place_of(2 * l, K) + 2 * ks;
      const u32 x0 = k0[0], x1 = k0[place_of(1, K)], x8 = k0[1], x9 = k0[place_of(1, K) + 1];
      a[mt] = make_uint4(pick_bytes(x0, x1, 0x5410), pick_bytes(x0, x1, 0x7632), pick_bytes(x8, x9, 0x5410), pick_bytes(x8, x9, 0x7632));
    }
#pragma unroll
    for (int part = 0; part < 2; part++)
      if (part < ranks) {
        const uint4 b = load16(down + (ks * ranks + part) * 32 + lane);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
          mma(sum[part][mt][0], a[mt], b.x, b.y, sum[part][mt][0]);
          mma(sum[part][mt][1], a[mt], b.z, b.w, sum[part][mt][1]);
        }
      }
  }
#pragma unroll
  for (int part = 0; part < 2; part++)
#pragma unroll
    for (int mt = 0; mt < MT; mt++) t[part][mt] = pack_tile(sum[part][mt][0], sum[part][mt][1]);
}

DEV int code_of(u32 word, int i) { return (int)(word << (28 - 4 * i)) >> 28; }

// The outliers of one row times their codes, onto the lane's 16 channels of the round at n0.
template <int MT>
DEV void add_outliers(float (&v)[MT][8][4], int tile, int hi, const Rows& rows, const uint2* codes_t, int K, int N, int n0, int r,
                      int l) {
  const u32* bits = (const u32*)(rows.outlier + (tile * 16 + hi * 8 + r) * (K >> 3));
  for (int w = 0; w < K >> 5; w++)
    for (u32 left = bits[w]; left; left &= left - 1) {
      const int k = w * 32 + bit_count((left & (0u - left)) - 1);
      const u32 pair = rows.x[(tile * 8 + r) * row_words(K) + place_of(k, K)];
      const float x = hi ? high(pair) : low(pair);
      const uint2 c = codes_t[((u64)k * (N / CHANNELS) + n0 / CHANNELS) * 4 + l];
#pragma unroll
      for (int nt = 0; nt < 8; nt++) {
        const u32 word = nt < 4 ? c.x : c.y;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& sum = v[tile][nt][2 * hi + e];
          sum = fmaf(x, (float)code_of(word, nt % 4 * 2 + e), sum);
        }
      }
    }
}

template <int MT, bool ASYMMETRIC>
DEV void linear(const void* x, void* y, const uint4* __restrict__ w, const uint2* __restrict__ codes_t,
                const float* __restrict__ vec, const int* __restrict__ row_sums, const float* __restrict__ tau,
                const double* __restrict__ factor, const uint4* __restrict__ down, const uint4* __restrict__ up,
                const uint2* __restrict__ sparse, int M, int K, int N, int ranks, int width, int flags, u8* shared) {
  const int warp = THREAD >> 5, lane = THREAD & 31, r = lane >> 2, l = lane & 3;
  const bool branches = ranks || width || flags & OUTLIERS;
  Rows rows;
  const int codes = K * 8 * MT * A_WORDS, transposed = branches ? row_words(K) * 32 * MT : 0, bits = K * 2 * MT;
  u8* own = shared + warp * (codes + transposed + bits + 128 * MT);
  rows.codes = (u32*)own, own += codes;
  rows.x = branches ? (u32*)own : (u32*)0, own += transposed;
  rows.outlier = own, own += bits;
  rows.scale = (float*)own, rows.zero = (int*)(own + 64 * MT);
  const int first = (BLOCK * (THREADS >> 5) + warp) * 16 * MT;
  if (first >= M) return;
  take_rows<MT, ASYMMETRIC>(rows, x, tau, factor, first, M, K, flags, lane);

  uint4 t[2][MT];
  if (ranks) project<MT>(t, rows, down, K, ranks, lane);
  float scale[MT][2];
  int zero[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int hi = 0; hi < 2; hi++) scale[mt][hi] = rows.scale[mt * 16 + hi * 8 + r], zero[mt][hi] = rows.zero[mt * 16 + hi * 8 + r];

  uint4 b[4];
  auto load_weights = [&](uint4 (&to)[4], int ks, int n0) {  // [K / 64][N / 16][32]
#pragma unroll
    for (int np = 0; np < 4; np++) to[np] = load16(w + (ks * (N >> 4) + (n0 >> 4) + np) * 32 + lane);
  };
  load_weights(b, 0, 0);
#pragma unroll 1
  for (int n0 = 0; n0 < N; n0 += CHANNELS) {
    int acc[MT][8][4];
#pragma unroll
    for (int i = 0; i < MT * 32; i++) acc[i >> 5][i >> 2 & 7][i & 3] = 0;
#pragma unroll 1
    for (int ks = 0; ks < K >> 6; ks++) {
      uint4 next[4];
      const bool last = ks + 1 == K >> 6;
      load_weights(next, last ? 0 : ks + 1, last ? min(n0 + CHANNELS, N - CHANNELS) : n0);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        uint4 a[A_WORDS];
#pragma unroll
        for (int i = 0; i < A_WORDS; i++) a[i] = ((const uint4*)rows.codes)[((ks * MT + mt) * A_WORDS + i) * 32 + lane];
#pragma unroll
        for (int np = 0; np < 4; np++) {
          add_codes<!ASYMMETRIC>(acc[mt][2 * np], a, b[np].x, b[np].y);
          add_codes<!ASYMMETRIC>(acc[mt][2 * np + 1], a, b[np].z, b[np].w);
        }
      }
#pragma unroll
      for (int np = 0; np < 4; np++) b[np] = next[np];
    }

    float v[MT][8][4];
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      const int2 sums = ASYMMETRIC ? *(const int2*)(row_sums + n0 + nt * 8 + l * 2) : make_int2(0, 0);
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int sum = (acc[mt][nt][i] >> SUM_SHIFT) + zero[mt][i >> 1] * (i & 1 ? sums.y : sums.x);
          v[mt][nt][i] = mul_rn((float)sum, scale[mt][i >> 1]);
        }
    }
    if (flags & OUTLIERS) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) add_outliers<MT>(v, mt, hi, rows, codes_t, K, N, n0, r, l);
    }
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      const int n = n0 + nt * 8 + l * 2;
      float side[MT][4];
#pragma unroll
      for (int i = 0; i < MT * 4; i++) side[i >> 2][i & 3] = 0;
#pragma unroll
      for (int part = 0; part < 2; part++)
        if (part < ranks) {
          const uint2 u = ((const uint2*)up)[((part * (N >> 4) + (n >> 4)) * 32 + lane) * 2 + (nt & 1)];
#pragma unroll
          for (int mt = 0; mt < MT; mt++) mma(side[mt], t[part][mt], u.x, u.y, side[mt]);
        }
      for (int j = 0; j < width; j++) {
        const uint2 entry = sparse[(j * N + n) >> 1];  // of channels n and n + 1: the place of k, above it the value as bf16
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
          const u32* own = rows.x + (mt * 8 + r) * row_words(K);
          const u32 x0 = own[entry.x & 0xffff], x1 = own[entry.y & 0xffff];
          side[mt][0] = fmaf(low(x0), high(entry.x), side[mt][0]), side[mt][1] = fmaf(low(x1), high(entry.y), side[mt][1]);
          side[mt][2] = fmaf(high(x0), high(entry.x), side[mt][2]), side[mt][3] = fmaf(high(x1), high(entry.y), side[mt][3]);
        }
      }
      const float2 s = *(const float2*)(vec + n), bias = *(const float2*)(vec + N + n);
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int hi = 0; hi < 2; hi++) {
          const int m = first + mt * 16 + hi * 8 + r;
          const float y0 = add_rn(add_rn(mul_rn(v[mt][nt][2 * hi], s.x), side[mt][2 * hi]), bias.x);
          const float y1 = add_rn(add_rn(mul_rn(v[mt][nt][2 * hi + 1], s.y), side[mt][2 * hi + 1]), bias.y);
          if (m >= M) continue;
          if (flags & BF16_INPUT) ((u32*)y)[((u64)m * N + n) >> 1] = pack2(y0, y1);
          else ((float2*)y)[((u64)m * N + n) >> 1] = make_float2(y0, y1);
        }
    }
  }
}

// x: [M][K], y: [M][N], float32 or (flag 1) bf16. w: words of 8 codes [K / 64][N / 16][32 lanes][4]: for channels g and
// g + 8 of the 16, k 8 l.. and 32 + 8 l..; codes_t: [K][N / 64][4 lanes l][8 n-tiles] bytes: codes of channels 8 nt + 2 l
// and + 1. vec: scale [N], bias [N]; row_sums [N] of the codes. tau [K] or factor: one double; outliers only where flag 2.
// down: packed bf16 [16 ranks, K], up: packed bf16 [N, 16 ranks]; sparse: words [width][N].
#define INT4_KERNEL(NAME, MT, ASYMMETRIC)                                                                                  \
  KERNEL(128, 2)                                                                                                           \
  NAME(const void* x, void* y, const uint4* w, const uint2* codes_t, const float* vec, const int* row_sums,                \
       const float* tau, const double* factor, const uint4* down, const uint4* up, const uint2* sparse, int M, int K,      \
       int N, int ranks, int width, int flags) {                                                                           \
    SHARED(shared);                                                                                                        \
    linear<MT, ASYMMETRIC>(x, y, w, codes_t, vec, row_sums, tau, factor, down, up, sparse, M, K, N, ranks, width, flags,   \
                           shared);                                                                                        \
  }
INT4_KERNEL(int4_linear, 2, false)
INT4_KERNEL(int4_linear_asymmetric, 2, true)
INT4_KERNEL(int4_long, 1, false)  // 16 rows a warp, where 32 are more than shared memory holds
INT4_KERNEL(int4_long_asymmetric, 1, true)
