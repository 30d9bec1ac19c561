// Everything a layer does to rows of X (see node_wg.cu), with products of 8-bit floats and three warpgroups that compute.
//
// A warpgroup holds 64 rows. A product of 256 x 256 is made in halves of 128 output channels, 64 float sums a thread, so
// that three warpgroups fit into an SM: the sums of one are on the tensor cores while two others scale, normalise and
// cast. A warp has all 256 channels of its 16 rows; what a product gives is, cast with saturation, the A operand of the
// next: no scale is looked for at run time. Between products rows wait in shared memory, each lane its own: the residual
// as f16 (8 KB a warp), the operand as e4m3 (4 KB, and 2 KB where a product writes what it still reads). X and what
// attention gathered arrive there by bulk copies that were started a pass before.
// Weights: stages of 8 KB through a ring of five; all warpgroups read a stage once.
// Operations a row: 6 x 65,536 MAC = 96 tensor clocks of an SM; bytes a row: 0.75 KB in, 2 KB out, 2 KB of weights from L2.
// What the input and output MLPs do (16 bit in every recipe) is made in bf16, in quarters of 64 channels.
#include "hopper.cuh"
#include "fp8.cuh"

#ifndef IN_KS
#define IN_KS 1
#endif
#define WGS 3
#define BLOCK_TILES 12
#define STAGES 5
#define STAGE 8192
#define VEC_MAX 4096

struct Ring {
  u8* data;
  u64 *full, *empty;
  int slot;
  u32 phase;
  MEMBER void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

struct Work {
  Ring ring;
  uint4 *kept, *bytes, *spare;  // of the warp, at the lane's own: [16], [8] and [4][32 lanes]
  u64* arrived;                 // rows of the pass are in kept and bytes
  const float* vec;
  int wg, lane;
};

// acc = A W^T over SLABS slabs of N rows, PER slabs a stage. BYTES: of e4m3, else of bf16. A: the lane's own, the first
// half of the slabs from `a`, the second from `b`. keep: the sums go on.
template <bool BYTES, int N, int SLABS, int PER>
DEV void multiply(float (&acc)[N / 8][4], const uint4* a, const uint4* b, Work& w, bool keep = false) {
  Ring& ring = w.ring;
  int before = 0;
  uint4 rows[SLABS];
  float none[N / 8][4];  // the first product overwrites the sums: their old values need no registers until then
  if (!keep)
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i >> 2][i & 3] = none[i >> 2][i & 3];
#pragma unroll
  for (int s = 0; s < SLABS; s += PER) {
#pragma unroll
    for (int i = s; i < s + PER; i++) rows[i] = (2 * i < SLABS ? a : b)[i * 32];
    barrier_wait(ring.full + ring.slot, ring.phase);
    products_begin();
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const u64 weights = slab(ring.data + ring.slot * STAGE + i * N * 32, N);
      if (BYTES) product8(acc, rows[s + i], weights, keep || s + i > 0);
      else product(acc, rows[s + i], weights, keep || s + i > 0);
    }
    products_commit();
    if (s > 0) {
      products_wait<1>();
      if (w.lane == 0) barrier_arrive(ring.empty + before);
    }
    before = ring.slot;
    ring.next();
  }
  products_wait<0>();
  if (w.lane == 0) barrier_arrive(ring.empty + before);
}

// acc * scale + bias. vec: a float4 (scale, scale, bias, bias) a pair of channels.
template <int NT>
DEV void finish(float (&h)[NT][4], const float* vec, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    if (nt % 2 == 0) no_load_crosses();
    const float4 v = *(const float4*)(vec + (nt * 4 + (lane & 3)) * 4);
    h[nt][0] = fmaf(h[nt][0], v.x, v.z), h[nt][1] = fmaf(h[nt][1], v.y, v.w);
    h[nt][2] = fmaf(h[nt][2], v.x, v.z), h[nt][3] = fmaf(h[nt][3], v.y, v.w);
  }
}

