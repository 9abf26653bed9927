// What the kernels of a sparse bidirectional GRU share: vectors, gates, and the products of one unit.
//
// The batch is the contiguous axis. A chunk of WIDTH sketches is a column of WIDTH floats per feature, so that the
// states and inputs of a time step lie in the first cache while all units read them, and the four sums of a unit stay
// in registers while its weights are walked.
//
// Loads, not products, are what limits a walk: one for each weight, one for each vector of a column. So a column that
// several gates of a unit use is loaded once for all of them (against a list per gate 1.2 times faster at S = .5), and
// a chunk has four vectors in sampling. The columns of a time step are more than the first cache then, and are walked
// in passes that fit it, the sums kept between. At S = .5 / .75 / .9 / .95 sampling takes 1.07 / 1.17 / 1.05 / 1.07
// times as long with two vectors and 1.15 / 1.14 / 1.0 / 1.0 times with four in one pass (Intel Xeon, AVX-512, h = 96,
// 256 sketches); with AVX2, 1.6 / 1.54 / 1.55 / 1.61 times with two, 1.0 to 1.1 with three, 1.05 to 1.1 with six and
// about 1.0 in one pass (EPYC). Training has two: with AVX-512 four are 1.05 to 1.15 times faster for 64 sketches and
// more, and 1.2 to 1.3 times slower for 32; with AVX2 .96 to 1.06 times as fast, and 1.15 times slower for 16.
//
// A sum waits for the one before: eight must be on their way for two products a cycle. With two vectors there are two
// chains of sums for each gate, with four only where one gate alone uses a column.
//
// Vectors are the compiler's own (GCC and clang), so the same text is AVX-512, AVX2, SSE or NEON by the flags it is
// given. They must be as wide as the CPU's: GCC computes wider ones float by float, 10 times slower. What clang 14 makes
// takes 1.2 to 1.6 times as long as what GCC 12 does in sampling (dense: 1.0), 1.0 to 1.2 in training, with AVX2 1.2 to
// 1.35 (EPYC).
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <unistd.h>
#if !defined(RAYSPARSE_VECTORS)
#define RAYSPARSE_VECTORS 2
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, UNITS = 2;  // UNITS of a dense tile: 2 x 3 sums of four vectors in the 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, UNITS = 1;
#else
constexpr int LANES = 4, UNITS = 1;
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));
constexpr int VECTORS = RAYSPARSE_VECTORS;  // of a chunk
constexpr int WIDTH = VECTORS * LANES;
constexpr int64_t ROW = WIDTH * sizeof(float);  // bytes of one feature
constexpr int LISTS = 11;  // of columns that the same gates use
constexpr int CHAINS = VECTORS > 2 ? 1 : 2;  // of sums of a gate; 3 and 4 gain nothing
constexpr int BLOCK = VECTORS > 2 ? 2 : 8;   // units whose gates are computed together, a multiple of UNITS
constexpr int LONG = 12;                     // of a walk for one sum: shorter ones are one chain

// One direction of a layer. The gates of a unit are r, z, n (of the input) and q (of the state, which r scales), each
// weight and bias times -log2(e), those of n and q twice that: the sums are then what 2^x is taken of.
struct Side {
  // Sparse: how many columns are used by r alone, by z, by r and z, of input and state; by n, r and n, z and n, all
  // three of the input; by q, r and q, z and q, all three of the state; [passes, h, 11]. null: a dense side.
  const int32_t* counts;
  const int32_t* offsets;  // bytes from the layer's input of a time step to each of those columns, in that order
  const float* values;     // their weights, r before z before n or q; dense: see `tile`
  const float* bias;       // [4 h]
  int64_t before;          // bytes from the layer's input of a time step to the state that the time step starts from
  int64_t to;              // bytes from a time step's first row to the new state
  int32_t passes;          // over the columns of a sparse side
  int32_t input_passes;    // so many of them, the first ones, have columns of the input only
};

// So many features of a chunk lie in the first cache together: the least that CPUs have today where the system does not
// tell its size.
inline int32_t features_in_cache() {
  long found = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  return (int32_t)((found > 0 ? found : 32768) / ROW);
}

inline vec splat(float x) { return x - vec{}; }

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

template <int HALF, int... I>
inline float halved(vec x, std::integer_sequence<int, I...> lanes) {
  if constexpr (HALF == 0) return x[0];
  else return halved<HALF / 2>(x + PICK(x, x, ((I + HALF) % LANES)...), lanes);
}

