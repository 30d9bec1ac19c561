// What DiGress tells its network besides the noisy classes, one launch a step: cycles, spectrum, charge, valency, weight.
//
// A graph is owned by min(32, n_pad rounded up to even) lanes of one warp, so a warp holds three graphs of 9 nodes; its
// eigenvectors are in shared memory in double precision (m x (m + 1), m = n_pad rounded up to even). Cycle counts are
// integers from adjacency bit rows (popcounts), exact. The spectrum is one-sided Jacobi of W = Laplacian + SHIFT (Hestenes:
// columns of W turn in pairs until they are orthogonal; then their lengths are the eigenvalues + SHIFT, and they point as
// the eigenvectors), all pairs of a round-robin round at once, until every pair of a graph has been met without a turn. A
// lane holds one column in registers and gets its partner's by shuffles; more than 32 nodes: columns in shared memory.
// A pair of columns of r rows costs 2 r shuffles and 3 r double operations. Basis, sign and "largest component" follow the
// rules of bitdgdm.models.eigen and features, which do not depend on the solver: compare kernels/reference.py.
#include "warp.cuh"

#define CLUSTER 1e-6
#define TIE 2e-4
#define ZERO 1e-5
#define SHIFT 4.0
#define ORTHOGONAL 1e-14  // product of two columns over their lengths
#define ROUNDS 2000       // never seen: 9 sweeps are enough
#ifndef IN_KS
#define IN_KS 1  // 16-channel tiles of a row of features
#endif

#ifndef ROWS
#define ROWS 32  // of a column in registers
#endif

struct Node {
  u64 bits;                                // neighbours
  int degree, closed3, count[3], valency;  // count: closed cycles of length 3, 4, 5 through the node, twice
  double value, diagonal, column, taken, vector0, outside;
};
struct Total {
  long long cycles[4];
  int components, pivot;
};

struct Graph {
  double* V;   // [m][m + 1]
  Node* node;  // [m]
  int* order;  // [m] columns of V by eigenvalue
  Total* total;
  int m, n_pad, n, lane, width, base;  // base: the warp's lane that is the first of the graph
};

DEV int graph_bytes(int m) {
  return m * (m + 1) * 8 + m * (int)sizeof(Node) + m * 8 + (int)sizeof(Total);
}

// Counts closed walks without repetition through every node; the graph's cycle counts as exact integers.
DEV void cycles(const Graph& g) {
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    const u64 own = g.node[i].bits;
    const int d = bit_count((u32)own) + bit_count((u32)(own >> 32));
    long long closed4 = 0, closed5 = 0, six = 0, triangles2 = 0, walks3 = 0;
    int closed3 = 0;
    for (int j = 0; j < g.n_pad; j++) {
      const u64 other = g.node[j].bits, both = own & other;
      const int a2 = bit_count((u32)both) + bit_count((u32)(both >> 32));
      int a3 = 0;
      for (u64 left = own; left; left &= left - 1) {
        const u64 via = g.node[lowest_bit(left)].bits & other;
        a3 += bit_count((u32)via) + bit_count((u32)(via >> 32));
      }
      if (j == i) closed3 = a3;
      closed4 += (long long)a2 * a2, closed5 += (long long)a2 * a3, six += (long long)a3 * a3, walks3 += a3;
      if (own >> j & 1) triangles2 += (long long)a2 * a2;
    }
    g.node[i].degree = d, g.node[i].closed3 = closed3;
    g.node[i].count[0] = closed3;
    g.node[i].count[1] = (int)(closed4 - (long long)d * (d - 1));
    g.node[i].count[2] = (int)(closed5 - 2LL * closed3 * d + closed3);
    const long long c3 = closed3, dd = d;
    const long long c6 = six - 3 * c3 * c3 + 9 * triangles2 - 6 * dd * closed4 + 6 * closed4 - 4 * c3 + 4 * dd * dd * dd +
                         3 * walks3 - 12 * dd * dd + 4 * dd;
    g.node[i].value = (double)c6;  // not an eigenvalue yet; an integer below 2^53
  }
  warp_sync();
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    int around4 = 0, around5 = 0;
    for (int j = 0; j < g.n_pad; j++)
      if (g.node[i].bits >> j & 1) around4 += g.node[j].degree, around5 += g.node[j].closed3;
    g.node[i].count[1] -= around4, g.node[i].count[2] -= around5;
  }
  warp_sync();
  if (g.lane < 4) {
    long long sum = 0;
    for (int i = 0; i < g.n_pad; i++) sum += g.lane < 3 ? g.node[i].count[g.lane] : (long long)g.node[i].value;
    g.total->cycles[g.lane] = sum;
  }
  warp_sync();
}