DEV void add_kept(float (&h)[16][4], const uint4* x) {  // x: [8][32 lanes], at the lane's own
#pragma unroll
  for (int np = 0; np < 8; np++) {
    if (np % 2 == 0) no_load_crosses();
    add_half_tile(h[2 * np], h[2 * np + 1], x[np * 32]);
  }
}

// LayerNorm of rows: the first 128 channels wait in `kept` as f16, the others are `second`. Gives the A operand of the next
// product to w.bytes, and all 16 tiles as f16 to `out`. vec: a float4 (gamma, gamma, beta, beta) a pair of channels.
template <class Out>
DEV void norm(float (&second)[16][4], Work& w, const float* vec, Out out) {
  const uint4* kept = w.kept;
  const int lane = w.lane;
  const float scale = 1.0f / 256;
  float sum[2] = {0, 0}, sq[2] = {0, 0};
#pragma unroll
  for (int np = 0; np < 8; np++) {
    if (np % 2 == 0) no_load_crosses();
    const uint4 t = kept[np * 32];
    sum[0] += half_low(t.x) + half_high(t.x) + (half_low(t.z) + half_high(t.z));
    sum[1] += half_low(t.y) + half_high(t.y) + (half_low(t.w) + half_high(t.w));
  }
#pragma unroll
  for (int nt = 0; nt < 16; nt++) sum[0] += second[nt][0] + second[nt][1], sum[1] += second[nt][2] + second[nt][3];
  const float mean[2] = {quad_sum(sum[0]) * scale, quad_sum(sum[1]) * scale};
  auto square = [&](float v, int hi) {
    const float d = v - mean[hi];
    sq[hi] = fmaf(d, d, sq[hi]);
  };
#pragma unroll
  for (int np = 0; np < 8; np++) {
    if (np % 2 == 0) no_load_crosses();
    const uint4 t = kept[np * 32];
    square(half_low(t.x), 0), square(half_high(t.x), 0), square(half_low(t.z), 0), square(half_high(t.z), 0);
    square(half_low(t.y), 1), square(half_high(t.y), 1), square(half_low(t.w), 1), square(half_high(t.w), 1);
  }
#pragma unroll
  for (int i = 0; i < 64; i++) square(second[i >> 2][i & 3], i >> 1 & 1);
  float inverse[2], shift[2];
#pragma unroll
  for (int hi = 0; hi < 2; hi++) {
    inverse[hi] = rsqrtf(quad_sum(sq[hi]) * scale + 1e-5f);
    shift[hi] = -mean[hi] * inverse[hi];
  }
  auto normed = [&](float (&h)[4], int nt) {
    const float4 v = *(const float4*)(vec + (nt * 4 + (lane & 3)) * 4);
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      h[2 * hi] = fmaf(fmaf(h[2 * hi], inverse[hi], shift[hi]), v.x, v.z);
      h[2 * hi + 1] = fmaf(fmaf(h[2 * hi + 1], inverse[hi], shift[hi]), v.y, v.w);
    }
  };
#pragma unroll
  for (int s = 0; s < 8; s++) {
    no_load_crosses();
    float t[4][4];
#pragma unroll
    for (int i = 0; i < 16; i++) t[i >> 2][i & 3] = s < 4 ? 0.0f : second[(s & 3) * 4 + (i >> 2)][i & 3];
    if (s < 4) add_half_tile(t[0], t[1], kept[2 * s * 32]), add_half_tile(t[2], t[3], kept[(2 * s + 1) * 32]);
#pragma unroll
    for (int i = 0; i < 4; i++) normed(t[i], s * 4 + i);
    w.bytes[s * 32] = byte_tile(t[0], t[1], t[2], t[3]);
    out(2 * s, half_tile(t[0], t[1]));
    out(2 * s + 1, half_tile(t[2], t[3]));
  }
}

// The half of a product as f16 at the lane's own place.
DEV void keep(uint4* to, const float (&h)[16][4]) {
#pragma unroll
  for (int np = 0; np < 8; np++) to[np * 32] = half_tile(h[2 * np], h[2 * np + 1]);
}

