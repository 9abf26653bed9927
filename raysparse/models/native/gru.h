// What the kernels of a sparse bidirectional GRU share: vectors, gates, and the products of one unit.
//
// The batch is the contiguous axis. A chunk of WIDTH sketches is a column of WIDTH floats per feature, two of the CPU's
// vectors, so that the states and inputs of a time step lie in the cache while all units read them, and the four sums
// of a unit stay in registers while its weights are walked. Measured with AVX-512 (h = 96, 512 sketches, S = .9): 32
// sketches are 1.2 times faster than 64 and 1.4 times faster than 16.
//
// A column that several gates of a unit use is loaded once for all of them: loads, not products, are what limits a
// walk. Against a list per gate that is 1.2 times faster at S = .5 and 1.1 times at .9.
//
// Vectors are the compiler's own (GCC and clang), so the same text is AVX-512, AVX2, SSE or NEON by the flags it is
// given. They must be as wide as the CPU's: GCC computes wider ones float by float, 10 times slower.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, UNITS = 2;  // UNITS of a dense tile: 2 x 4 sums x 2 vectors of the 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, UNITS = 1;
#else
constexpr int LANES = 4, UNITS = 1;
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));
constexpr int VECTORS = 2;  // of a chunk
constexpr int WIDTH = VECTORS * LANES;
constexpr int64_t ROW = WIDTH * sizeof(float);  // bytes of one feature
constexpr int LONG = 12;  // columns: longer lists are walked two at a time

// One direction of a layer. The gates of a unit are r, z, n (of the input) and q (of the state, which r scales), each
// weight and bias times -log2(e), those of n and q twice that: the sums are then what 2^x is taken of.
struct Side {
  // Sparse: how many columns of the input are used by r alone, z, r and z, n, r and n, z and n, all three; then as many
  // numbers for the state with q for n; [h, 14]. null: a dense side.
  const int32_t* counts;
  const int32_t* offsets;  // bytes from the layer's input of a time step to each of those columns, in that order
  const float* values;     // their weights, r before z before n or q; dense: see `tile`
  const float* bias;       // [4 h]
  int64_t before;          // bytes from the layer's input of a time step to the state that the time step starts from
  int64_t to;              // bytes from a time step's first row to the new state
};

inline vec splat(float x) { return x - vec{}; }

// 2^x to 1e-7, for x cut to +-60; NaN stays NaN. The polynomial is the best of degree 5 on [-.5, .5].
inline vec exp2(vec x) {
  const vec low = splat(-60.f), high = splat(60.f);
  const vec shift = splat(12582912.f);  // 1.5 x 2^23: adding it rounds to an integer, which its last bits then hold
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec whole = x + shift;
  const vec rest = x - (whole - shift);
  vec p = splat(1.327647178e-3f);
  p = p * rest + 9.675541333e-3f;
  p = p * rest + 5.550713274e-2f;
  p = p * rest + 2.402211972e-1f;
  p = p * rest + 6.931469671e-1f;
  p = p * rest + 1.000000072f;
  return (vec)((ivec)p + ((ivec)whole << 23));
}

// sums += columns x weights, for the NV vectors that are in use.
template <int NV>
inline void walk(vec* sums, const char* base, const int32_t* offsets, const float* values, int count) {
  int k = 0;
  if (count >= LONG) {  // two independent chains, because an FMA takes four cycles
    vec second[NV] = {};
    for (; k + 1 < count; k += 2) {
      const vec* one = (const vec*)(base + offsets[k]);
      const vec* two = (const vec*)(base + offsets[k + 1]);
      for (int v = 0; v < NV; ++v) {
        sums[v] += values[k] * one[v];
        second[v] += values[k + 1] * two[v];
      }
    }
    for (int v = 0; v < NV; ++v) sums[v] += second[v];
  }
  for (; k < count; ++k) {
    const vec* one = (const vec*)(base + offsets[k]);
    for (int v = 0; v < NV; ++v) sums[v] += values[k] * one[v];
  }
}

// The columns that exactly the gates GATES use (bits: r, z, and the gate THIRD).
template <int NV, int GATES, int THIRD>
inline void share(vec (*sums)[NV], const char* base, const int32_t*& offsets, const float*& values, int count) {
  constexpr int USES = (GATES & 1) + (GATES >> 1 & 1) + (GATES >> 2);
  if constexpr (USES == 1) {
    walk<NV>(sums[GATES == 4 ? THIRD : GATES - 1], base, offsets, values, count);
  } else {
    const float* value = values;
    for (int k = 0; k < count; ++k, value += USES) {
      const vec* one = (const vec*)(base + offsets[k]);
      for (int v = 0; v < NV; ++v) {
        if constexpr (GATES & 1) sums[0][v] += value[0] * one[v];
        if constexpr (GATES & 2) sums[1][v] += value[GATES & 1] * one[v];
        if constexpr (GATES & 4) sums[THIRD][v] += value[USES - 1] * one[v];
      }
    }
  }
  offsets += count;
  values += count * USES;
}

