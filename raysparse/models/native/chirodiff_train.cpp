// A training step of ChiroDiff with sparse weights: the prediction, keeping what its gradient needs, and the gradient
// at the active weights only. See raysparse/models/_sparse_training.py, which packs and checks.
//
// A time step's row of a chunk has, beside the inputs and every layer's states, the gates of every layer and direction.
// What a chunk adds to the gradients of the weights lies apart from the others' and the caller sums it, in one order:
// the result does not depend on the number of threads.
#include "chunk.h"

namespace {

constexpr float UNSCALE = -0.34657359f;  // -ln(2) / 2: q was multiplied with -2 log2(e)

struct TrainSide {
  Side side;
  int64_t gates;  // bytes from a time step's row to the gates of this direction, [h, 4] features
  // The same weights by column, those of the state first, then those of the input.
  const int32_t* rows;     // [h + inputs + 1] where each column's begin
  const int32_t* places;   // [weights] bytes from the gradients of the gates, [h, 4] features
  const float* weights;    // [weights] not scaled
  float* d_values;         // [chunks, weights] in the order of `side.values`
  float* d_bias;           // [chunks, 4 h]; not for the first layer
};

struct TrainNet {
  const TrainSide* sides;  // [layers, 2]
  const int64_t* from;     // [layers] bytes from a time step's row to the layer's input
  const int32_t* widths;   // [layers] features of it
  Head head;
  int32_t layers;
  int64_t places;  // features of a time step's row
  int64_t most;    // weights of the direction that has most
};

struct Gradient {
  const float* d_y;  // [sketches, points, outputs]
  float* d_start;    // [sketches, 2, 4 h]
  float* d_tail;     // [sketches, outputs], 0 at first
  float* d_head;     // [chunks, outputs, 2 h], 0 at first
};

// So many time steps are added to the gradients of the weights at once. These are a vector for each weight, more than a
// second cache has, and their way there and back is what a step at a time waits for: the backward pass took 1.45 and 1.27
// times as long at h = 256, S = .5 and .9, 1.28 and 1.14 times at h = 96, as long at h = 48, S = .95 (an AMD EPYC; held
// to AVX2 1.25, 1.4, 1.15, 1.1, 1.0 times). Two or eight are up to 1.1 times slower, and so are weights by column in
// blocks of units whose gradients stay in the first cache.
constexpr int TOGETHER = 4;

// What one unit adds to the gradients of its weights: grads[k] += sum over time steps and sketches, lane by lane.
template <int NV, int GATES, int THIRD>
inline void add_share(const vec (*d)[4][NV], const char* const* base, const int32_t*& offsets, vec*& grads, int count) {
  constexpr int USES = (GATES & 1) + (GATES >> 1 & 1) + (GATES >> 2);
  if (!count) return;
  vec own[TOGETHER][USES][NV];  // in registers, for all that the compiler knows `grads` may be `d`
  for (int t = 0; t < TOGETHER; ++t)
    for (int v = 0; v < NV; ++v) {
      if constexpr (GATES & 1) own[t][0][v] = d[t][0][v];
      if constexpr (GATES & 2) own[t][GATES & 1][v] = d[t][1][v];
      if constexpr (GATES & 4) own[t][USES - 1][v] = d[t][THIRD][v];
    }
  for (int k = 0; k < count; ++k, grads += USES) {
    vec sums[USES];
    for (int use = 0; use < USES; ++use) sums[use] = grads[use];
    for (int t = 0; t < TOGETHER; ++t) {
      const vec* column = (const vec*)(base[t] + offsets[k]);
      for (int v = 0; v < NV; ++v) {
        vec one = column[v];
        if constexpr (USES > 1) in_register(one);
        for (int use = 0; use < USES; ++use) sums[use] += own[t][use][v] * one;
      }
    }
    for (int use = 0; use < USES; ++use) grads[use] = sums[use];
  }
  offsets += count;
}

template <int NV>
inline void add_all(const vec (*d)[4][NV], const char* const* base, const int32_t*& offsets, vec*& grads,
                    const int32_t* counts) {
  add_share<NV, 1, 2>(d, base, offsets, grads, counts[0]);
  add_share<NV, 2, 2>(d, base, offsets, grads, counts[1]);
  add_share<NV, 3, 2>(d, base, offsets, grads, counts[2]);
  add_share<NV, 4, 2>(d, base, offsets, grads, counts[3]);
  add_share<NV, 5, 2>(d, base, offsets, grads, counts[4]);
  add_share<NV, 6, 2>(d, base, offsets, grads, counts[5]);
  add_share<NV, 7, 2>(d, base, offsets, grads, counts[6]);
  add_share<NV, 4, 3>(d, base, offsets, grads, counts[7]);
  add_share<NV, 5, 3>(d, base, offsets, grads, counts[8]);
  add_share<NV, 6, 3>(d, base, offsets, grads, counts[9]);
  add_share<NV, 7, 3>(d, base, offsets, grads, counts[10]);
}

struct Grads {
  vec* carry;    // [h, WIDTH] of the state that the step before (in backward order) started from
  vec* gates;    // [TOGETHER, h, 4, WIDTH]
  vec* weights;  // [weights, LANES]
  vec* biases;   // [h, 4, WIDTH] sum over time
  char* out[2];  // [points, 2 h, WIDTH] of the layer's states, and of its input
};

// A time step of one direction, backward.
struct Back {
  const char* in;     // the layer's input
  const char* gates;  // r, z, n, q as the forward pass kept them
  const vec* d_out;   // the gradient of the states, without what later time steps give it
  vec* d_in;          // that of the layer's input; null where nobody wants it
  bool add;           // to what is in d_in
  ivec running;       // which lanes of the last vector are in use
  int inputs;
  vec* d_gates;       // [h, 4, WIDTH]
};

template <int NV>
void backward_step(const Back& now, const TrainSide& train, int hidden, const Grads& grads) {
  const vec* before = (const vec*)(now.in + train.side.before);
  for (int unit = 0; unit < hidden; ++unit) {
    const vec* gates = (const vec*)now.gates + 4 * unit * VECTORS;
    vec d[4][NV];
    for (int v = 0; v < NV; ++v) {
      const vec r = gates[v], z = gates[VECTORS + v], n = gates[2 * VECTORS + v];
      const vec q = gates[3 * VECTORS + v] * UNSCALE;
      vec state = now.d_out[unit * VECTORS + v] + grads.carry[unit * VECTORS + v];
      if (v == NV - 1) state = (vec)((ivec)state & now.running);
      d[2][v] = state * (1.f - z) * (1.f - n * n);
      d[1][v] = state * (before[unit * VECTORS + v] - n) * z * (1.f - z);
      d[3][v] = d[2][v] * r;
      d[0][v] = d[3][v] * q * (1.f - r);
      grads.carry[unit * VECTORS + v] = state * z;
      for (int gate = 0; gate < 4; ++gate) {
        now.d_gates[(4 * unit + gate) * VECTORS + v] = d[gate][v];
        grads.biases[(4 * unit + gate) * VECTORS + v] += d[gate][v];
      }
    }
  }
  const int32_t* rows = train.rows;
  for (int unit = 0; unit < hidden; ++unit, ++rows)
    walk<NV>(grads.carry + unit * VECTORS, (const char*)now.d_gates, train.places + rows[0], train.weights + rows[0],
             rows[1] - rows[0]);
  if (!now.d_in) return;
  for (int i = 0; i < now.inputs; ++i, ++rows) {
    vec sums[NV];
    for (int v = 0; v < NV; ++v) sums[v] = now.add ? now.d_in[i * VECTORS + v] : vec{};
    walk<NV>(sums, (const char*)now.d_gates, train.places + rows[0], train.weights + rows[0], rows[1] - rows[0]);
    for (int v = 0; v < NV; ++v) now.d_in[i * VECTORS + v] = sums[v];
  }
}

// Adds to the gradients of the weights what `steps` time steps do whose inputs are `in`, and whose gradients of the gates
// the first of grads.gates; steps that are missing to TOGETHER are zeros.
template <int NV>
void add_weights(const char* const* in, int steps, const TrainSide& train, int hidden, const Grads& grads) {
  const char* base[TOGETHER];
  for (int t = 0; t < TOGETHER; ++t) base[t] = in[t < steps ? t : 0];
  const int32_t *counts = train.side.counts, *offsets = train.side.offsets;
  vec* weights = grads.weights;
  vec d[TOGETHER][4][NV] = {};
  for (int unit = 0; unit < hidden; ++unit, counts += LISTS) {
    for (int t = 0; t < steps; ++t)
      for (int gate = 0; gate < 4; ++gate)
        for (int v = 0; v < NV; ++v) d[t][gate][v] = grads.gates[((t * hidden + unit) * 4 + gate) * VECTORS + v];
    add_all<NV>(d, base, offsets, weights, counts);
  }
}

using BackStep = void (*)(const Back&, const TrainSide&, int, const Grads&);
constexpr BackStep BACK[] = {backward_step<1>, backward_step<2>};
using AddWeights = void (*)(const char* const*, int, const TrainSide&, int, const Grads&);
constexpr AddWeights ADD_WEIGHTS[] = {add_weights<1>, add_weights<2>};
using Step = void (*)(const Now&, const Side&, int);
constexpr Step FORWARD[] = {sparse_step<1, true>, sparse_step<2, true>};

void forward_side(const TrainNet& net, int l, int reverse, const Chunk& chunk) {
  const TrainSide& train = net.sides[2 * l + reverse];
  const float* start = l ? nullptr : chunk.starts + reverse * 4ll * net.head.hidden * WIDTH;
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = reverse ? chunk.steps - 1 - k : k;
    char* row = chunk.rows + t * chunk.stride;
    const int used = chunk.vectors(t);
    const char* next = row + net.from[l] + (reverse ? -chunk.stride : chunk.stride);
    if (reverse) chunk.start_reverse(t, train.side.to, net.head.hidden);
    const ivec lanes = lanes_of(chunk.running[t], used);
    const Now now = {row + net.from[l], row + train.side.to, row + train.gates, next, start, lanes, net.widths[l], nullptr};
    FORWARD[used - 1](now, train.side, net.head.hidden);
  }
}