#define LINEAR 512  // floats of a Linear in vec

// Of the next layer's X in w.bytes: queries, keys and values of its attention; kv by row: see edge_attend.
DEV void queries(Work& w, const float* vec, uint4* q, uint4* kv, int tile, bool valid) {
  float acc[16][4];
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    multiply<true, 128, 8, 2>(acc, w.bytes, w.bytes, w);
    finish(acc, vec + half * 256, w.lane);
    if (valid) keep(q + ((u64)tile * 16 + half * 8) * 32 + w.lane, acc);
  }
#pragma unroll 1
  for (int half = 0; half < 2; half++) {  // keys, then values of the same channels
    multiply<true, 128, 8, 2>(acc, w.bytes, w.bytes, w);
    finish(acc, vec + LINEAR + half * 256, w.lane);
    keep(w.kept, acc);
    multiply<true, 128, 8, 2>(acc, w.bytes, w.bytes, w);
    finish(acc, vec + 2 * LINEAR + half * 256, w.lane);
    uint4* to = kv + (u64)(tile * 16 + (w.lane >> 2)) * 64 + half * 32 + (w.lane & 3);
    if (valid)
#pragma unroll
      for (int np = 0; np < 8; np++) {
        if (np % 2 == 0) no_load_crosses();
        const uint4 k = w.kept[np * 32], v = half_tile(acc[2 * np], acc[2 * np + 1]);
        to[np * 4] = make_uint4(k.x, k.z, v.x, v.z);
        to[np * 4 + 8 * 64] = make_uint4(k.y, k.w, v.y, v.w);
      }
  }
}

// A product + what was kept: the first half of it to w.kept, the second stays in acc.
DEV void residual(float (&acc)[16][4], const uint4* a, const uint4* b, Work& w, const float* vec) {
  multiply<true, 128, 8, 2>(acc, a, b, w);
  finish(acc, vec, w.lane);
  add_kept(acc, w.kept);
  keep(w.kept, acc);
  multiply<true, 128, 8, 2>(acc, a, b, w);
  finish(acc, vec + 256, w.lane);
  add_kept(acc, w.kept + 256);
}

// After attention: x_out + X, LayerNorm, FFN, LayerNorm. w.vec: three products, then two norms at `norms`.
template <class Out>
DEV void update(Work& w, const float* norms, u32 parity, Out out) {
  float acc[16][4];
  barrier_wait(w.arrived, parity);
  residual(acc, w.bytes, w.bytes, w, w.vec);
  norm(acc, w, norms, [&](int np, const uint4& t) { w.kept[np * 32] = t; });
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    multiply<true, 128, 8, 2>(acc, w.bytes, w.bytes, w);
    finish(acc, w.vec + LINEAR + half * 256, w.lane);
    uint4* to = half ? w.bytes + 128 : w.spare;
#pragma unroll
    for (int s = 0; s < 4; s++) to[s * 32] = byte_tile_relu(acc[4 * s], acc[4 * s + 1], acc[4 * s + 2], acc[4 * s + 3]);
  }
  residual(acc, w.spare, w.bytes, w, w.vec + 2 * LINEAR);
  norm(acc, w, norms + 512, out);
}

// Copies the stages of a pass into the ring: `total` of size(i) bytes.
template <class Size>
DEV void feed(Ring& ring, const u8* from, int total, Size size) {
#pragma unroll 1
  for (int i = 0; i < total; i++) {
    const int bytes = size(i);
    barrier_wait(ring.empty + ring.slot, ring.phase ^ 1);
    barrier_expect(ring.full + ring.slot, bytes);
    copy_bulk(ring.data + ring.slot * STAGE, from, bytes, ring.full + ring.slot);
    from += bytes;
    ring.next();
  }
}

