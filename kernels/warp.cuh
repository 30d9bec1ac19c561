// What a warp can do: bf16 words, matrix products, asynchronous copies. Everything a kernel needs of the machine.
//
// A matrix tile of 16 rows and 16 k channels ("fragment order") is 32 x 16 bytes, one uint4 a lane, exactly the A operand
// of mma.m16n8k16: with r = lane / 4 and l = lane % 4 it holds
//     x: (row r, channels 2l, 2l+1)      y: (row r + 8, 2l, 2l+1)      z: (r, 8 + 2l, +1)      w: (r + 8, 8 + 2l, +1)
// The result of a product with 16 output channels (two n-tiles) has the same layout, so results are stored, copied and
// fed to the next product 16 bytes a lane, without shuffles, padding or bank conflicts. Weights W[N, K] are packed as
// [K/16][N/16][32 lanes] uint4: x, y for output channels 0..7 of the 16, z, w for 8..15 (kernels/pack.py).
#pragma once

#ifdef BITDGDM_EMULATE
#include "emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEV __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define KERNEL(threads, ctas) extern "C" __global__ void __launch_bounds__(threads, ctas)
#define SHARED(name) extern __shared__ __align__(128) u8 name[]
#define THREAD ((int)threadIdx.x)
#define BLOCK ((int)blockIdx.x)
#define BLOCKS ((int)gridDim.x)
#define THREADS ((int)blockDim.x)

