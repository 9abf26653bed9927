// Prediction for few sketches, one at a time: with a sketch in each lane most lanes would be empty.
//
// What a layer makes of its input does not wait for anything, so there the lanes are points: the same walks as of many
// sketches, WIDTH points at a time. The states wait for each other; there the lanes are units. A step's products with
// all weights are 3 h h / LANES vectors, which come from the second cache. With few weights they are slots: a vector of
// one weight for each of LANES units, and each one's place among COLUMNS states that lie in registers, so that what it
// is multiplied with is one permutation. A block of units has as many slots as its unit with the most weights there.
#pragma once
#include "chunk.h"

namespace {

#if defined(__AVX512F__)
constexpr int COLUMNS = 2 * LANES;
#elif defined(__AVX2__)
constexpr int COLUMNS = LANES;
#else
constexpr int COLUMNS = 64;  // no such permutation: each from memory
#endif

// One direction of a layer.
struct FewSide {
  Side input;             // what the input is walked with; passes and input_passes are the same; before, to: not used
  const float* states;    // dense: [pairs of blocks, h, 2, 3, LANES], a last odd block [h, 3, LANES]; or slots [LANES]
  const uint8_t* places;  // of the slots' weights among COLUMNS states, [slots, LANES]
  const int32_t* slots;   // how many, [blocks, 3 (r, z, q), groups of COLUMNS]; null: dense
};

struct FewLayer {
  FewSide sides[2];
  int32_t inputs;
};

struct FewNet {
  const FewLayer* layers;
  Head head;  // last: not used
  int32_t layer_count;
};

inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Of all states: each of the lanes' own among COLUMNS from `states`.
struct Columns {
#if defined(__AVX512F__)
  vec low, high;
  explicit Columns(const float* states) : low(((const vec*)states)[0]), high(((const vec*)states)[1]) {}
  vec at(const uint8_t* places) const {
    const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)places));
    return (vec)_mm512_permutex2var_ps((__m512)low, lanes, (__m512)high);
  }
#elif defined(__AVX2__)
  vec low;
  explicit Columns(const float* states) : low(*(const vec*)states) {}
  vec at(const uint8_t* places) const {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)places));
    return (vec)_mm256_permutevar8x32_ps((__m256)low, lanes);
  }
#else
  const float* states;
  explicit Columns(const float* states) : states(states) {}
  vec at(const uint8_t* places) const {
    vec found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = states[places[lane]];
    return found;
  }
#endif
};

// Rows i and i + D of a square change what is in columns l + D of the one and l of the other.
template <int D, int... L>
inline void exchange(vec& one, vec& two, std::integer_sequence<int, L...>) {
  const vec a = one, b = two;
  one = PICK(a, b, ((L & D) ? LANES + L - D : L)...);
  two = PICK(a, b, ((L & D) ? LANES + L : L + D)...);
}

template <int D = 1>
inline void transpose(vec* square) {
  if constexpr (D < LANES) {
    for (int i = 0; i < LANES; ++i)
      if (!(i & D)) exchange<D>(square[i], square[i + D], std::make_integer_sequence<int, LANES>());
    transpose<2 * D>(square);
  }
}

// What one sketch needs; see `lay_out`.
struct FewMemory {
  char* rows;      // [chunks of WIDTH points, features, WIDTH] a layer's input
  float* states;   // [points + 2, 2, units] of a layer, both directions; the first and the last row are zeros
  float* gates;    // [WIDTH, 3, units] r, z, n of a chunk's points, of the input
  vec* partial;    // [h, 4, VECTORS] sums between two passes
  float* head;     // [outputs, 2, units]
  float* bias;     // [units] of q
  int64_t units;   // h, whole blocks and groups of COLUMNS: rows begin on a vector's boundary
  int64_t stride;  // bytes from a chunk's rows to the next one's
};

inline int64_t features_of(const FewNet& net) {
  const int64_t points = net.head.inputs, states = 2 * net.head.hidden;
  return points > states ? points : states;
}