float sum_of(const float* values, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i];
  return sum;
}

void backward_side(const TrainNet& net, int l, int reverse, const Chunk& chunk, int64_t number,
                   const Gradient& gradient, const Grads& grads) {
  const int h = net.head.hidden;
  const TrainSide& train = net.sides[2 * l + reverse];
  const int64_t active = train.rows[h + net.widths[l]];
  memset(grads.carry, 0, h * ROW);
  memset(grads.biases, 0, 4 * h * ROW);
  memset(grads.weights, 0, active * sizeof(vec));
  const char* in[TOGETHER];
  int together = 0, used = 0;
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = reverse ? k : chunk.steps - 1 - k;
    if (together == TOGETHER || (together && used != chunk.vectors(t))) {
      ADD_WEIGHTS[used - 1](in, together, train, h, grads);
      together = 0;
    }
    const char* row = chunk.rows + t * chunk.stride;
    used = chunk.vectors(t);
    const vec* d_out = (const vec*)(grads.out[0] + (2 * t + reverse) * h * ROW);
    vec* d_in = l ? (vec*)(grads.out[1] + 2 * t * h * ROW) : nullptr;
    const ivec lanes = lanes_of(chunk.running[t], used);
    in[together] = row + net.from[l];
    vec* d_gates = grads.gates + 4 * h * VECTORS * together;
    const Back now = {in[together], row + train.gates, d_out, d_in, reverse == 1, lanes, net.widths[l], d_gates};
    BACK[used - 1](now, train, h, grads);
    ++together;
  }
  ADD_WEIGHTS[used - 1](in, together, train, h, grads);
  for (int64_t k = 0; k < active; ++k)
    train.d_values[number * active + k] = sum_of(grads.weights[k]);
  for (int i = 0; i < 4 * h; ++i) {
    const float* by_sketch = (const float*)grads.biases + i * WIDTH;
    if (l) train.d_bias[number * 4 * h + i] = sum_of(by_sketch, chunk.count);
    else
      for (int lane = 0; lane < chunk.count; ++lane)
        gradient.d_start[(chunk.order[lane] * 2 + reverse) * 4 * h + i] = by_sketch[lane];
  }
}

