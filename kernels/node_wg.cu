// Everything a layer does to rows of X (see node.cu), for Hopper: a warpgroup holds 64 rows, weights flow through a ring.
//
//   node_in:  input MLP,                                       then q, k, v of layer 0
//   node_mid: x_out + X, LayerNorm, linX1, linX2, LayerNorm,   then q, k, v of the next layer
//   node_out: the same of the last layer,                      then the output MLP: logits
//
// A block is a warpgroup that copies and two that compute, 64 rows x 256 channels each: 128 float sums a thread. A warp has
// all 256 channels of its 16 rows, so LayerNorm is a sum over four lanes, and the result of a product is, packed, the A
// operand of the next: activations never leave registers. The residual waits in shared memory, 64 KB, each lane its own.
// Weights: stages of 32 KB (four slabs of 256 rows), 4 stages; both warpgroups read a stage once.
// Operations a row: 6 x 65,536 MAC = 192 tensor clocks of an SM; bytes a row: 1 KB in, 2 KB out, 6 KB of weights from L2
// (3 KB where two blocks of a cluster share them, PAIR).
// INT8: the six products take s8 rows, quantized in registers by the largest |x| of a row, as QuantLinear does.
#include "hopper.cuh"

#ifndef INT8
#define INT8 0
#endif
#ifndef PAIR  // two blocks of a cluster receive the same weights
#define PAIR 0
#endif
#ifndef IN_KS
#define IN_KS 1
#endif
#if INT8
typedef int Sum;
#else
typedef float Sum;
#endif

#define STAGES 4
#define STAGE 32768
#define SLAB 8192      // 256 rows
#define WG_TILES 4     // query tiles of a warpgroup
#define BLOCK_TILES 8
#define VEC_MAX 4096

typedef float Rows[32][4];

template <class S> struct Slabs;  // of 256 channels
template <> struct Slabs<float> { static constexpr int count = 16; };
template <> struct Slabs<int> { static constexpr int count = 8; };

template <class S> struct Input {  // A operand of a product: 16 rows a warp
  uint4 a[Slabs<S>::count];
  float scale0, scale1;  // of rows r, r + 8; s8 only
};