struct Turn {  // of a column: its new value is c own - s other
  double c, s, t;
};

// Makes columns orthogonal whose squared lengths and product are given, as one of the two sees it; last: it is the second.
// The angle is in float: what it leaves of the product is 1e-7 of it, for the next meeting. c is exact, so that lengths stay.
DEV Turn turn_of(double own, double other, double product, bool last) {
  const float d = (float)(other - own), p = 2 * (float)product, root = sqrt_fast(d * d + p * p);
  Turn r;
  r.t = div_fast(p, d < 0 || (d == 0 && last) ? d - root : d + root);
  const double x = fma(r.t, r.t, 1.0), near = rsqrtf((float)x), off = fma(-x * near, near, 1.0);
  r.c = fma(near * off, fma(0.375, off, 0.5), near);
  r.s = r.c * r.t;
  return r;
}

// Partner of a column in a round of round-robin among an even number of columns.
DEV int partner_of(int column, int round, int columns) {
  int other = 2 * round - column;
  other += other < 0 ? columns - 1 : other >= columns - 1 ? 1 - columns : 0;
  return column == columns - 1 ? round : column == round ? columns - 1 : other;
}

DEV double squared(const double (&w)[ROWS]) {
  double sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < ROWS; i++) sum[i & 3] = fma(w[i], w[i], sum[i & 3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Eigenvalues into node[].value, vectors into the columns of V. A lane holds a column.
DEV void solve_in_registers(const Graph& g) {
  const int column = g.lane, columns = g.n + (g.n & 1), stride = g.m + 1;
  const bool real = column < g.n;
  const u32 team = (g.width < 32 ? (1u << g.width) - 1 : 0xffffffffu) << g.base;
  int rows = 4;
  while (warp_any(g.n > rows)) rows += 4;
  double w[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++)
    w[i] = !real || i >= g.n ? 0 : i == column ? g.node[i].degree + SHIFT : g.node[column].bits >> i & 1 ? -1 : 0;
  double length2 = squared(w);
  int round = 0, quiet = 0;  // rounds since the last turn in the graph
  for (int k = 0; k < ROUNDS && warp_any(quiet < columns - 1); k++) {
    const int partner = column < columns ? partner_of(column, round, columns) : column;
    const int from = column < columns ? g.base + partner : THREAD & 31;
    double other[ROWS], sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i0 = 0; i0 < ROWS; i0 += 4)
      if (i0 < rows)
#pragma unroll
        for (int i = i0; i < i0 + 4 && i < ROWS; i++) other[i] = lane_from(w[i], from), sum[i & 3] = fma(w[i], other[i], sum[i & 3]);
    const double product = (sum[0] + sum[1]) + (sum[2] + sum[3]), other2 = lane_from(length2, from);
    const bool turns = quiet < columns - 1 && partner != column &&
                       product * product > ORTHOGONAL * ORTHOGONAL * length2 * other2;
    const u32 turning = warp_ballot(turns);
    if (turning) {
      Turn r = turn_of(length2, other2, product, column > partner);
      if (!turns) r.c = 1, r.s = 0;
      else length2 = fma(-r.t, product, length2);
#pragma unroll
      for (int i0 = 0; i0 < ROWS; i0 += 4)
        if (i0 < rows)
#pragma unroll
          for (int i = i0; i < i0 + 4 && i < ROWS; i++) w[i] = fma(-r.s, other[i], r.c * w[i]);
    }
    quiet = turning & team ? 0 : quiet + 1;
    round = round + 1 >= columns - 1 ? 0 : round + 1;
    if (round == 0) length2 = squared(w);
  }
  if (column >= g.m) return;
  const double length = sqrt(squared(w)), inverse = real ? 1 / length : 0;
  g.node[column].value = real ? length - SHIFT : 2 * g.n_pad;
#pragma unroll
  for (int i = 0; i < ROWS; i++)
    if (i < g.m) g.V[i * stride + column] = column == i && !real ? 1 : w[i] * inverse;
}

// The same with a lane a pair of columns, which are in V.
DEV void solve_in_shared(const Graph& g) {
  const int columns = g.n + (g.n & 1), stride = g.m + 1;
  for (int column = g.lane; column < g.m; column += g.width)
    for (int i = 0; i < g.m; i++) {
      const bool real = column < g.n && i < g.n;
      g.V[i * stride + column] = !real ? 0 : i == column ? g.node[i].degree + SHIFT : g.node[column].bits >> i & 1 ? -1 : 0;
    }
  warp_sync();
  int round = 0, quiet = 0;
  for (int k = 0; k < ROUNDS && quiet < columns - 1; k++) {
    bool turns = false;
    // the pairs of a round: columns - 1 with round, and round + i with round - i
    for (int pair = g.lane; pair < columns / 2; pair += g.width) {
      const int p = pair ? (round + pair) % (columns - 1) : columns - 1, q = partner_of(p, round, columns);
      double p2 = 0, q2 = 0, product = 0;
      for (int i = 0; i < g.n; i++) {
        const double x = g.V[i * stride + p], y = g.V[i * stride + q];
        p2 = fma(x, x, p2), q2 = fma(y, y, q2), product = fma(x, y, product);
      }
      if (!(product * product > ORTHOGONAL * ORTHOGONAL * p2 * q2)) continue;
      turns = true;
      const Turn r = turn_of(p2, q2, product, false);
      for (int i = 0; i < g.n; i++) {
        const double x = g.V[i * stride + p], y = g.V[i * stride + q];
        g.V[i * stride + p] = fma(-r.s, y, r.c * x), g.V[i * stride + q] = fma(r.s, x, r.c * y);
      }
    }
    quiet = warp_any(turns) ? 0 : quiet + 1;
    round = round + 1 >= columns - 1 ? 0 : round + 1;
  }
  warp_sync();
  for (int column = g.lane; column < g.m; column += g.width) {
    double square = 0;
    for (int i = 0; i < g.n; i++) square = fma(g.V[i * stride + column], g.V[i * stride + column], square);
    const bool real = column < g.n;
    const double length = sqrt(square), inverse = real ? 1 / length : 0;
    g.node[column].value = real ? length - SHIFT : 2 * g.n_pad;
    for (int i = 0; i < g.m; i++) g.V[i * stride + column] = column == i && !real ? 1 : g.V[i * stride + column] * inverse;
  }
}

// Eigenvalues into node[].value, vectors into the columns of V, ascending order into order[]. A row of the padding is an
// eigenvector of 2 n_pad by itself.
DEV void solve(const Graph& g) {
  if (g.n_pad <= ROWS) solve_in_registers(g);
  else solve_in_shared(g);
  warp_sync();
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    int rank = 0;
    for (int j = 0; j < g.n_pad; j++)
      rank += g.node[j].value < g.node[i].value || (g.node[j].value == g.node[i].value && j < i);
    g.order[rank] = i;
  }
  warp_sync();
}