// From the gradient of y to those of the head, and of the last layer's states in d_states, [points, 2 h, WIDTH].
void read_back(const TrainNet& net, const Chunk& chunk, int64_t number, const Gradient& gradient, char* d_states) {
  const Head& head = net.head;
  const int wide = 2 * head.hidden;
  float* d_head = gradient.d_head + number * head.outputs * wide;
  for (int64_t t = 0; t < chunk.steps; ++t) {
    const vec* states = (const vec*)(chunk.rows + t * chunk.stride + head.last);
    vec* d = (vec*)(d_states + t * wide * ROW);
    const int used = chunk.vectors(t);
    memset(d, 0, wide * ROW);
    for (int out = 0; out < head.outputs; ++out) {
      union { vec d_y[VECTORS]; float lanes[WIDTH]; };
      for (int lane = 0; lane < WIDTH; ++lane) {
        const bool running = lane < chunk.running[t];
        const int64_t sketch = running ? chunk.order[lane] : 0;
        lanes[lane] = running ? gradient.d_y[(sketch * chunk.all.points + t) * head.outputs + out] : 0;
        if (running) gradient.d_tail[sketch * head.outputs + out] += lanes[lane];
      }
      for (int j = 0; j < wide; ++j) {
        vec sum = {};
        for (int v = 0; v < used; ++v) {
          d[j * VECTORS + v] += head.weights[out * wide + j] * d_y[v];
          sum += d_y[v] * states[j * VECTORS + v];
        }
        d_head[out * wide + j] += sum_of(sum);
      }
    }
  }
}