// Splits the block: `copy` for one thread, `compute` for three warpgroups; both see the same passes. X, gathered: null
// where the passes don't read them.
template <class Copy, class Compute>
DEV void run(u8* shared, const uint4* X, const uint4* gathered, const float* vec, int floats, int tiles, Copy copy,
             Compute compute) {
  u64* barriers = (u64*)shared;
  float* v = (float*)(shared + 256);
  uint4* kept = (uint4*)(shared + 256 + VEC_MAX * 4);
  uint4 *bytes = kept + BLOCK_TILES * 512, *spare = bytes + BLOCK_TILES * 256;
  Work w;
  w.ring.data = (u8*)(spare + BLOCK_TILES * 128), w.ring.full = barriers, w.ring.empty = barriers + STAGES;
  w.ring.slot = 0, w.ring.phase = 0;
  w.wg = (THREAD >> 7) - 1, w.lane = THREAD & 31;
  w.vec = v;
  for (int i = THREAD; i < floats; i += 512) v[i] = vec[i];
  if (THREAD == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(barriers + i, 1), barrier_init(barriers + STAGES + i, 4 * WGS);
    for (int i = 0; i < BLOCK_TILES; i++) barrier_init(barriers + 2 * STAGES + i, 1);
    barrier_init_done();
  }
  block_sync();
  const int passes = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
  if (w.wg < 0) {
    registers_give<24>();
    if (THREAD == 0)
      for (int pass = BLOCK; pass < passes; pass += BLOCKS) copy(w.ring);
  } else {
    registers_take<160>();
    const int mine = w.wg * 4 + (THREAD >> 5 & 3);
    w.kept = kept + mine * 512 + w.lane, w.bytes = bytes + mine * 256 + w.lane, w.spare = spare + mine * 128 + w.lane;
    w.arrived = barriers + 2 * STAGES + mine;
    auto ask = [&](int pass) {
      if (X == 0 || pass >= passes || w.lane != 0) return;
      const int tile = min(pass * BLOCK_TILES + mine, tiles - 1);
      barrier_expect(w.arrived, 8192 + 4096);
      copy_bulk(w.kept, X + (u64)tile * 512, 8192, w.arrived);
      copy_bulk(w.bytes, gathered + (u64)tile * 256, 4096, w.arrived);
    };
    ask(BLOCK);
    u32 parity = 0;
    for (int pass = BLOCK; pass < passes; pass += BLOCKS, parity ^= 1) {
      const int tile = pass * BLOCK_TILES + mine;
      compute(w, min(tile, tiles - 1), tile < tiles, parity);
      fence_async();  // what the lanes wrote there is overwritten by the copies
      warp_sync();
      ask(pass + BLOCKS);
    }
  }
}

// features: [tiles][IN_KS][32] bf16; X, q: [tiles][16][32]; kv: [rows][64], f16. w: slabs of the first input Linear (two
// halves of 128 rows), of the second (four quarters of 64), of q (two halves), then halves of k and v in turn; vec: those.
KERNEL(512, 1)
node_in(const uint4* features, uint4* X, uint4* q, uint4* kv, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, 0, 0, vec, 5 * LINEAR, tiles,
      [&](Ring& ring) { feed(ring, w, 2 + 16 + 24, [](int i) { return i < 2 ? IN_KS * 4096 : STAGE; }); },
      [&](Work& at, int tile, bool valid, u32) {
#pragma unroll
        for (int ks = 0; ks < IN_KS; ks++) at.spare[ks * 32] = load16(features + ((u64)tile * IN_KS + ks) * 32 + at.lane);
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          float acc[16][4];
          multiply<false, 128, IN_KS, IN_KS>(acc, at.spare, at.spare, at);
          finish(acc, at.vec + half * 256, at.lane);
#pragma unroll
          for (int np = 0; np < 8; np++) at.kept[(half * 8 + np) * 32] = pack_tile_relu(acc[2 * np], acc[2 * np + 1]);
        }
#pragma unroll 1
        for (int quarter = 0; quarter < 4; quarter++) {
          float acc[8][4];
          multiply<false, 64, 16, 4>(acc, at.kept, at.kept, at);
          finish(acc, at.vec + LINEAR + quarter * 128, at.lane);
#pragma unroll
          for (int i = 0; i < 32; i++) acc[i >> 2][i & 3] = relu(acc[i >> 2][i & 3]);
#pragma unroll
          for (int s = 0; s < 2; s++)
            at.bytes[(quarter * 2 + s) * 32] = byte_tile(acc[4 * s], acc[4 * s + 1], acc[4 * s + 2], acc[4 * s + 3]);
          if (valid)
#pragma unroll
            for (int np = 0; np < 4; np++)
              X[((u64)tile * 16 + quarter * 4 + np) * 32 + at.lane] = half_tile(acc[2 * np], acc[2 * np + 1]);
        }
        queries(at, at.vec + 2 * LINEAR, q, kv, tile, valid);
      });
}