// The first node whose diagonal is within TIE of the largest.
DEV int pivot(const Graph& g) {
  double top = g.node[0].diagonal;
  for (int i = 1; i < g.n_pad; i++) top = fmax(top, g.node[i].diagonal);
  int i = 0;
  while (i < g.n_pad - 1 && g.node[i].diagonal < (1 - TIE) * top) i++;
  return i;
}

// Marks nodes outside the largest component with column = 1.
DEV void outside(const Graph& g) {
  const int stride = g.m + 1;
  const double limit = ZERO * max(g.n, 1);
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    double inverse = i < g.n ? 0 : 2;
    for (int k = 0; k < g.n_pad; k++)
      if (g.node[k].value < limit) inverse += g.V[i * stride + k] * g.V[i * stride + k];
    g.node[i].column = inverse, g.node[i].diagonal = 1 / fmax(inverse, 1e-3);
  }
  warp_sync();
  const int p = pivot(g);
  const double half = 0.5 * g.node[p].column;
  warp_sync();
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    double together = 0;
    for (int k = 0; k < g.n_pad; k++)
      if (g.node[k].value < limit) together += g.V[i * stride + k] * g.V[p * stride + k];
    g.node[i].column = together > half || i >= g.n ? 0 : 1;
  }
  warp_sync();
}