inline int64_t units_of(const FewNet& net) { return up(net.head.hidden, COLUMNS); }

// The memory's parts, in their order; returns its size in bytes.
inline int64_t lay_out(const FewNet& net, int64_t points, char* memory, FewMemory& found) {
  const int64_t units = found.units = units_of(net);
  found.stride = features_of(net) * ROW;
  char* next = memory;
  auto take = [&](int64_t bytes) { char* mine = next; next += up(bytes, 64); return mine; };
  found.rows = take(up(points, WIDTH) / WIDTH * found.stride);
  found.states = (float*)take((up(points, WIDTH) + 2) * 2 * units * sizeof(float));
  found.gates = (float*)take(WIDTH * 3 * units * sizeof(float));
  found.partial = (vec*)take(4ll * net.head.hidden * ROW);
  found.head = (float*)take(net.head.outputs * 2 * units * sizeof(float));
  found.bias = (float*)take(units * sizeof(float));
  return next - memory;
}

// The gates' sums of a chunk's points, made unit by unit with a point in each lane, into `gates`.
template <int NV>
struct Turned {
  const FewMemory& memory;
  vec block[3][NV][LANES];

  void put(const vec (*sums)[NV], int unit, int hidden) {
    const int place = unit % LANES;
    for (int gate = 0; gate < 3; ++gate)
      for (int v = 0; v < NV; ++v) block[gate][v][place] = sums[gate][v];
    if (place < LANES - 1 && unit < hidden - 1) return;
    for (int gate = 0; gate < 3; ++gate)
      for (int v = 0; v < NV; ++v) {
        for (int rest = place + 1; rest < LANES; ++rest) block[gate][v][rest] = vec{};
        transpose(block[gate][v]);
        float* to = memory.gates + (v * LANES * 3 + gate) * memory.units + unit - place;
        for (int point = 0; point < LANES; ++point, to += 3 * memory.units) *(vec*)to = block[gate][v][point];
      }
  }
};

template <int NV>
void sparse_input(const char* in, const Side& side, int hidden, const FewMemory& memory) {
  const int32_t *counts = side.counts, *offsets = side.offsets;
  const float* values = side.values;
  Now now = {};
  now.partial = memory.partial;
  Turned<NV> turned{memory, {}};
  for (int pass = 0; pass < side.passes; ++pass)
    for (int unit = 0; unit < hidden; ++unit, counts += LISTS) {
      vec sums[CHAINS][4][NV] = {};
      take_up<NV>(sums[0], now, side, unit, pass);
      share_all<NV>(sums, in, offsets, values, counts, false);
      if (CHAINS > 1)
        for (int gate = 0; gate < 3; ++gate)
          for (int v = 0; v < NV; ++v) sums[0][gate][v] += sums[CHAINS - 1][gate][v];
      if (pass == side.passes - 1) turned.put(sums[0], unit, hidden);
      else memcpy(memory.partial + 4 * unit * NV, sums[0], sizeof sums[0]);
    }
}

template <int NV>
void dense_input(const char* in, const FewLayer& layer, const Side& side, int hidden, const FewMemory& memory) {
  const float* values = side.values;
  Turned<NV> turned{memory, {}};
  for (int first = 0; first < hidden; first += UNITS) {
    vec sums[UNITS][4][NV] = {};
    for (int u = 0; u < UNITS && first + u < hidden; ++u)
      for (int gate = 0; gate < 3; ++gate) begin<NV>(sums[u][gate], side, nullptr, 4 * (first + u) + gate);
    values = tile<NV, 2>(sums, in, values, layer.inputs);
    for (int u = 0; u < UNITS && first + u < hidden; ++u) turned.put(sums[u], first + u, hidden);
  }
}