int64_t scratch_of(const TrainNet& net, int64_t points) {
  return ((5ll + 4 * TOGETHER) * net.head.hidden + 4 * points * net.head.hidden) * ROW + net.most * (int64_t)sizeof(vec);
}

Grads grads_in(const TrainNet& net, int64_t points, char* memory) {
  const int h = net.head.hidden;
  Grads grads;
  grads.carry = (vec*)memory;
  grads.gates = grads.carry + h * VECTORS;
  grads.biases = grads.gates + 4 * h * VECTORS * TOGETHER;
  grads.weights = grads.biases + 4 * h * VECTORS;
  grads.out[0] = (char*)(grads.weights + net.most);
  grads.out[1] = grads.out[0] + points * 2 * h * ROW;
  return grads;
}

int64_t kept_of(const TrainNet& net, int64_t points) { return (points + 2) * net.places * ROW + sums_of(net.head); }

// kept: the memory of all chunks, which the backward pass needs as the forward pass left it.
Chunk chunk_of(const TrainNet& net, const Sketches& all, char* kept, int64_t number) {
  char* mine = kept + number * kept_of(net, all.points);
  const int64_t stride = net.places * ROW;
  return Chunk(all, number * WIDTH, WIDTH, mine, stride, mine + (all.points + 2) * stride, net.head);
}

int64_t chunks_of(const Sketches& all) { return (all.sketches + WIDTH - 1) / WIDTH; }

}  // namespace

extern "C" {

int32_t raysparse_width() { return WIDTH; }

// Bytes, multiples of a vector's: what is kept of a chunk, and what each thread needs for the backward pass.
int64_t raysparse_kept(const TrainNet* net, int64_t points) { return kept_of(*net, points); }
int64_t raysparse_scratch(const TrainNet* net, int64_t points) { return scratch_of(*net, points); }

void raysparse_forward(const TrainNet* net, const Sketches* all, char* kept, int32_t threads) {
  over_threads(chunks_of(*all), threads, [&](int64_t number, int) {
    const Chunk chunk = chunk_of(*net, *all, kept, number);
    chunk.read_in(net->head);
    for (int l = 0; l < net->layers; ++l)
      for (int reverse = 0; reverse < 2; ++reverse) forward_side(*net, l, reverse, chunk);
    chunk.read_out(net->head);
  });
}

void raysparse_backward(const TrainNet* net, const Sketches* all, const Gradient* gradient, char* kept, char* scratch,
                        int32_t threads) {
  over_threads(chunks_of(*all), threads, [&](int64_t number, int thread) {
    const Chunk chunk = chunk_of(*net, *all, kept, number);
    Grads grads = grads_in(*net, all->points, scratch + thread * scratch_of(*net, all->points));
    read_back(*net, chunk, number, *gradient, grads.out[0]);
    for (int l = net->layers - 1; l >= 0; --l) {
      for (int reverse = 0; reverse < 2; ++reverse) backward_side(*net, l, reverse, chunk, number, *gradient, grads);
      std::swap(grads.out[0], grads.out[1]);
    }
  });
}
}