// The sum of its lanes, halved again and again: with one lane after the other, the gradients of a linear layer's
// weights took 1.7 to 1.8 times as long.
inline float sum_of(vec x) { return halved<LANES / 2>(x, std::make_integer_sequence<int, LANES>()); }

// An address in one register: an FMA that adds two itself is two operations on Intel.
inline const vec* at(const char* address) {
#if defined(__x86_64__)
  asm("" : "+r"(address));
#endif
  return (const vec*)address;
}

// Load it once: GCC reads what several products use from memory for each of them (S = .5: 1.07 times as long).
inline void in_register(vec& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  (void)x;
#endif
}

// 2^x to 1e-7, for x cut to +-60; NaN stays NaN. The polynomials are the best of degree 5 on [0, 1] and [-.5, .5].
#if defined(__AVX512DQ__)
inline vec exp2(vec x) {
  x = (vec)_mm512_min_ps((__m512)splat(60.f), (__m512)x);  // far below, it is 0
  const vec rest = (vec)_mm512_reduce_ps((__m512)x, 1);    // above the whole number below x
  vec p = splat(1.8775766734e-3f);
  p = p * rest + 8.9893400947e-3f;
  p = p * rest + 5.5826318050e-2f;
  p = p * rest + 2.4015361705e-1f;
  p = p * rest + 6.9315307320e-1f;
  p = p * rest + 9.9999992506e-1f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// 1 / x to rounding
inline vec one_by(vec x) {
  const vec y = (vec)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.f - x * y);
}
#else
inline vec within(vec x, vec low, vec high) {  // NaN stays NaN
#if defined(__AVX__)  // GCC makes comparisons and blends of what stands below: S = .9 takes 1.07 times as long
  return (vec)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)x));
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

