// exact.cuh for edge_f8: the softmax over j of one (row, channel) in float with its maximum, from f16 and e4m3 operands.
#pragma once
#include "fp8.cuh"

struct Element {  // where the scores of one (row, channel) come from
  const u16 *E, *kv, *w_mul, *w_add;
  float q, b_mul, s_add, b_add;
  int m_tile, row, row0, channel;
};

DEV float from_half(u16 h) { return half_low(h); }

DEV float score(const Element& e, int j) {
  float mul = e.b_mul, add = 0;
  const u16* tile = e.E + (u64)(e.m_tile + j) * 1024;
#pragma unroll 1
  for (int k = 0; k < 64; k++) {
    const float x = half_low(halves_of_low(bytes4(tile[tile_offset(e.row, k)], 0u)));
    mul += x * from_half(e.w_mul[weight_offset(e.channel, k, 16)]);
    add += x * from_half(e.w_add[weight_offset(e.channel, k, 16)]);
  }
  const int c = e.channel & 15;
  const int at = (e.channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1);
  return fmaf(e.q * from_half(e.kv[(u64)(e.row0 + j) * 512 + at]), mul, fmaf(add, e.s_add, e.b_add));
}

// place: {graph, first row of the graph, n, i}; the rest: Element.
DEV float exact_gather(Element& e, const int4& place) {
  e.row0 = place.y;
  float top = score(e, 0);
#pragma unroll 1
  for (int j = 1; j < place.z; j++) top = fmaxf(top, score(e, j));
  float sum = 0, gathered = 0;
  const int c = e.channel & 15, at = (e.channel >> 4) * 32 + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1) + 4;
#pragma unroll 1
  for (int j = 0; j < place.z; j++) {
    const float p = exp2_fast(score(e, j) - top);
    sum += p;
    gathered += p * from_half(e.kv[(u64)(place.y + j) * 512 + at]);
  }
  return gathered / sum;
}