// Eigenvector `number` of the canonical basis into node[].taken; node[].taken before it is the vector of number - 1,
// or anything if `first`.
DEV void basis_vector(const Graph& g, int number, bool first) {
  const int stride = g.m + 1;
  const double value = g.node[g.order[min(number, g.n_pad - 1)]].value;
  const double before = first ? 0 : g.node[g.order[min(number - 1, g.n_pad - 1)]].value;
  const bool same = !first && fabs(before - value) <= CLUSTER;
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    if (!same) g.node[i].taken = 0;
    double sum = 0;
    for (int k = 0; k < g.n_pad; k++)
      if (fabs(g.node[k].value - value) <= CLUSTER) sum += g.V[i * stride + k] * g.V[i * stride + k];
    g.node[i].diagonal = sum - g.node[i].taken * g.node[i].taken;
  }
  warp_sync();
  const int p = pivot(g);
  const double at_pivot = g.node[p].taken, scale = rsqrt(fmax(g.node[p].diagonal, 1e-30));
  warp_sync();
  for (int i = g.lane; i < g.n_pad; i += g.width) {
    double sum = 0;
    for (int k = 0; k < g.n_pad; k++)
      if (fabs(g.node[k].value - value) <= CLUSTER) sum += g.V[i * stride + k] * g.V[p * stride + k];
    g.node[i].taken = (sum - g.node[i].taken * at_pivot) * scale;
  }
  warp_sync();
}