// The products of BLOCKS blocks of units with the states before.
template <int BLOCKS>
inline const float* dense_states(vec (*sums)[3], const float* weights, const float* before, int hidden) {
  vec own[BLOCKS][3] = {};
  for (int k = 0; k < hidden; ++k, weights += BLOCKS * 3 * LANES) {
    const vec state = splat(before[k]);
    for (int b = 0; b < BLOCKS; ++b)
      for (int gate = 0; gate < 3; ++gate) own[b][gate] += ((const vec*)weights)[3 * b + gate] * state;
  }
  memcpy(sums, own, sizeof own);
  return weights;
}

// h' of a block of units from `unit` on. sums: r, z, q of the states; gates: r, z, n of the input.
inline void step_block(const vec* sums, const float* gates, const float* before, float* to, int unit,
                       const FewMemory& memory) {
  auto at = [unit](const float* row) { return *(const vec*)(row + unit); };
  const vec z = at(gates + memory.units) + sums[1], n = at(gates + 2 * memory.units);
  *(vec*)(to + unit) = new_state(at(gates) + sums[0], z, n, at(memory.bias) + sums[2], at(before));
}

inline void slots_step(const FewSide& side, const float* gates, const float* before, float* to, int hidden,
                       const FewMemory& memory) {
  const int groups = (hidden + COLUMNS - 1) / COLUMNS;
  const vec* values = (const vec*)side.states;
  const uint8_t* places = side.places;
  const int32_t* slots = side.slots;
  for (int unit = 0; unit < hidden; unit += LANES) {
    vec sums[3];
    for (int gate = 0; gate < 3; ++gate) {
      vec one = {}, two = {};
      for (int group = 0; group < groups; ++group) {
        const Columns columns(before + group * COLUMNS);
        int count = *slots++;
        for (; count >= 2; count -= 2, values += 2, places += 2 * LANES) {
          one += values[0] * columns.at(places);
          two += values[1] * columns.at(places + LANES);
        }
        if (count) one += *values++ * columns.at(places), places += LANES;
      }
      sums[gate] = one + two;
    }
    step_block(sums, gates, before, to, unit, memory);
  }
}

inline void blocks_step(const FewSide& side, const float* gates, const float* before, float* to, int hidden,
                        const FewMemory& memory) {
  const float* weights = side.states;
  for (int unit = 0; unit < hidden; unit += 2 * LANES) {
    const int blocks = hidden - unit > LANES ? 2 : 1;
    vec sums[2][3];
    weights = (blocks == 2 ? dense_states<2> : dense_states<1>)(sums, weights, before, hidden);
    for (int b = 0; b < blocks; ++b) step_block(sums[b], gates, before, to, unit + b * LANES, memory);
  }
}

struct FewSketch {
  const Sketches& all;
  const FewNet& net;
  int64_t sketch, points;
  FewMemory memory;

  void run() {
    const int hidden = net.head.hidden;
    const float* start = all.start + sketch * 8 * hidden;
    const int64_t row = 2 * memory.units;
    memset(memory.states, 0, (points + 2) * row * sizeof(float));
    read_in();
    for (int l = 0; l < net.layer_count; ++l) {
      if (l) turn_states();
      for (int reverse = 0; reverse < 2; ++reverse)
        run_side(net.layers[l], reverse, l ? nullptr : start + reverse * 4 * hidden);
    }
    read_out();
  }

  void read_in() {
    const int given = net.head.inputs - 2;
    float before[2] = {}, sum[2] = {};
    for (int64_t t = 0; t < up(points, WIDTH); ++t) {
      float* to = (float*)(memory.rows + t / WIDTH * memory.stride) + t % WIDTH;
      const float* x = all.x + (sketch * all.points + t) * given;
      for (int i = 0; i < given; ++i) to[i * WIDTH] = t < points ? x[i] : 0;
      for (int i = 0; i < 2; ++i) {
        const float now = to[i * WIDTH], growth = t || net.head.derived != GROWTH ? now - before[i] : 0;
        sum[i] += now;
        before[i] = now;
        to[(given + i) * WIDTH] = t >= points ? 0 : net.head.derived == SUM ? sum[i] : growth;
      }
    }
  }