struct Ring {
  u8* data;
  u64 *full, *empty;
  int slot;
  u32 phase;
  MEMBER void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

DEV void release(const Ring& ring, int slot, int lane) {
  if (lane == 0) {
#if PAIR
    barrier_arrive_at(ring.empty + slot, 0), barrier_arrive_at(ring.empty + slot, 1);
#else
    barrier_arrive(ring.empty + slot);
#endif
  }
}

// Copies the stages of a pass, one after the other, into the ring: `first` bytes if not 0, full stages, `last` bytes.
DEV void feed(Ring& ring, const u8* from, int first, int count, int last) {
  const int total = (first > 0) + count + (last > 0);
#pragma unroll 1
  for (int i = 0; i < total; i++) {
    const int bytes = first > 0 && i == 0 ? first : last > 0 && i == total - 1 ? last : STAGE;
    barrier_wait(ring.empty + ring.slot, ring.phase ^ 1);
    barrier_expect(ring.full + ring.slot, bytes);
#if PAIR
    const u32 half = bytes / 2, at = cluster_rank() * half;
    copy_bulk_pair(ring.data + ring.slot * STAGE + at, from + at, half, ring.full + ring.slot);
#else
    copy_bulk(ring.data + ring.slot * STAGE, from, bytes, ring.full + ring.slot);
#endif
    from += bytes;
    ring.next();
  }
}

// acc = A W^T over SLABS slabs of N rows, PER slabs a stage. Only the stages are waited for until the end.
template <int SLABS, int PER, int N, class S, int A>
DEV void multiply(S (&acc)[N / 8][4], const uint4 (&a)[A], Ring& ring, int lane) {
  int before = 0;
#pragma unroll
  for (int s = 0; s < SLABS; s += PER) {
    barrier_wait(ring.full + ring.slot, ring.phase);
    products_begin();
#pragma unroll
    for (int i = 0; i < PER; i++) product(acc, a[s + i], slab(ring.data + ring.slot * STAGE + i * N * 32, N), s + i);
    products_commit();
    if (s > 0) {
      products_wait<1>();
      release(ring, before, lane);
    }
    before = ring.slot;
    ring.next();
  }
  products_wait<0>();
  release(ring, before, lane);
}

DEV void product256(float (&acc)[32][4], const Input<float>& in, Ring& ring, int lane) {
  multiply<16, 4, 256>(acc, in.a, ring, lane);
}
DEV void product256(int (&acc)[32][4], const Input<int>& in, Ring& ring, int lane) {
  multiply<8, 4, 256>(acc, in.a, ring, lane);
}

// The sums as numbers: + bias; for s8 also times the scales of row and channel. vec: bias, then 256 scales (s8).
DEV void finish(Rows& h, const Rows& acc, const Input<float>&, const float* vec, int lane) {
#pragma unroll
  for (int nt = 0; nt < 32; nt++) {
    if (nt % 8 == 0) no_load_crosses();
    const float2 b = *(const float2*)(vec + nt * 8 + (lane & 3) * 2);
    h[nt][0] = acc[nt][0] + b.x, h[nt][1] = acc[nt][1] + b.y, h[nt][2] = acc[nt][2] + b.x, h[nt][3] = acc[nt][3] + b.y;
  }
}
DEV void finish(Rows& h, const int (&acc)[32][4], const Input<int>& in, const float* vec, int lane) {
#pragma unroll
  for (int nt = 0; nt < 32; nt++) {
    const float2 b = *(const float2*)(vec + nt * 8 + (lane & 3) * 2);
    const float2 w = *(const float2*)(vec + 256 + nt * 8 + (lane & 3) * 2);
    h[nt][0] = fmaf(mul_rn((float)acc[nt][0], in.scale0), w.x, b.x);
    h[nt][1] = fmaf(mul_rn((float)acc[nt][1], in.scale0), w.y, b.y);
    h[nt][2] = fmaf(mul_rn((float)acc[nt][2], in.scale1), w.x, b.x);
    h[nt][3] = fmaf(mul_rn((float)acc[nt][3], in.scale1), w.y, b.y);
  }
}

DEV void relu_all(Rows& h) {
#pragma unroll
  for (int i = 0; i < 128; i++) h[i >> 2][i & 3] = relu(h[i >> 2][i & 3]);
}

DEV void add_rows(Rows& h, const uint4* x) {  // x: [16][32 lanes], at the lane's own
#pragma unroll
  for (int np = 0; np < 16; np++) add_tile(h[2 * np], h[2 * np + 1], x[np * 32]);
}

DEV void to_input(Input<float>& in, const Rows& h) {
#pragma unroll
  for (int np = 0; np < 16; np++) in.a[np] = pack_tile(h[2 * np], h[2 * np + 1]);
}
// k of a slab of 32 channels in the order 4 l + e -> channel 8 (e / 2) + 2 l + e % 2, then the same + 16 (kernels/pack.py).
DEV void to_input(Input<int>& in, const Rows& h) {
  float top0 = 0, top1 = 0;
#pragma unroll
  for (int nt = 0; nt < 32; nt++) {
    top0 = fmaxf(top0, fmaxf(fabsf(h[nt][0]), fabsf(h[nt][1])));
    top1 = fmaxf(top1, fmaxf(fabsf(h[nt][2]), fabsf(h[nt][3])));
  }
  in.scale0 = row_scale(quad_max(top0)), in.scale1 = row_scale(quad_max(top1));
  const float inv0 = reciprocal(in.scale0), inv1 = reciprocal(in.scale1);
#pragma unroll
  for (int s = 0; s < 8; s++) {
    const float (&t)[4][4] = *(const float (*)[4][4])&h[s * 4];
    in.a[s].x = code4(t[0][0], t[0][1], t[1][0], t[1][1], inv0);
    in.a[s].y = code4(t[0][2], t[0][3], t[1][2], t[1][3], inv1);
    in.a[s].z = code4(t[2][0], t[2][1], t[3][0], t[3][1], inv0);
    in.a[s].w = code4(t[2][2], t[2][3], t[3][2], t[3][3], inv1);
  }
}

DEV void relu_to_input(Input<float>& in, Rows& h) {
#pragma unroll
  for (int np = 0; np < 16; np++) in.a[np] = pack_tile_relu(h[2 * np], h[2 * np + 1]);
}
DEV void relu_to_input(Input<int>& in, Rows& h) {
  relu_all(h);
  to_input(in, h);
}

DEV void load_rows(Input<float>& in, const uint4* from) {
#pragma unroll
  for (int np = 0; np < 16; np++) in.a[np] = load16(from + np * 32);
}
DEV void load_rows(Input<int>& in, const uint4* from) {
  Rows h;
#pragma unroll
  for (int i = 0; i < 128; i++) h[i >> 2][i & 3] = 0;
#pragma unroll
  for (int np = 0; np < 16; np++) add_tile(h[2 * np], h[2 * np + 1], load16(from + np * 32));
  to_input(in, h);
}

DEV void store_rows(uint4* to, const Rows& h) {
#pragma unroll
  for (int np = 0; np < 16; np++) to[np * 32] = pack_tile(h[2 * np], h[2 * np + 1]);
}

DEV void keep_rows(uint4* to, const Input<float>& in, const Rows&) {
#pragma unroll
  for (int np = 0; np < 16; np++) to[np * 32] = in.a[np];
}
DEV void keep_rows(uint4* to, const Input<int>&, const Rows& h) { store_rows(to, h); }

struct Work {
  Ring ring;
  uint4* kept;       // [16][32 lanes] of the warp, at the lane's own
  const float* vec;
  int wg, warp, lane;
};

constexpr int STEP_VEC = INT8 ? 512 : 256;  // floats of a product in vec

// in: rows of the next layer's X. Queries, keys and values of its attention; kv by row: see edge_attend.
DEV void queries(const Input<Sum>& in, Work& w, const float* vec, uint4* q, uint4* kv, int tile, bool valid) {
  Sum acc[32][4];
  Rows h;
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, vec, w.lane);
  if (valid) store_rows(q + (u64)tile * 512 + w.lane, h);
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, vec + STEP_VEC, w.lane);
  store_rows(w.kept, h);
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, vec + 2 * STEP_VEC, w.lane);
  uint4* to = kv + (u64)(tile * 16 + (w.lane >> 2)) * 64 + (w.lane & 3);
  if (valid)