DEV u32 pack2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEV u32 pack2_relu(float low, float high) {
  u32 d;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEV float as_float(u32 bits) { return __uint_as_float(bits); }
DEV u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEV u32 mul2(u32 a, u32 b) {
  u32 d;  // as a sum with -0: mul.bf16x2 is of sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
DEV u32 min2(u32 a, u32 b) {
  u32 d;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 max2(u32 a, u32 b) {
  u32 d;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float reciprocal(float a) { return __frcp_rn(a); }
DEV u32 bits_of(float a) { return __float_as_uint(a); }
DEV u32 pick_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEV float add_rn(float a, float b) { return __fadd_rn(a, b); }
DEV float div_fast(float a, float b) { return __fdividef(a, b); }
DEV u32 mul_hi(u32 a, u32 b) { return __umulhi(a, b); }
DEV int bit_count(u32 a) { return __popc(a); }
DEV int lowest_bit(u64 a) { return __ffsll(a) - 1; }

// d = a b + c
DEV void mma(float (&d)[4], const uint4& a, u32 b0, u32 b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEV void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}
DEV void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }  // for all that this thread has asked for

DEV uint4 load16(const void* p) { return __ldg((const uint4*)p); }
DEV float lane_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV float lane_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEV double lane_from(double v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEV u32 warp_ballot(bool b) { return __ballot_sync(0xffffffffu, b); }
DEV bool warp_any(bool b) { return __any_sync(0xffffffffu, b); }
DEV void block_sync() { __syncthreads(); }
DEV void warp_sync() { __syncwarp(); }
// The warp's number in its block, of which the compiler knows that all lanes have the same: what is counted by it, or by
// warps as a whole, lives in uniform registers.
DEV int warp_number() { return __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5), 0); }
#endif

DEV float low(u32 pair) { return as_float(pair << 16); }
DEV float high(u32 pair) { return as_float(pair & 0xffff0000u); }
DEV float from_bf16(u16 h) { return as_float((u32)h << 16); }
DEV u16 to_bf16(float x) { return (u16)pack2(x, 0.0f); }
DEV float relu(float x) { return x > 0.0f ? x : 0.0f; }

// Sum over the four lanes that share a row, always in the same order.
DEV float quad_sum(float v) {
  v += lane_xor(v, 1);
  return v + lane_xor(v, 2);
}

// Largest of the four lanes that share a row.
DEV float quad_max(float v) {
  v = fmaxf(v, lane_xor(v, 1));
  return fmaxf(v, lane_xor(v, 2));
}

// Scale of a row of s8 codes with largest |x| `top`, and four codes; one rounding an operation, as quant/linear.py has it.
DEV float row_scale(float top) { return fmaxf(mul_rn(top, 1.0f / 127), 1.17549435e-38f); }
DEV u32 code4(float a, float b, float c, float d, float inverse) {
  const float even = 12582912.0f;  // 1.5 * 2^23: the sum's low byte is the code, rounded half to even
  const u32 ab = pick_bytes(bits_of(add_rn(mul_rn(a, inverse), even)), bits_of(add_rn(mul_rn(b, inverse), even)), 0x0040);
  const u32 cd = pick_bytes(bits_of(add_rn(mul_rn(c, inverse), even)), bits_of(add_rn(mul_rn(d, inverse), even)), 0x0040);
  return pick_bytes(ab, cd, 0x5410);
}

// Offset in 16-bit units of (row, channel) inside a 16-row tile of any number of channels, in fragment order.
DEV int tile_offset(int row, int channel) {
  return ((channel >> 4) * 32 + (row & 7) * 4 + ((channel & 7) >> 1)) * 8 + ((channel >> 3) & 1) * 4 +
         ((row >> 3) & 1) * 2 + (channel & 1);
}

// Offset in 16-bit units of weight (out channel n, in channel k) in a packed matrix of `pairs` = N / 16.
DEV int weight_offset(int n, int k, int pairs) {
  return ((((k >> 4) * pairs + (n >> 4)) * 32 + (n & 7) * 4 + ((k & 7) >> 1)) * 4 + ((n >> 3) & 1) * 2 +
          ((k >> 3) & 1)) * 2 + (k & 1);
}

// The result of 16 output channels of a 16-row tile as bf16, in fragment order.
DEV uint4 pack_tile(const float (&first)[4], const float (&second)[4]) {
  uint4 d;
  d.x = pack2(first[0], first[1]);
  d.y = pack2(first[2], first[3]);
  d.z = pack2(second[0], second[1]);
  d.w = pack2(second[2], second[3]);
  return d;
}

DEV uint4 pack_tile_relu(const float (&first)[4], const float (&second)[4]) {
  uint4 d;
  d.x = pack2_relu(first[0], first[1]);
  d.y = pack2_relu(first[2], first[3]);
  d.z = pack2_relu(second[0], second[1]);
  d.w = pack2_relu(second[2], second[3]);
  return d;
}

DEV void add_tile(float (&first)[4], float (&second)[4], const uint4& x) {
  first[0] += low(x.x), first[1] += high(x.x), first[2] += low(x.y), first[3] += high(x.y);
  second[0] += low(x.z), second[1] += high(x.z), second[2] += low(x.w), second[3] += high(x.w);
}

// LayerNorm over the 8 * NT channels of both rows that a lane shares with its quad. vec: gamma then beta.
template <int NT>
DEV void layer_norm(float (&h)[NT][4], const float* gamma, const float* beta, int lane) {
  const float scale = 1.0f / (8 * NT);
  float sum0 = 0, sum1 = 0;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) sum0 += h[nt][0] + h[nt][1], sum1 += h[nt][2] + h[nt][3];
  const float mean0 = quad_sum(sum0) * scale, mean1 = quad_sum(sum1) * scale;
  float sq0 = 0, sq1 = 0;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    h[nt][0] -= mean0, h[nt][1] -= mean0, h[nt][2] -= mean1, h[nt][3] -= mean1;
    sq0 += h[nt][0] * h[nt][0] + h[nt][1] * h[nt][1];
    sq1 += h[nt][2] * h[nt][2] + h[nt][3] * h[nt][3];
  }
  const float inv0 = rsqrtf(quad_sum(sq0) * scale + 1e-5f), inv1 = rsqrtf(quad_sum(sq1) * scale + 1e-5f);
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const float2 g = *(const float2*)(gamma + nt * 8 + (lane & 3) * 2), b = *(const float2*)(beta + nt * 8 + (lane & 3) * 2);
    h[nt][0] = h[nt][0] * inv0 * g.x + b.x, h[nt][1] = h[nt][1] * inv0 * g.y + b.y;
    h[nt][2] = h[nt][2] * inv1 * g.x + b.x, h[nt][3] = h[nt][3] * inv1 * g.y + b.y;
  }
}
