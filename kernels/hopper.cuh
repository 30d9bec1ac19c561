// What a warpgroup of Hopper can do: asynchronous matrix products, bulk copies, barriers in shared memory (sm_90a only).
//
// Operands in shared memory lie as "core matrices": 8 rows x 16 bytes of k, 128 contiguous bytes. A slab is what one
// instruction reads, 32 bytes of k of all rows: the first 16 bytes of k of all rows, then the second 16, so that core
// matrices adjacent in rows are 128 bytes apart (stride) and those adjacent in k rows * 16 bytes (leading). Accumulators
// and A operands in registers are those of mma.m16n8k16 (warp.cuh): warp w of the group holds rows 16 w .. 16 w + 15.
#pragma once
#include "warp.cuh"

#ifdef BITDGDM_EMULATE
#include "emulator_hopper.h"
#else

// Descriptor of a slab of `rows` rows, without swizzle.
DEV u64 slab(const void* shared, int rows) {
  const u32 at = (u32)__cvta_generic_to_shared(shared);
  return (u64)(at >> 4 & 0x3fff) | (u64)rows << 16 | (u64)(128 >> 4) << 32;
}

DEV void barrier_init(u64* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"((u32)__cvta_generic_to_shared(b)), "r"(arrivals) : "memory");
}
DEV void barrier_init_done() {  // seen by the other blocks of a cluster and by bulk copies
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
DEV void barrier_expect(u64* b, u32 bytes) {  // arrive, and wait for so many copied bytes
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"((u32)__cvta_generic_to_shared(b)), "r"(bytes) : "memory");
}
DEV void barrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"((u32)__cvta_generic_to_shared(b)) : "memory");
}
DEV void barrier_wait(u64* b, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
      :: "r"((u32)__cvta_generic_to_shared(b)), "r"(parity) : "memory");
}
DEV bool barrier_passed(u64* b, u32 parity) {
  u32 d;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(d) : "r"((u32)__cvta_generic_to_shared(b)), "r"(parity) : "memory");
  return d != 0;
}
// bytes: a multiple of 16; both addresses too.
DEV void copy_bulk(void* shared, const void* global, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes), "r"((u32)__cvta_generic_to_shared(b))
               : "memory");
}
// Brings memory that will soon be loaded into L2. bytes: a multiple of 16; the address too.
DEV void prefetch_bulk(const void* global, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(bytes) : "memory");
}
DEV void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" :: "l"(global) : "memory"); }
// To the same place of both blocks of a cluster, completing on the same barrier of each.
DEV void copy_bulk_pair(void* shared, const void* global, u32 bytes, u64* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
      :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes), "r"((u32)__cvta_generic_to_shared(b)),
         "h"((u16)3) : "memory");
}
DEV void barrier_arrive_at(u64* b, u32 rank) {  // the same barrier in block `rank` of the cluster
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}"
               :: "r"((u32)__cvta_generic_to_shared(b)), "r"(rank) : "memory");
}
DEV u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEV void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
DEV void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }

// Ordinary stores to shared memory before it are seen by products and bulk copies after the next barrier.
DEV void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEV void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEV void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
template <int REGISTERS>
DEV void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS>
DEV void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
DEV void store_matrices(void* row, const uint4& v) {  // four 8 x 8 matrices; lane i gives the address of row i % 8 of i / 8
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"((u32)__cvta_generic_to_shared(row)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEV uint4 load16_now(const void* p) {  // not moved, not merged
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEV void no_load_crosses() { asm volatile("" ::: "memory"); }  // keeps the compiler from filling registers early
#include "wgmma.cuh"
#endif