template <int NV, int THIRD>
inline void share_all(vec (*sums)[NV], const char* base, const int32_t*& offsets, const float*& values,
                      const int32_t* counts) {
  share<NV, 1, THIRD>(sums, base, offsets, values, counts[0]);
  share<NV, 2, THIRD>(sums, base, offsets, values, counts[1]);
  share<NV, 3, THIRD>(sums, base, offsets, values, counts[2]);
  share<NV, 4, THIRD>(sums, base, offsets, values, counts[3]);
  share<NV, 5, THIRD>(sums, base, offsets, values, counts[4]);
  share<NV, 6, THIRD>(sums, base, offsets, values, counts[5]);
  share<NV, 7, THIRD>(sums, base, offsets, values, counts[6]);
}

// All columns: `count` features from `base`, each with three weights (r, z, the gate THIRD) for each of UNITS units.
template <int NV, int THIRD>
inline const float* tile(vec (*sums)[4][NV], const char* base, const float* values, int count) {
  for (int k = 0; k < count; ++k, base += ROW, values += 3 * UNITS) {
    const vec* one = (const vec*)base;
    for (int u = 0; u < UNITS; ++u)
      for (int v = 0; v < NV; ++v) {
        sums[u][0][v] += values[3 * u] * one[v];
        sums[u][1][v] += values[3 * u + 1] * one[v];
        sums[u][THIRD][v] += values[3 * u + 2] * one[v];
      }
  }
  return values;
}

// A gate's sums before any weight: its bias, or what is given per sketch, [4 h, WIDTH].
template <int NV>
inline void begin(vec* sums, const Side& side, const float* start, int gate) {
  for (int v = 0; v < NV; ++v) sums[v] = start ? ((const vec*)(start + gate * WIDTH))[v] : splat(side.bias[gate]);
}

// A time step of one direction.
struct Now {
  const char* in;      // the layer's input
  char* to;            // the new states
  char* gates;         // r, z, n of each unit and the sum of its q are kept here, [h, 4]; not for sampling
  const char* next;    // the input of the time step that follows
  const float* start;  // of the first layer: its sums before any weight, [4 h, WIDTH]; else null
  ivec running;        // which lanes of the last vector are in use
  int inputs;          // features of the layer's input
};

// h' = (1 - z) n + z h with z = 1 / (1 + z_), n = (1 - n_) / (1 + n_): one division for both.
template <int NV, bool KEEP>
inline void activate(const vec (*sums)[NV], const vec* before, const Now& now, int unit) {
  vec* to = (vec*)now.to + unit * VECTORS;
  for (int v = 0; v < NV; ++v) {
    const vec r = 1.f / (1.f + exp2(sums[0][v]));
    const vec z_ = exp2(sums[1][v]), n_ = exp2(sums[2][v] + r * sums[3][v]);
    const vec more = (1.f + z_) * (1.f + n_), state = z_ * (1.f - n_) + before[unit * VECTORS + v] * (1.f + n_);
    vec done;
    if constexpr (KEEP) {
      const vec part = 1.f / more;
      vec* gates = (vec*)now.gates + 4 * unit * VECTORS + v;
      gates[0] = r;
      gates[VECTORS] = (1.f + n_) * part;
      gates[2 * VECTORS] = (1.f - n_) * (1.f + z_) * part;
      gates[3 * VECTORS] = sums[3][v];
      done = state * part;
    } else {
      done = state / more;
    }
    to[v] = v == NV - 1 ? (vec)((ivec)done & now.running) : done;
  }
}

template <int NV, bool KEEP>
void sparse_step(const Now& now, const Side& side, int hidden) {
  const vec* before = (const vec*)(now.in + side.before);
  const int32_t *counts = side.counts, *offsets = side.offsets;
  const float* values = side.values;
  const int ahead = (now.inputs + hidden - 1) / hidden;  // features
  for (int unit = 0; unit < hidden; ++unit, counts += 14) {
    vec sums[4][NV];
    for (int gate = 0; gate < 4; ++gate) begin<NV>(sums[gate], side, now.start, 4 * unit + gate);
    for (int i = 0; i < ahead; ++i)  // 5 to 9 % of the time: the order of the columns is none that the CPU foresees
      for (int v = 0; v < NV; ++v) __builtin_prefetch((const vec*)(now.next + (unit * ahead + i) * ROW) + v);
    share_all<NV, 2>(sums, now.in, offsets, values, counts);
    share_all<NV, 3>(sums, now.in, offsets, values, counts + 7);
    activate<NV, KEEP>(sums, before, now, unit);
  }
}

}  // namespace