#pragma unroll
    for (int np = 0; np < 16; np++) {
      const uint4 k = w.kept[np * 32], v = pack_tile(h[2 * np], h[2 * np + 1]);
      to[np * 4] = make_uint4(k.x, k.z, v.x, v.z);
      to[np * 4 + 8 * 64] = make_uint4(k.y, k.w, v.y, v.w);
    }
}

// After attention: x_out + X, LayerNorm, FFN, LayerNorm. vec: three products, then two norms (gamma, beta) at `norms`.
DEV void update(Rows& h, Work& w, const uint4* gathered, const uint4* X, int tile, const float* norms) {
  Sum acc[32][4];
  Input<Sum> in;
  load_rows(in, gathered + (u64)tile * 512 + w.lane);
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, w.vec, w.lane);
  add_rows(h, X + (u64)tile * 512 + w.lane);
  layer_norm<32>(h, norms, norms + 256, w.lane);
  to_input(in, h);
  keep_rows(w.kept, in, h);
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, w.vec + STEP_VEC, w.lane);
  relu_to_input(in, h);
  product256(acc, in, w.ring, w.lane);
  finish(h, acc, in, w.vec + 2 * STEP_VEC, w.lane);
  add_rows(h, w.kept);
  layer_norm<32>(h, norms + 512, norms + 768, w.lane);
}

// Splits the block: `copy` for one thread, `compute` for two warpgroups; both see the same passes.
template <class Copy, class Compute>
DEV void run(u8* shared, const float* vec, int floats, int tiles, Copy copy, Compute compute) {
  u64* barriers = (u64*)shared;
  float* v = (float*)(shared + 128);
  uint4* kept = (uint4*)(shared + 128 + VEC_MAX * 4);
  Work w;
  w.ring.data = (u8*)(kept + BLOCK_TILES * 512), w.ring.full = barriers, w.ring.empty = barriers + STAGES;
  w.ring.slot = 0, w.ring.phase = 0;
  w.wg = THREAD >> 7, w.warp = THREAD >> 5 & 3, w.lane = THREAD & 31;
  w.vec = v;
  for (int i = THREAD; i < floats; i += 384) v[i] = vec[i];
  if (THREAD == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(barriers + i, 1), barrier_init(barriers + STAGES + i, 8 * (PAIR + 1));
    barrier_init_done();
  }
#if PAIR
  cluster_sync();
#else
  block_sync();
#endif
  const int passes = (tiles + BLOCK_TILES - 1) / BLOCK_TILES, step = BLOCKS;
  const int end = PAIR ? (passes + 1) & ~1 : passes;  // both blocks of a cluster make the same number of passes
  if (w.wg == 0) {
    registers_give<24>();
    if (THREAD == 0)
      for (int pass = BLOCK; pass < end; pass += step) copy(w.ring);
  } else {
    registers_take<240>();
    w.kept = kept + ((w.wg - 1) * WG_TILES + w.warp) * 512 + w.lane;
    for (int pass = BLOCK; pass < end; pass += step) {
      const int tile = pass * BLOCK_TILES + (w.wg - 1) * WG_TILES + w.warp;
      compute(w, min(tile, tiles - 1), tile < tiles);
    }
  }
#if PAIR
  cluster_sync();  // no block leaves while the other copies into it
#endif
}