inline vec exp2(vec x) {
  const vec shift = splat(12582912.f);  // 1.5 x 2^23: adding it rounds to an integer, which its last bits then hold
  x = within(x, splat(-60.f), splat(60.f));
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

inline vec one_by(vec x) { return 1.f / x; }
#endif

// sums += columns x weights, for the NV vectors that are in use.
template <int NV>
inline void walk(vec* sums, const char* base, const int32_t* offsets, const float* values, int count) {
  int k = 0;
  if (count >= LONG) {  // two independent chains, because an FMA takes four cycles
    vec second[NV] = {};
    for (; k + 1 < count; k += 2) {
      const vec* one = at(base + offsets[k]);
      const vec* two = at(base + offsets[k + 1]);
      for (int v = 0; v < NV; ++v) {
        sums[v] += values[k] * one[v];
        second[v] += values[k + 1] * two[v];
      }
    }
    for (int v = 0; v < NV; ++v) sums[v] += second[v];
  }
  for (; k < count; ++k) {
    const vec* one = at(base + offsets[k]);
    for (int v = 0; v < NV; ++v) sums[v] += values[k] * one[v];
  }
}

// The next N columns that exactly the gates GATES use (bits: r, z, and the gate THIRD), each in a chain of its own.
template <int NV, int GATES, int THIRD, int N>
inline void add(vec (*sums)[4][NV], const char* base, const int32_t*& offsets, const float*& values) {
  constexpr int USES = (GATES & 1) + (GATES >> 1 & 1) + (GATES >> 2);
  for (int c = 0; c < N; ++c, ++offsets, values += USES) {
    const vec* column = at(base + *offsets);
    for (int v = 0; v < NV; ++v) {
      vec one = column[v];
      if constexpr (USES > 1) in_register(one);
      if constexpr (GATES & 1) sums[c][0][v] += values[0] * one;
      if constexpr (GATES & 2) sums[c][1][v] += values[GATES & 1] * one;
      if constexpr (GATES & 4) sums[c][THIRD][v] += values[USES - 1] * one;
    }
  }
}

template <int NV, int GATES, int THIRD>
inline void walk_list(vec (*sums)[4][NV], const char* base, const int32_t*& offsets, const float*& values, int count) {
  if constexpr (CHAINS == 1 && (GATES == 1 || GATES == 2 || GATES == 4)) {
    walk<NV>(sums[0][GATES == 4 ? THIRD : GATES - 1], base, offsets, values, count);
    offsets += count;
    values += count;
  } else {
    for (; count >= CHAINS; count -= CHAINS) add<NV, GATES, THIRD, CHAINS>(sums, base, offsets, values);
    for (; count > 0; --count) add<NV, GATES, THIRD, 1>(sums, base, offsets, values);
  }
}

// The same; with clang sums that a list does not add to stay in memory, as they do with GCC: 16 of four vectors and what
// a product needs are more than the registers, and clang would move them at every column (S = .5 and .9 take it 2.2 and
// 1.5 times as long; with 16 registers 2.4 and 1.45 times).
template <int NV, int GATES, int THIRD>
inline void share(vec (*sums)[4][NV], const char* base, const int32_t*& offsets, const float*& values, int count) {
#if defined(__clang__)
  if constexpr (CHAINS == 1) {
    if (!count) return;
    constexpr int PLACES[] = {0, 1, THIRD};
    vec own[1][4][NV];
    for (int gate = 0; gate < 3; ++gate)
      if (GATES >> gate & 1) memcpy(own[0][PLACES[gate]], sums[0][PLACES[gate]], sizeof own[0][0]);
    walk_list<NV, GATES, THIRD>(own, base, offsets, values, count);
    for (int gate = 0; gate < 3; ++gate)
      if (GATES >> gate & 1) memcpy(sums[0][PLACES[gate]], own[0][PLACES[gate]], sizeof own[0][0]);
    return;
  }
#endif
  walk_list<NV, GATES, THIRD>(sums, base, offsets, values, count);
}

// A unit's of one pass; see Side. Lists of input and state that may be one are one: the fewer, the fewer ends to be
// foreseen.
template <int NV>
inline void share_all(vec (*sums)[4][NV], const char* base, const int32_t*& offsets, const float*& values,
                      const int32_t* counts, bool states) {
#if defined(__clang__)
  if constexpr (CHAINS == 1) asm("" : "+r"(sums) : : "memory");  // it may no longer do without that memory
#endif
  share<NV, 1, 2>(sums, base, offsets, values, counts[0]);
  share<NV, 2, 2>(sums, base, offsets, values, counts[1]);
  share<NV, 3, 2>(sums, base, offsets, values, counts[2]);
  share<NV, 4, 2>(sums, base, offsets, values, counts[3]);
  share<NV, 5, 2>(sums, base, offsets, values, counts[4]);
  share<NV, 6, 2>(sums, base, offsets, values, counts[5]);
  share<NV, 7, 2>(sums, base, offsets, values, counts[6]);
  if (!states) return;
  share<NV, 4, 3>(sums, base, offsets, values, counts[7]);
  share<NV, 5, 3>(sums, base, offsets, values, counts[8]);
  share<NV, 6, 3>(sums, base, offsets, values, counts[9]);
  share<NV, 7, 3>(sums, base, offsets, values, counts[10]);
}

// All columns: `count` features from `base`, each with three weights (r, z, the gate THIRD) for each of UNITS units.
template <int NV, int THIRD>
inline const float* tile(vec (*sums)[4][NV], const char* base, const float* values, int count) {
#if defined(__clang__)  // it keeps in memory what the caller has (2.3 times as long); with GCC a copy takes 3 %
  vec own[UNITS][4][NV];
  memcpy(own, sums, sizeof own);
#else
  vec(*own)[4][NV] = sums;
#endif
  for (int k = 0; k < count; ++k, base += ROW, values += 3 * UNITS) {
    const vec* one = (const vec*)base;
    for (int u = 0; u < UNITS; ++u)
      for (int v = 0; v < NV; ++v) {
        own[u][0][v] += values[3 * u] * one[v];
        own[u][1][v] += values[3 * u + 1] * one[v];
        own[u][THIRD][v] += values[3 * u + 2] * one[v];
      }
  }
#if defined(__clang__)
  memcpy(sums, own, sizeof own);
#endif
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
  vec* partial;        // [h, 4, NV] sums between two passes
};

// h' = (1 - z) n + z h with z = 1 / (1 + z_), n = (1 - n_) / (1 + n_): one division for both.
inline vec new_state(vec r_sum, vec z_sum, vec n_sum, vec q_sum, vec before) {
  const vec r = one_by(1.f + exp2(r_sum));
  const vec z_ = exp2(z_sum), n_ = exp2(n_sum + r * q_sum);
  return (z_ * (1.f - n_) + before * (1.f + n_)) / ((1.f + z_) * (1.f + n_));
}

// The same of a unit, into its place.
template <int NV, bool KEEP>
inline void activate(const vec (*sums)[NV], const vec* before, const Now& now, int unit) {
  vec* to = (vec*)now.to + unit * VECTORS;
  for (int v = 0; v < NV; ++v) {
    vec done;
    if constexpr (KEEP) {
      const vec r = one_by(1.f + exp2(sums[0][v]));
      const vec z_ = exp2(sums[1][v]), n_ = exp2(sums[2][v] + r * sums[3][v]);
      const vec part = one_by((1.f + z_) * (1.f + n_));
      vec* gates = (vec*)now.gates + 4 * unit * VECTORS + v;
      gates[0] = r;
      gates[VECTORS] = (1.f + n_) * part;
      gates[2 * VECTORS] = (1.f - n_) * (1.f + z_) * part;
      gates[3 * VECTORS] = sums[3][v];
      done = (z_ * (1.f - n_) + before[unit * VECTORS + v] * (1.f + n_)) * part;
    } else {
      // Its division runs beside the products that the next vectors wait for: 1 to 3 %.
      done = new_state(sums[0][v], sums[1][v], sums[2][v], sums[3][v], before[unit * VECTORS + v]);
    }
    to[v] = v == NV - 1 ? (vec)((ivec)done & now.running) : done;
  }
}

// Of `count` units. A function of its own: else the constants of 2^x may drive the sums of the walks out of the
// registers (GCC 12 with AVX-512: 1.6 times slower at S = .5).
template <int NV, bool KEEP>
__attribute__((noinline)) void activate_all(const vec (*sums)[4][NV], const vec* before, const Now& now, int first,
                                            int count) {
  for (int u = 0; u < count; ++u) activate<NV, KEEP>(sums[u], before, now, first + u);
}

// work(gate) for r, z, n and q. Not a loop: GCC keeps sums in memory that it indexes before it has unrolled a loop
// (1.1 times as long at S = .9).
template <class Work>
inline void each_gate(Work work) {
  work(0), work(1), work(2), work(3);
}

// A unit's sums before a pass: what the last pass left, or what there is before any weight.
template <int NV>
inline void take_up(vec (*sums)[NV], const Now& now, const Side& side, int unit, int pass) {
  each_gate([&](int gate) {
    if (pass > (gate < 3 ? 0 : side.input_passes))
      for (int v = 0; v < NV; ++v) sums[gate][v] = now.partial[(4 * unit + gate) * NV + v];
    else
      begin<NV>(sums[gate], side, now.start, 4 * unit + gate);
  });
}

template <int NV, bool KEEP>
void sparse_step(const Now& now, const Side& side, int hidden) {
  const vec* before = (const vec*)(now.in + side.before);
  const int32_t *counts = side.counts, *offsets = side.offsets;
  const float* values = side.values;
  const char* next = now.next;
  const int walks = hidden * side.passes, ahead = (now.inputs + walks - 1) / walks;  // features
  vec block[BLOCK][4][NV];
  for (int pass = 0; pass < side.passes; ++pass) {
    const bool states = pass >= side.input_passes, last = pass == side.passes - 1;
    for (int unit = 0; unit < hidden; ++unit, counts += LISTS) {
      vec sums[CHAINS][4][NV] = {};
      take_up<NV>(sums[0], now, side, unit, pass);
      // 5 to 9 % of the time: the order of the columns is none that the CPU foresees
      for (int i = 0; i < ahead; ++i, next += ROW)
        for (int v = 0; v < NV; ++v) __builtin_prefetch((const vec*)next + v, 0, 2);
      share_all<NV>(sums, now.in, offsets, values, counts, states);
      const int place = unit % BLOCK;
      vec* to = last ? block[place][0] : now.partial + 4 * NV * unit;
      each_gate([&](int gate) {
        for (int v = 0; v < NV; ++v)
          to[gate * NV + v] = CHAINS > 1 ? sums[0][gate][v] + sums[CHAINS - 1][gate][v] : sums[0][gate][v];
      });
      if (last && (place == BLOCK - 1 || unit == hidden - 1))
        activate_all<NV, KEEP>(block, before, now, unit - place, place + 1);
    }
  }
}

}  // namespace
