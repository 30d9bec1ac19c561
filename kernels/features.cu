// What DiGress tells its network besides the noisy classes, one launch a step: cycles, spectrum, charge, valency, weight.
//
// A graph is owned by min(32, n_pad rounded up to even) lanes of one warp, so a warp holds three graphs of 9 nodes; its
// matrices are in shared memory in double precision (two of m x (m + 1), m = n_pad rounded up to even). Cycle counts are
// integers from adjacency bit rows (popcounts), exact. The spectrum is cyclic Jacobi with m / 2 rotations at once
// (round-robin pairs) and a fixed number of sweeps. Basis, sign and "largest component" follow the rules of
// bitdgdm.models.eigen and features, which do not depend on the solver: compare kernels/reference.py.
#include "warp.cuh"

#define CLUSTER 1e-6
#define TIE 2e-4
#define ZERO 1e-5
#ifndef IN_KS
#define IN_KS 1  // 16-channel tiles of a row of features
#endif

struct Node {
  u64 bits;                       // neighbours
  int degree, closed3, count[3];  // count: closed cycles of length 3, 4, 5 through the node, twice
  double value, diagonal, column, taken, vector0, outside;
};
struct Turn {  // one rotation
  double c, s;
  int p, q;
};
struct Total {
  long long cycles[4];
  int components, pivot;
};

struct Graph {
  double *A, *V;  // [m][m + 1]
  Turn* turn;     // [m / 2]
  Node* node;     // [m]
  int* order;     // [m] columns of V by eigenvalue
  Total* total;
  int m, n_pad, n, lane, width;
};

DEV int graph_bytes(int m) {
  return 2 * m * (m + 1) * 8 + m / 2 * (int)sizeof(Turn) + m * (int)sizeof(Node) + m * 8 + (int)sizeof(Total);
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
      for (int k = 0; k < g.n_pad; k++)
        if (own >> k & 1) {
          const u64 via = g.node[k].bits & other;
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
    g.A[i] = (double)c6;  // A is built later; these are integers below 2^53
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
    for (int i = 0; i < g.n_pad; i++) sum += g.lane < 3 ? g.node[i].count[g.lane] : (long long)g.A[i];
    g.total->cycles[g.lane] = sum;
  }
  warp_sync();
}

DEV int sweeps_for(int n) { return 5 + (n > 4) + (n > 8) + (n > 16) + (n > 32); }

