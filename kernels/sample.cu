// The ends of a step: edge classes to the network's input, logits to the next classes, and the step counter.
//
// embed: the input MLP of E sees only one-hot classes, so its output is a table of classes + 1 vectors (the last: no class
// at all, the diagonal of z_T). sample: a thread a draw (law L1): softmax, posterior with the tables of this step, inverse
// CDF of u = Philox4x32-10(key = seed, counter = sample id, time, slot). Sums run in class order and without fused
// multiply-add, as bitdgdm.models.noise and sampler write them. The step is read from device memory: one captured graph
// serves all steps.
#include "warp.cuh"

// E [m-tiles][4][32]; tile_of, tile_start in m-tiles; rows {graph, first row, n, i}; e: u8 [graphs][n_pad][n_pad];
// table: bf16 [classes + 1][64] as pairs; step: the diagonal has no class in step 0.
KERNEL(256, 1)
embed(uint4* __restrict__ E, const int* __restrict__ tile_of, const int* __restrict__ tile_start, const int4* __restrict__ rows,
      const u8* __restrict__ e, const u32* __restrict__ table, const int* __restrict__ step, int m_tiles, int n_pad,
      int classes) {
  const u64 index = (u64)BLOCK * 256 + THREAD;
  const int g = (int)(index >> 7), ks = index >> 5 & 3, lane = index & 31;
  if (g >= m_tiles) return;
  const int t = tile_of[g], j = g - tile_start[t];
  u32 word[2][2];
#pragma unroll
  for (int hi = 0; hi < 2; hi++) {
    const int4 row = rows[t * 16 + hi * 8 + (lane >> 2)];
    int c = e[((u64)row.x * n_pad + row.w) * n_pad + j];
    if (row.w == j && *step == 0) c = classes;
    word[hi][0] = table[c * 32 + ks * 8 + (lane & 3)], word[hi][1] = table[c * 32 + ks * 8 + 4 + (lane & 3)];
  }
  E[index] = make_uint4(word[0][0], word[1][0], word[0][1], word[1][1]);
}

DEV float uniform(u32 k0, u32 k1, u64 id, u32 time, u32 slot) {
  u32 c0 = (u32)id, c1 = (u32)(id >> 32), c2 = time, c3 = slot;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 h0 = mul_hi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0, h1 = mul_hi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return (float)((c0 >> 8) + 1) * 5.9604644775390625e-8f;  // 2^-24
}

#define MAX_CLASSES 16

// Class drawn from posterior(softmax(logit), now). table: [now][x_0][next] of this step, K classes.
template <int K>
DEV int draw(const float (&logit)[K], int classes, int now, const float* table, float u, int* not_finite) {
  float top = logit[0], total = 0, p[K], weight[K];
#pragma unroll
  for (int k = 1; k < K; k++)
    if (k < classes) top = fmaxf(top, logit[k]);
#pragma unroll
  for (int k = 0; k < K; k++) p[k] = k < classes ? expf(logit[k] - top) : 0.0f, total = add_rn(total, p[k]);
  const float* w = table + now * classes * classes;
#pragma unroll
  for (int s = 0; s < K; s++) weight[s] = 0;
#pragma unroll
  for (int x0 = 0; x0 < K; x0++) {
    if (x0 >= classes) continue;
    const float p0 = p[x0] / total;
#pragma unroll
    for (int s = 0; s < K; s++)
      if (s < classes) {
        const float term = mul_rn(p0, w[x0 * classes + s]);
        weight[s] = x0 ? add_rn(weight[s], term) : term;
      }
  }
  bool zero = true;
#pragma unroll
  for (int s = 0; s < K; s++) zero = zero && weight[s] == 0;
  float sum = 0, cumulated[K];
#pragma unroll
  for (int s = 0; s < K; s++) {
    if (s < classes) sum = s ? add_rn(sum, zero ? 1e-5f : weight[s]) : (zero ? 1e-5f : weight[s]);
    cumulated[s] = sum;
  }
  if (!(sum < 3e38f && sum > -3e38f)) *not_finite = 1;
  const float target = mul_rn(u, sum);
  int chosen = 0;
#pragma unroll
  for (int s = 0; s < K; s++)
    if (s < classes - 1) chosen += cumulated[s] < target;
  return chosen;
}

// logits_x: [tiles][16 rows][16]; logits_e: [m-tiles][16 rows][8], before the class one-hots are added and E is made
// symmetric; x, e are replaced; tables_x: [steps][K][K][K]; ids [graphs]; seed: two words; not_finite: set to 1.
KERNEL(128, 4)
sample(const float* __restrict__ logits_x, const float* __restrict__ logits_e, u8* x, u8* e, const int2* __restrict__ graphs,
       const int* __restrict__ tile_start, const u64* __restrict__ ids, const u32* __restrict__ seed,
       const int* __restrict__ times, const int* __restrict__ step, const float* __restrict__ tables_x,
       const float* __restrict__ tables_e, int* not_finite, int count, int n_pad, int classes_x, int classes_e) {
  const int slots = n_pad + n_pad * n_pad;
  const u64 index = (u64)BLOCK * 128 + THREAD;
  const int b = (int)(index / slots), slot = (int)(index % slots);
  if (b >= count) return;
  const int row0 = graphs[b].x, n = graphs[b].y, k = *step;
  const bool node = slot < n_pad;
  const int i = node ? slot : (slot - n_pad) / n_pad, j = node ? i : (slot - n_pad) % n_pad;
  if (i >= n || j >= n || (!node && i >= j)) return;
  const float u = uniform(seed[0], seed[1], ids[b], times[k + 1], slot);

  if (node) {
    u8* at = x + (u64)b * n_pad + i;
    const float* from = logits_x + (u64)(row0 + i) * 16;
    float logit[MAX_CLASSES];
#pragma unroll
    for (int c = 0; c < MAX_CLASSES; c++) logit[c] = from[c] + (c == *at ? 1.0f : 0.0f);
    *at = draw<MAX_CLASSES>(logit, classes_x, *at, tables_x + (u64)k * classes_x * classes_x * classes_x, u, not_finite);
  } else {
    u8 *at = e + ((u64)b * n_pad + i) * n_pad + j, *mirror = e + ((u64)b * n_pad + j) * n_pad + i;
    const int qi = row0 + i, qj = row0 + j;
    const float* ij = logits_e + ((u64)(tile_start[qi >> 4] + j) * 16 + (qi & 15)) * 8;
    const float* ji = logits_e + ((u64)(tile_start[qj >> 4] + i) * 16 + (qj & 15)) * 8;
    float logit[8];
#pragma unroll
    for (int c = 0; c < 8; c++) logit[c] = ((ij[c] + (c == *at ? 1.0f : 0.0f)) + (ji[c] + (c == *at ? 1.0f : 0.0f))) / 2;
    *at = *mirror = draw<8>(logit, classes_e, *at, tables_e + (u64)k * classes_e * classes_e * classes_e, u, not_finite);
  }
}

KERNEL(32, 1)
advance(int* step) {
  if (THREAD == 0) *step += 1;
}
