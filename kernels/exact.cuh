// The softmax over j of one (row, channel) with its maximum, for the few whose plain sum of exponentials is out of range.
#pragma once
#include "warp.cuh"

struct Element {  // where the scores of one (row, channel) come from
  const u16 *E, *kv, *w_mul, *w_add;
  float q, b_mul, b_add;
  int m_tile, row, row0, channel;
};

DEV float score(const Element& e, int j) {
  float mul = e.b_mul, add = e.b_add;
  const u16* tile = e.E + (u64)(e.m_tile + j) * 1024;
#pragma unroll 1
  for (int k = 0; k < 64; k++) {
    const float x = from_bf16(tile[tile_offset(e.row, k)]);
    mul += x * from_bf16(e.w_mul[weight_offset(e.channel, k, 16)]);
    add += x * from_bf16(e.w_add[weight_offset(e.channel, k, 16)]);
  }
  const int c = e.channel & 15;
  const int at = (e.channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1);
  return fmaf(e.q * from_bf16(e.kv[(u64)(e.row0 + j) * 512 + at]), mul, add);
}

// bias: of e_mul (1 +), and 4 floats on that of e_add; place: {graph, first row of the graph, n, i}; the rest: Element.
DEV float exact_gather(const u16* E, const u16* kv, const u16* w_mul, const u16* w_add, const float* bias, float q, int m_tile,
                       const int4& place, int row, int channel) {
  Element e;
  e.E = E, e.kv = kv, e.w_mul = w_mul, e.w_add = w_add, e.q = q, e.b_mul = bias[0], e.b_add = bias[4];
  e.m_tile = m_tile, e.row = row, e.row0 = place.y, e.channel = channel;
  float top = score(e, 0);
#pragma unroll 1
  for (int j = 1; j < place.z; j++) top = fmaxf(top, score(e, j));
  float sum = 0, gathered = 0;
  const int c = channel & 15, at = (channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1) + 4;
#pragma unroll 1
  for (int j = 0; j < place.z; j++) {
    const float p = exp2_fast(score(e, j) - top);
    sum += p;
    gathered += p * from_bf16(kv[(u64)(place.y + j) * 512 + at]);
  }
  return gathered / sum;
}