// x: u8 [graphs][n_pad]; e: u8 [graphs][n_pad][n_pad]; graphs [graphs] {first row, n}; times [steps + 1], step: which;
// table: max weight, T, then a weight a class. Out: rows [tiles][IN_KS][32] and graph_rows [graphs / 16][32] in fragment
// order (bf16); when not null, the same as float: plain_x [graphs][n_pad][channels], plain_y [graphs][channels].
KERNEL(128, ROWS > 28 ? 2 : ROWS > 16 ? 3 : ROWS > 9 ? 4 : 6)
features(const u8* __restrict__ x, const u8* __restrict__ e, const int2* __restrict__ graphs, const int* __restrict__ times,
         const int* __restrict__ step, const double* __restrict__ table, u16* rows, u16* graph_rows, float* plain_x,
         float* plain_y, int count, int n_pad, int classes, int molecular, int warps) {
  SHARED(shared);
  Graph g;
  g.n_pad = n_pad, g.m = n_pad + (n_pad & 1), g.width = min(32, g.m);
  // lanes beyond the last whole graph only take part in what a warp does together, as if of it; graphs beyond the last are
  // copies of it
  const int per_warp = 32 / g.width, slot = min((THREAD & 31) / g.width, per_warp - 1);
  const int b = (BLOCK * warps + (THREAD >> 5)) * per_warp + slot;
  g.base = slot * g.width, g.lane = (THREAD & 31) - g.base;
  if (g.lane >= g.width) g.lane = 1 << 20;
  u8* memory = shared + ((THREAD >> 5) * per_warp + slot) * graph_bytes(g.m);
  const int m = g.m;
  g.V = (double*)memory, g.node = (Node*)(g.V + m * (m + 1)), g.order = (int*)(g.node + m);
  g.total = (Total*)(g.order + 2 * m);
  const int graph = min(b, count - 1);
  g.n = graphs[graph].y;
  const u8 *gx = x + graph * n_pad, *ge = e + (u64)graph * n_pad * n_pad;

  for (int i = g.lane; i < m; i += g.width) {
    u64 bits = 0;
    int valency = 0;
    for (int j = 0; j < n_pad && i < g.n; j++) {
      const int bond = ge[i * n_pad + j];
      bits |= (u64)(bond > 0) << j, valency += bond;
    }
    g.node[i].bits = bits, g.node[i].valency = valency;
  }
  warp_sync();
  cycles(g);
  solve(g);

  const int n = max(g.n, 1);
  int components = 0;
  for (int i = 0; i < n_pad; i++) components += g.node[i].value < ZERO * n;
  outside(g);
  for (int i = g.lane; i < n_pad; i += g.width) g.node[i].outside = g.node[i].column;
  warp_sync();
  basis_vector(g, components, true);
  for (int i = g.lane; i < n_pad; i += g.width) g.node[i].vector0 = g.node[i].taken;
  warp_sync();
  basis_vector(g, components + 1, false);
  if (b >= count) return;

  const int channels = classes + 6 + 2 * molecular;
  for (int i = g.lane; i < g.n; i += g.width) {
    const int row = graphs[graph].x + i;
    u16* to = rows + (u64)(row >> 4) * (IN_KS * 256);
    const Node& v = g.node[i];
    for (int c = 0; c < channels; c++) {
      const int f = c - classes;
      double value = f < 0 ? (gx[i] == c) : 0;
      if (f >= 0 && f < 3) value = fmin(v.count[f] / 2.0 / 10, 1.0);
      if (f == 3) value = v.outside;
      if (f == 4) value = components < n_pad ? v.vector0 : 0;
      if (f == 5) value = components + 1 < n_pad ? v.taken : 0;
      if (f == 6) value = (int)gx[i] - v.valency;
      if (f == 7) value = v.valency;
      to[tile_offset(row & 15, c)] = to_bf16((float)value);
      if (plain_x) plain_x[((u64)graph * n_pad + i) * channels + c] = (float)value;
    }
  }
  const int y_channels = 12 + molecular;
  for (int c = g.lane; c < y_channels; c += g.width) {
    double value = 0;
    if (c == 0) value = (double)g.n / n_pad;
    if (c >= 1 && c < 5) {
      const double size = c == 1 ? 6 : c == 2 ? 8 : c == 3 ? 10 : 12;
      value = fmin((double)g.total->cycles[c - 1] / size / 10, 1.0);
    }
    if (c == 5) value = components;
    if (c >= 6 && c < 11) {
      const int k = components + c - 6;
      value = k < n_pad ? g.node[g.order[k]].value / n : 2;
    }
    if (c == 11 && molecular) {
      for (int i = 0; i < n_pad; i++) value += table[2 + (i < g.n ? gx[i] : 0)];
      value /= table[0];
    }
    if (c == y_channels - 1) value = (float)times[*step] / (float)table[1];
    graph_rows[(u64)(graph >> 4) * 256 + tile_offset(graph & 15, c)] = to_bf16((float)value);
    if (plain_y) plain_y[(u64)graph * y_channels + c] = (float)value;
  }
}
