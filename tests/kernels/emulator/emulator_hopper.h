// The warpgroup operations of hopper.cuh on the CPU: everything asynchronous happens at once, in program order.
//
// Descriptors are decoded as the PTX manual defines them (no swizzle), so a wrong stride reads wrong numbers here too.
// Not seen here: a missing fence or wait, registers changed while a product runs.
#pragma once
#include "emulator_fp8.h"

namespace emu {
struct Barrier {  // the 8 bytes of an mbarrier
  short arrivals, pending;
  int bytes_phase;  // bit 0: phase; the rest: bytes still to come
  void step(int arrive, int bytes) {
    pending -= arrive;
    int left = (bytes_phase >> 1) + bytes, phase = bytes_phase & 1;
    if (pending == 0 && left == 0) phase ^= 1, pending = arrivals;
    bytes_phase = left * 2 + phase;
  }
};
struct Named {
  int count = 0;
  u64 generation = 0;
};
extern Named named[16];

inline const u8* core(u64 descriptor, int row, int byte) {
  const u64 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 46) abort();
  return shared + start + (byte / 16) * leading + (row / 8) * stride + (row % 8) * 16 + byte % 16;
}
inline float bf16_at(const u8* p) {
  u16 h;
  memcpy(&h, p, 2);
  return as_float((u32)h << 16);
}
// One warp's 16 rows of a product. in: A registers or a descriptor, the descriptor of B, keep, the address of d.
enum Kind { BF16, S8, E4M3 };
template <int N, Kind KIND, bool SLAB>
inline void warp_product(Warp& w, int warp) {
  constexpr bool INT = KIND != BF16;  // bytes
  float A[16][16];
  int AI[16][32];
  for (int lane = 0; lane < 32; lane++)
    for (int reg = 0; reg < 4; reg++)
      for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + (reg % 2) * 8, byte = (lane % 4) * 4 + (reg / 2) * 16;
        if (INT) {
          const u64 d = w.in[0][0] | (u64)w.in[0][1] << 32;
          AI[row][byte + e] = SLAB ? (signed char)*core(d, warp % 4 * 16 + row, byte + e) : (signed char)(w.in[lane][reg] >> (8 * e));
        } else if (e % 2 == 0) {
          const u64 d = w.in[0][0] | (u64)w.in[0][1] << 32;
          A[row][byte / 2 + e / 2] = SLAB ? bf16_at(core(d, warp % 4 * 16 + row, byte + e)) : as_float(w.in[lane][reg] >> (8 * e) << 16);
        }
      }
  const u64 b = w.in[0][4] | (u64)w.in[0][5] << 32;
  for (int lane = 0; lane < 32; lane++) {
    if ((w.in[lane][4] | (u64)w.in[lane][5] << 32) != b) abort();
    u32* d = (u32*)(w.in[lane][7] | (u64)w.in[lane][8] << 32);
    for (int i = 0; i < N / 2; i++) {
      const int row = lane / 4 + (i % 4 / 2) * 8, col = i / 4 * 8 + (lane % 4) * 2 + i % 2;
      if (KIND == E4M3) {
        float sum = w.in[lane][6] ? as_float(d[i]) : 0.0f;
        for (int k = 0; k < 32; k++) sum += byte_value((u8)AI[row][k]) * byte_value(*core(b, col, k));
        d[i] = as_bits(sum);
      } else if (INT) {
        int sum = w.in[lane][6] ? (int)d[i] : 0;
        for (int k = 0; k < 32; k++) sum += AI[row][k] * (signed char)*core(b, col, k);
        d[i] = sum;
      } else {
        float sum = w.in[lane][6] ? as_float(d[i]) : 0.0f;
        for (int k = 0; k < 16; k++) sum += A[row][k] * bf16_at(core(b, col, k * 2));
        d[i] = as_bits(sum);
      }
    }
  }
}
template <int N, Kind KIND, bool SLAB>
inline void issue(u32* d, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int keep) {
  const u64 to = (u64)d;
  const u32 in[9] = {a0, a1, a2, a3, (u32)b, (u32)(b >> 32), (u32)keep, (u32)to, (u32)(to >> 32)};
  const int warp = current / 32;
  meet(in, 9, [warp](Warp& w) { warp_product<N, KIND, SLAB>(w, warp); });
}
}  // namespace emu