// gathered: e4m3 [tiles][8][32], what edge attention wrote; X is replaced. w: halves of x_out, lin1, lin2, q, then of k
// and v in turn; vec: the six, then two norms.
KERNEL(512, 1)
node_mid(const uint4* gathered, uint4* X, uint4* q, uint4* kv, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, X, gathered, vec, 6 * LINEAR + 1024, tiles, [&](Ring& ring) { feed(ring, w, 48, [](int) { return STAGE; }); },
      [&](Work& at, int tile, bool valid, u32 parity) {
        update(at, at.vec + 6 * LINEAR, parity, [&](int np, const uint4& t) { at.kept[np * 32] = t; });
        if (valid)  // not at once: there are 160 registers
#pragma unroll 8
          for (int np = 0; np < 16; np++) X[((u64)tile * 16 + np) * 32 + at.lane] = at.kept[np * 32];
        queries(at, at.vec + 3 * LINEAR, q, kv, tile, valid);
      });
}

// logits: float [tiles][16 rows][16]. w: halves of x_out, lin1, lin2; then in turn a quarter of the first output Linear
// (bf16, 64 rows) and the 4 slabs of 16 rows of the second that read it; vec: the three, the first output Linear, bias 16
// (32 floats), then two norms.
KERNEL(512, 1)
node_out(const uint4* gathered, const uint4* X, float* logits, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, X, gathered, vec, 4 * LINEAR + 32 + 1024, tiles,
      [&](Ring& ring) { feed(ring, w, 24 + 20, [](int i) { return i >= 24 && (i - 24) % 5 == 4 ? 2048 : STAGE; }); },
      [&](Work& at, int tile, bool valid, u32 parity) {
        // the output MLP reads the rows in 16 bit; what is f16 in a word becomes bf16
        update(at, at.vec + 4 * LINEAR + 32, parity, [&](int np, const uint4& t) {
          at.kept[np * 32] = make_uint4(pack2(half_low(t.x), half_high(t.x)), pack2(half_low(t.y), half_high(t.y)),
                                        pack2(half_low(t.z), half_high(t.z)), pack2(half_low(t.w), half_high(t.w)));
        });
        float o[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) o[i >> 2][i & 3] = 0;
#pragma unroll 1
        for (int quarter = 0; quarter < 4; quarter++) {
          float acc[8][4];
          multiply<false, 64, 16, 4>(acc, at.kept, at.kept, at);
          finish(acc, at.vec + 3 * LINEAR + quarter * 128, at.lane);
#pragma unroll
          for (int np = 0; np < 4; np++) at.spare[np * 32] = pack_tile_relu(acc[2 * np], acc[2 * np + 1]);
          multiply<false, 16, 4, 4>(o, at.spare, at.spare, at, true);
        }
        if (valid)
#pragma unroll
          for (int nt = 0; nt < 2; nt++) {
            const int c = nt * 8 + (at.lane & 3) * 2;
            const float2 b = *(const float2*)(at.vec + 4 * LINEAR + c);
            float* to = logits + (u64)tile * 256 + (at.lane >> 2) * 16 + c;
            *(float2*)to = make_float2(o[nt][0] + b.x, o[nt][1] + b.y);
            *(float2*)(to + 128) = make_float2(o[nt][2] + b.x, o[nt][3] + b.y);
          }
      });
}