  // The last layer's states into the next one's rows.
  void turn_states() {
    const int hidden = net.head.hidden;
    for (int64_t first = 0; first < points; first += LANES)
      for (int side = 0; side < 2; ++side)
        for (int unit = 0; unit < hidden; unit += LANES) {
          vec square[LANES];
          for (int i = 0; i < LANES; ++i)
            square[i] = first + i < points ? *(const vec*)(state(first + i, side) + unit) : vec{};
          transpose(square);
          char* to = memory.rows + first / WIDTH * memory.stride + first % WIDTH * sizeof(float);
          for (int i = 0; i < LANES && unit + i < hidden; ++i)
            *(vec*)(to + (side * hidden + unit + i) * ROW) = square[i];
        }
  }

  // t = -1 and t = points: zeros.
  float* state(int64_t t, int side) const { return memory.states + ((t + 1) * 2 + side) * memory.units; }

  // start: what stands for the biases in the first layer, which has the sketch's time and class in it; else null.
  void run_side(const FewLayer& layer, int reverse, const float* start) {
    const FewSide& side = layer.sides[reverse];
    const int hidden = net.head.hidden;
    Side input = side.input;
    if (start) input.bias = start;
    for (int unit = 0; unit < memory.units; ++unit) memory.bias[unit] = unit < hidden ? input.bias[4 * unit + 3] : 0;
    const int64_t chunks = up(points, WIDTH) / WIDTH;
    for (int64_t number = 0; number < chunks; ++number) {
      const int64_t chunk = reverse ? chunks - 1 - number : number, begin = chunk * WIDTH;
      const int count = (int)(points - begin < WIDTH ? points - begin : WIDTH);
      run_input(layer, input, memory.rows + chunk * memory.stride, count);
      for (int i = 0; i < count; ++i) {
        const int place = reverse ? count - 1 - i : i;
        const int64_t t = begin + place;
        const float *gates = memory.gates + place * 3 * memory.units, *before = state(reverse ? t + 1 : t - 1, reverse);
        (side.slots ? slots_step : blocks_step)(side, gates, before, state(t, reverse), hidden, memory);
      }
    }
  }

  void run_input(const FewLayer& layer, const Side& side, const char* in, int count) {
    const int hidden = net.head.hidden, used = (count + LANES - 1) / LANES;
    if (side.counts) {
      using Walk = void (*)(const char*, const Side&, int, const FewMemory&);
      constexpr Walk WALKS[] = {sparse_input<1>, sparse_input<2>, sparse_input<3>, sparse_input<4>};
      WALKS[used - 1](in, side, hidden, memory);
    } else {
      using Tiles = void (*)(const char*, const FewLayer&, const Side&, int, const FewMemory&);
      constexpr Tiles TILES[] = {dense_input<1>, dense_input<2>, dense_input<3>, dense_input<4>};
      TILES[used - 1](in, layer, side, hidden, memory);
    }
  }

  void read_out() {
    const int hidden = net.head.hidden, outputs = net.head.outputs;
    const int64_t row = 2 * memory.units;
    memset(memory.head, 0, outputs * row * sizeof(float));
    for (int i = 0; i < 2 * outputs; ++i)
      memcpy(memory.head + i * memory.units, net.head.weights + i * hidden, hidden * sizeof(float));
    for (int64_t t = 0; t < points; ++t)
      for (int out = 0; out < outputs; ++out) {
        const vec *states = (const vec*)state(t, 0), *weights = (const vec*)(memory.head + out * row);
        vec sum = {};
        for (int64_t i = 0; i < row / LANES; ++i) sum += states[i] * weights[i];
        all.y[(sketch * all.points + t) * outputs + out] = all.tail[sketch * outputs + out] + sum_of(sum);
      }
  }
};

}  // namespace