DEV u64 slab(const void* p, int rows) {
  return (u64)((u64)((const u8*)p - emu::shared) >> 4 & 0x3fff) | (u64)rows << 16 | (u64)8 << 32;
}
template <int NT>
DEV void product(float (&d)[NT][4], const uint4& a, u64 b, int keep) {
  emu::issue<NT * 8, emu::BF16, false>((u32*)d, a.x, a.y, a.z, a.w, b, keep);
}
template <int NT>
DEV void product(int (&d)[NT][4], const uint4& a, u64 b, int keep) {
  emu::issue<NT * 8, emu::S8, false>((u32*)d, a.x, a.y, a.z, a.w, b, keep);
}
template <int NT>
DEV void product(float (&d)[NT][4], u64 a, u64 b, int keep) {
  emu::issue<NT * 8, emu::BF16, true>((u32*)d, (u32)a, (u32)(a >> 32), 0, 0, b, keep);
}
template <int NT>
DEV void product(int (&d)[NT][4], u64 a, u64 b, int keep) {
  emu::issue<NT * 8, emu::S8, true>((u32*)d, (u32)a, (u32)(a >> 32), 0, 0, b, keep);
}
template <int NT>
DEV void product8(float (&d)[NT][4], const uint4& a, u64 b, int keep) {
  emu::issue<NT * 8, emu::E4M3, false>((u32*)d, a.x, a.y, a.z, a.w, b, keep);
}
template <int NT>
DEV void product8(float (&d)[NT][4], u64 a, u64 b, int keep) {
  emu::issue<NT * 8, emu::E4M3, true>((u32*)d, (u32)a, (u32)(a >> 32), 0, 0, b, keep);
}

DEV void barrier_init(u64* b, int arrivals) { *(emu::Barrier*)b = {(short)arrivals, (short)arrivals, 0}; }
DEV void barrier_init_done() {}
DEV void barrier_expect(u64* b, u32 bytes) { ((emu::Barrier*)b)->step(1, (int)bytes); }
DEV void barrier_arrive(u64* b) { ((emu::Barrier*)b)->step(1, 0); }
DEV void barrier_wait(u64* b, u32 parity) {
  while ((u32)(((volatile emu::Barrier*)b)->bytes_phase & 1) == parity) emu::yield();
}
DEV bool barrier_passed(u64* b, u32 parity) { return (u32)(((volatile emu::Barrier*)b)->bytes_phase & 1) != parity; }
DEV void copy_bulk(void* shared, const void* global, u32 bytes, u64* b) {
  if (bytes % 16 || (u64)global % 16 || (u64)shared % 16) abort();
  memcpy(shared, global, bytes);
  ((emu::Barrier*)b)->step(0, -(int)bytes);
}
DEV void prefetch_bulk(const void* global, u32 bytes) {
  if (bytes % 16 || (u64)global % 16) abort();
  const volatile u8 *first = (const u8*)global, *last = first + bytes - 1;
  (void)*first, (void)*last;  // not beyond what is allocated
}
DEV void prefetch(const void* global) { (void)*(const volatile u8*)global; }
DEV void named_wait(int id, int threads, bool wait) {
  emu::Named& n = emu::named[id];
  const u64 mine = n.generation;
  if (++n.count == threads) n.count = 0, n.generation++;
  else
    while (wait && n.generation == mine) emu::yield();
}
DEV void named_sync(int id, int threads) { named_wait(id, threads, true); }
DEV void named_arrive(int id, int threads) { named_wait(id, threads, false); }
DEV void fence_async() {}
DEV void products_begin() {}
DEV void products_commit() {}
template <int LEFT>
DEV void products_wait() {}
template <int REGISTERS>
DEV void registers_take() {}
template <int REGISTERS>
DEV void registers_give() {}
DEV void store_matrices(void* row, const uint4& v) {
  const u64 at = (u64)row;
  const u32 in[6] = {(u32)at, (u32)(at >> 32), v.x, v.y, v.z, v.w};
  emu::meet(in, 6, [](emu::Warp& w) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        const u32* to = w.in[m * 8 + lane / 4];
        memcpy((u8*)(to[0] | (u64)to[1] << 32) + lane % 4 * 4, &w.in[lane][2 + m], 4);
      }
  });
}
DEV uint4 load16_now(const void* p) { return load16(p); }
DEV void no_load_crosses() {}
