// Runs a CUDA kernel on the CPU: every thread is a fiber, warp and block operations are rendezvous.
//
// Checks indexing, layouts, barriers and arithmetic of a kernel without a GPU. It knows nothing of timing, memory
// ordering between barriers, or what ptxas does. mma, cp.async and bf16 follow the PTX manual, written from it afresh.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint4 { u32 x, y, z, w; };
struct int4 { int x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) double2 { double x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

#define DEV static inline
#define MEMBER inline
#define KERNEL(threads, ctas) extern "C" void
#define SHARED(name) u8* name = emu::shared
#define THREAD (emu::current)
#define BLOCK (emu::block)
#define BLOCKS (emu::blocks)
#define THREADS (emu::threads)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

namespace emu {
extern u8* shared;
extern int current, block, blocks, threads;
void yield();

struct Warp {
  int count = 0;
  u64 generation = 0;
  u32 in[32][16];
  u32 out[32][4];
};
extern std::vector<Warp> warps;
extern std::vector<std::vector<std::pair<void*, const void*>>> under_way;  // asynchronous copies of each thread
extern int block_count;
extern u64 block_generation;

// Deposit `words` of this lane; the last lane to come runs `op` for all 32; every lane gets out[lane].
template <class Op>
inline u32* meet(const u32* words, int n, Op op) {
  Warp& w = warps[current / 32];
  const int lane = current % 32;
  memcpy(w.in[lane], words, n * 4);
  const u64 mine = w.generation;
  if (++w.count == 32) {
    w.count = 0;
    op(w);
    w.generation++;
  } else {
    while (w.generation == mine) yield();
  }
  return w.out[lane];
}
}  // namespace emu

DEV float as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
DEV u32 as_bits(float f) { u32 b; memcpy(&b, &f, 4); return b; }
DEV u32 bf16_bits(float x) {
  u32 b = as_bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
DEV u32 pack2(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DEV u32 pack2_relu(float low, float high) { return pack2(low > 0 ? low : 0, high > 0 ? high : 0); }
DEV u32 fma2(u32 a, u32 b, u32 c) {
  const float l = fmaf(as_float(a << 16), as_float(b << 16), as_float(c << 16));
  const float h = fmaf(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), as_float(c & 0xffff0000u));
  return pack2(l, h);
}
DEV u32 mul2(u32 a, u32 b) {
  return pack2(as_float(a << 16) * as_float(b << 16), as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u));
}
DEV u32 min2(u32 a, u32 b) {
  return pack2(fminf(as_float(a << 16), as_float(b << 16)), fminf(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
}
DEV u32 max2(u32 a, u32 b) {
  return pack2(fmaxf(as_float(a << 16), as_float(b << 16)), fmaxf(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
}
DEV float sqrt_fast(float x) { return sqrtf(x); }
DEV float reciprocal_fast(float x) { return 1.0f / x; }
DEV float exp2_fast(float x) { return exp2f(x); }
DEV float reciprocal(float a) { return 1.0f / a; }
DEV u32 bits_of(float a) { return as_bits(a); }
DEV u32 pick_bytes(u32 a, u32 b, u32 which) {
  const u64 both = a | (u64)b << 32;
  u32 d = 0;
  for (int i = 0; i < 4; i++) d |= (u32)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return d;
}
DEV float mul_rn(float a, float b) { volatile float p = a * b; return p; }
DEV float add_rn(float a, float b) { volatile float s = a + b; return s; }
DEV float div_fast(float a, float b) { return a / b; }
DEV u32 mul_hi(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }
DEV int bit_count(u32 a) { return __builtin_popcount(a); }
DEV int lowest_bit(u64 a) { return __builtin_ctzll(a); }
DEV float rsqrtf(float x) { return 1.0f / sqrtf(x); }
DEV double rsqrt(double x) { return 1.0 / sqrt(x); }

DEV void mma(float (&d)[4], const uint4& a, u32 b0, u32 b1, const float (&c)[4]) {
  u32 in[10] = {a.x, a.y, a.z, a.w, b0, b1, as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])};
  u32* out = emu::meet(in, 10, [](emu::Warp& w) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, inside = lane % 4;
      for (int reg = 0; reg < 4; reg++)
        for (int e = 0; e < 2; e++)
          A[group + (reg % 2) * 8][inside * 2 + e + (reg / 2) * 8] = as_float((w.in[lane][reg] >> (16 * e)) << 16);
      for (int reg = 0; reg < 2; reg++)
        for (int e = 0; e < 2; e++) B[inside * 2 + e + reg * 8][group] = as_float((w.in[lane][4 + reg] >> (16 * e)) << 16);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i / 2) * 8, col = (lane % 4) * 2 + i % 2;
        float sum = as_float(w.in[lane][6 + i]);
        for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][col];
        w.out[lane][i] = as_bits(sum);
      }
  });
  for (int i = 0; i < 4; i++) d[i] = as_float(out[i]);
}

// A copy lands when its thread waits for it, not before.
DEV void copy16_async(void* shared, const void* global) {
  if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) abort();
  emu::under_way[emu::current].push_back({shared, global});
}
DEV void copy_wait() {
  for (const auto& copy : emu::under_way[emu::current]) memcpy(copy.first, copy.second, 16);
  emu::under_way[emu::current].clear();
}
DEV uint4 load16(const void* p) {
  if ((uintptr_t)p % 16) abort();
  return *(const uint4*)p;
}
DEV float lane_xor(float v, int mask) {
  u32 in[2] = {as_bits(v), (u32)mask};
  return as_float(*emu::meet(in, 2, [](emu::Warp& w) {
    for (int lane = 0; lane < 32; lane++) w.out[lane][0] = w.in[lane ^ w.in[lane][1]][0];
  }));
}
DEV float lane_from(float v, int lane) {
  u32 in[2] = {as_bits(v), (u32)lane};
  return as_float(emu::meet(in, 2, [](emu::Warp& w) {
    for (int lane = 0; lane < 32; lane++) w.out[lane][0] = w.in[w.in[lane][1] & 31][0];
  })[0]);
}
DEV double lane_from(double v, int lane) {
  u32 in[3];
  memcpy(in, &v, 8), in[2] = lane;
  memcpy(&v, emu::meet(in, 3, [](emu::Warp& w) {
    for (int lane = 0; lane < 32; lane++) memcpy(w.out[lane], w.in[w.in[lane][2] & 31], 8);
  }), 8);
  return v;
}
DEV u32 warp_ballot(bool b) {
  u32 in[1] = {b};
  return *emu::meet(in, 1, [](emu::Warp& w) {
    u32 all = 0;
    for (int lane = 0; lane < 32; lane++) all |= w.in[lane][0] << lane;
    for (int lane = 0; lane < 32; lane++) w.out[lane][0] = all;
  });
}
DEV bool warp_any(bool b) { return warp_ballot(b) != 0; }
DEV void warp_sync() { warp_any(false); }
DEV int warp_number() { return THREAD >> 5; }
DEV void block_sync() {
  const u64 mine = emu::block_generation;
  if (++emu::block_count == emu::threads) {
    emu::block_count = 0;
    emu::block_generation++;
  } else {
    while (emu::block_generation == mine) emu::yield();
  }
}