// Eigenvalues of A into node[].value, vectors into the columns of V, ascending order into order[].
DEV void jacobi(const Graph& g) {
  const int m = g.m, stride = m + 1, rounds = sweeps_for(g.n_pad) * (m - 1);
  int turn = 0;
  for (int round = 0; round < rounds; round++) {
    // pair k of this round: (turn + k, turn - k) mod (m - 1); pair 0 is (m - 1, turn)
    for (int k = g.lane; k < m / 2; k += g.width) {
      const int p = k ? (turn + k) % (m - 1) : m - 1, q = (turn - k + m - 1) % (m - 1);
      const double app = g.A[p * stride + p], aqq = g.A[q * stride + q], apq = g.A[p * stride + q];
      const double d = aqq - app, root = sqrt(d * d + 4 * apq * apq) + 1e-300;
      const double t = 2 * apq / (d < 0 ? d - root : d + root), c = rsqrt(t * t + 1);
      g.turn[k].c = c, g.turn[k].s = t * c, g.turn[k].p = p, g.turn[k].q = q;
    }
    warp_sync();
    for (int col = g.lane; col < m; col += g.width)
      for (int k = 0; k < m / 2; k++) {
        const int p = g.turn[k].p, q = g.turn[k].q;
        const double c = g.turn[k].c, s = g.turn[k].s, x = g.A[p * stride + col], y = g.A[q * stride + col];
        g.A[p * stride + col] = c * x - s * y, g.A[q * stride + col] = s * x + c * y;
      }
    warp_sync();
    for (int row = g.lane; row < m; row += g.width)
      for (int k = 0; k < m / 2; k++) {
        const int p = g.turn[k].p, q = g.turn[k].q;
        const double c = g.turn[k].c, s = g.turn[k].s;
        double *A = g.A + row * stride, *V = g.V + row * stride;
        const double x = A[p], y = A[q], v = V[p], w = V[q];
        A[p] = c * x - s * y, A[q] = s * x + c * y;
        V[p] = c * v - s * w, V[q] = s * v + c * w;
      }
    warp_sync();
    turn = turn + 1 == m - 1 ? 0 : turn + 1;
  }
  for (int i = g.lane; i < g.n_pad; i += g.width) g.node[i].value = g.A[i * stride + i];
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
KERNEL(128, 1)
features(const u8* __restrict__ x, const u8* __restrict__ e, const int2* __restrict__ graphs, const int* __restrict__ times,
         const int* __restrict__ step, const double* __restrict__ table, u16* rows, u16* graph_rows, float* plain_x,
         float* plain_y, int count, int n_pad, int classes, int molecular, int warps) {
  SHARED(shared);
  Graph g;
  g.n_pad = n_pad, g.m = n_pad + (n_pad & 1), g.width = min(32, g.m);
  const int per_warp = 32 / g.width, slot = (THREAD & 31) / g.width;
  const int b = (BLOCK * warps + (THREAD >> 5)) * per_warp + slot;
  // lanes beyond the last whole graph take part in the barriers of their warp only; graphs beyond the last are copies of it
  g.lane = slot < per_warp ? (THREAD & 31) % g.width : 1 << 20;
  u8* memory = shared + ((THREAD >> 5) * per_warp + min(slot, per_warp - 1)) * graph_bytes(g.m);
  const int m = g.m, stride = m + 1;
  g.A = (double*)memory, g.V = g.A + m * stride, g.turn = (Turn*)(g.V + m * stride);
  g.node = (Node*)(g.turn + m / 2), g.order = (int*)(g.node + m), g.total = (Total*)(g.order + 2 * m);
  const int graph = min(b, count - 1);
  g.n = graphs[graph].y;
  const u8 *gx = x + graph * n_pad, *ge = e + (u64)graph * n_pad * n_pad;

  for (int i = g.lane; i < m; i += g.width) {
    u64 bits = 0;
    for (int j = 0; j < n_pad && i < n_pad; j++) bits |= (u64)(ge[i * n_pad + j] > 0) << j;
    g.node[i].bits = i < g.n ? bits : 0;
  }
  warp_sync();
  cycles(g);
  for (int i = g.lane; i < m; i += g.width)
    for (int j = 0; j < m; j++) {
      const bool edge = i < n_pad && j < n_pad && (g.node[i].bits >> j & 1);
      g.A[i * stride + j] = i == j ? (i < g.n ? g.node[i].degree : 2 * n_pad) : edge ? -1 : 0;
      g.V[i * stride + j] = i == j;
    }
  warp_sync();
  jacobi(g);

  const int n = max(g.n, 1);
  int components = 0;
  for (int i = 0; i < n_pad; i++) components += g.node[i].value / n < ZERO;
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
    int valency = 0;
    for (int j = 0; j < n_pad; j++) valency += ge[i * n_pad + j];
    const Node& v = g.node[i];
    for (int c = 0; c < channels; c++) {
      const int f = c - classes;
      double value = f < 0 ? (gx[i] == c) : 0;
      if (f >= 0 && f < 3) value = fmin(v.count[f] / 2.0 / 10, 1.0);
      if (f == 3) value = v.outside;
      if (f == 4) value = components < n_pad ? v.vector0 : 0;
      if (f == 5) value = components + 1 < n_pad ? v.taken : 0;
      if (f == 6) value = (int)gx[i] - valency;
      if (f == 7) value = valency;
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