#if PAIR
#define NODE_KERNEL extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
#else
#define NODE_KERNEL KERNEL(384, 1)
#endif
constexpr int PRODUCT_STAGES = Slabs<Sum>::count / 4;

// features: [tiles][IN_KS][32]; X, q: [tiles][16][32]; kv: [rows][64]. w: slabs of the first input Linear (IN_KS), the
// second (16), q, k, v; vec: the two biases, then those of q, k, v (s8: each with 256 scales).
NODE_KERNEL node_in(const uint4* features, uint4* X, uint4* q, uint4* kv, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, vec, 512 + 3 * STEP_VEC, tiles,
      [&](Ring& ring) { feed(ring, w, IN_KS * SLAB, 4 + 3 * PRODUCT_STAGES, 0); },
      [&](Work& at, int tile, bool valid) {
        float acc[32][4];
        Rows h;
        Input<float> in;
        uint4 f[IN_KS];
#pragma unroll
        for (int ks = 0; ks < IN_KS; ks++) f[ks] = load16(features + ((u64)tile * IN_KS + ks) * 32 + at.lane);
        multiply<IN_KS, IN_KS, 256>(acc, f, at.ring, at.lane);
        finish(h, acc, in, at.vec, at.lane);
        relu_to_input(in, h);
        product256(acc, in, at.ring, at.lane);
        finish(h, acc, in, at.vec + 256, at.lane);
        relu_all(h);
        Input<Sum> x;
        to_input(x, h);
        if (valid) keep_rows(X + (u64)tile * 512 + at.lane, x, h);
        queries(x, at, at.vec + 512, q, kv, tile, valid);
      });
}

// gathered: [tiles][16][32], what edge attention wrote; X is replaced. w: slabs of x_out, lin1, lin2, q, k, v; vec: their
// biases (s8: each with 256 scales), then two norms.
NODE_KERNEL node_mid(const uint4* gathered, uint4* X, uint4* q, uint4* kv, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, vec, 6 * STEP_VEC + 1024, tiles, [&](Ring& ring) { feed(ring, w, 0, 6 * PRODUCT_STAGES, 0); },
      [&](Work& at, int tile, bool valid) {
        Rows h;
        update(h, at, gathered, X, tile, at.vec + 6 * STEP_VEC);
        Input<Sum> x;
        to_input(x, h);
        if (valid) keep_rows(X + (u64)tile * 512 + at.lane, x, h);
        queries(x, at, at.vec + 3 * STEP_VEC, q, kv, tile, valid);
      });
}

// logits: float [tiles][16 rows][16]. w: slabs of x_out, lin1, lin2, the first output Linear (bf16), then 16 slabs of 16
// rows of the second; vec: three products, bias 256, bias 16, then two norms.
NODE_KERNEL node_out(const uint4* gathered, const uint4* X, float* logits, const u8* w, const float* vec, int tiles) {
  SHARED(shared);
  run(shared, vec, 3 * STEP_VEC + 272 + 1024, tiles, [&](Ring& ring) { feed(ring, w, 0, 3 * PRODUCT_STAGES + 4, 8192); },
      [&](Work& at, int tile, bool valid) {
        Rows h;
        update(h, at, gathered, X, tile, at.vec + 3 * STEP_VEC + 272);
        Input<float> in;
        float acc[32][4], o[2][4];
        to_input(in, h);
        product256(acc, in, at.ring, at.lane);
        finish(h, acc, in, at.vec + 3 * STEP_VEC, at.lane);
        relu_to_input(in, h);
        multiply<16, 16, 16>(o, in.a, at.ring, at.lane);
        if (valid)
#pragma unroll
          for (int nt = 0; nt < 2; nt++) {
            const int c = nt * 8 + (at.lane & 3) * 2;
            const float2 b = *(const float2*)(at.vec + 3 * STEP_VEC + 256 + c);
            float* to = logits + (u64)tile * 256 + (at.lane >> 2) * 16 + c;
            *(float2*)to = make_float2(o[nt][0] + b.x, o[nt][1] + b.y);
            *(float2*)(to + 128) = make_float2(o[nt][2] + b.x, o[nt][3] + b.y);
          }
      });
}
