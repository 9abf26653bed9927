// A training step of ChiroDiff with sparse weights: the prediction, keeping what its gradient needs, and the gradient at
// the active weights only. See raysparse/models/_sparse_training.py, which packs and checks.
//
// A time step's row of a chunk has, beside the inputs and every layer's states, the gates r, z, n, q of every layer and
// direction. What a chunk adds to the gradients of the weights lies apart from the others' and the caller sums it, in
// one order: the result does not depend on the number of threads.
#include "gru.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr float UNSCALE = -0.34657359f;  // -ln(2) / 2: q was multiplied with -2 log2(e)

struct TrainSide {
  Side side;
  int64_t kept;  // bytes from a time step's first row to the gates of this direction
  // The same weights by column, first those of the state, then those of the input: [h + inputs + 1], ...
  const int32_t* rows;
  const int32_t* places;  // bytes from the gradients of the gates, [h, 4] features
  const float* weights;   // not scaled
  float* d_values;        // [chunks, weights] in the order of `side.values`
  float* d_bias;          // [chunks, 4 h]; of the first layer: null
};

struct TrainNet {
  const TrainSide* sides;  // [layers, 2]
  const int64_t* from;     // [layers] bytes from a time step's first row to the layer's input
  const int32_t* widths;   // [layers] features of it
  const float* head;       // [outputs, 2 h]
  int32_t layers, hidden, inputs, outputs;
  int64_t places, last, most;  // most: weights of one direction
};

struct TrainBatch {
  const float *x, *start, *tail;
  float* y;
  const float* d_y;
  float *d_start, *d_tail, *d_head;  // [sketches, 2, 4 h], [sketches, outputs], [chunks, outputs, 2 h]
  const int64_t *order, *lengths;
  int64_t sketches, points;
  char* kept;     // [chunks, points + 2, places] features
  char* scratch;  // [threads, train_scratch]
};

template <int NV>
void forward_step(const char* in, char* to, char* kept, const char* next, const float* start, ivec running,
                  const Side& side, int inputs, int hidden) {
  const vec* before = (const vec*)(in + side.before);
  const int32_t *counts = side.counts, *offsets = side.offsets;
  const float* values = side.values;
  const int ahead = (inputs + hidden - 1) / hidden;
  for (int unit = 0; unit < hidden; ++unit, counts += 14) {
    vec sums[4][NV];
    for (int gate = 0; gate < 4; ++gate) begin<NV>(sums[gate], side, start, 4 * unit + gate);
    for (int i = 0; i < ahead; ++i)
      for (int v = 0; v < NV; ++v) __builtin_prefetch((const vec*)(next + (unit * ahead + i) * ROW) + v);
    share_all<NV, 2>(sums, in, offsets, values, counts);
    share_all<NV, 3>(sums, in, offsets, values, counts + 7);
    vec* gates = (vec*)kept + 4 * unit * VECTORS;
    for (int v = 0; v < NV; ++v) {
      const vec r = 1.f / (1.f + exp2(sums[0][v]));
      const vec z_ = exp2(sums[1][v]), n_ = exp2(sums[2][v] + r * sums[3][v]);
      const vec whole = 1.f / ((1.f + z_) * (1.f + n_));
      const vec state = (z_ * (1.f - n_) + before[unit * VECTORS + v] * (1.f + n_)) * whole;
      ((vec*)to)[unit * VECTORS + v] = v == NV - 1 ? (vec)((ivec)state & running) : state;
      gates[v] = r;
      gates[VECTORS + v] = (1.f + n_) * whole;
      gates[2 * VECTORS + v] = (1.f - n_) * (1.f + z_) * whole;
      gates[3 * VECTORS + v] = sums[3][v];
    }
  }
}

// The gradient of one column's weights: grads[k] += sum over the sketches, lane by lane.
template <int NV, int GATES, int THIRD>
inline void add_share(const vec (*d)[NV], const char* base, const int32_t*& offsets, vec*& grads, int count) {
  constexpr int USES = (GATES & 1) + (GATES >> 1 & 1) + (GATES >> 2);
  for (int k = 0; k < count; ++k, grads += USES) {
    const vec* one = (const vec*)(base + offsets[k]);
    vec* grad = grads;
    auto add = [&](const vec* gate) {
      vec sum = *grad;
      for (int v = 0; v < NV; ++v) sum += gate[v] * one[v];
      *grad++ = sum;
    };
    if constexpr (GATES & 1) add(d[0]);
    if constexpr (GATES & 2) add(d[1]);
    if constexpr (GATES & 4) add(d[THIRD]);
  }
  offsets += count;
}

template <int NV, int THIRD>
inline void add_all(const vec (*d)[NV], const char* base, const int32_t*& offsets, vec*& grads, const int32_t* counts) {
  add_share<NV, 1, THIRD>(d, base, offsets, grads, counts[0]);
  add_share<NV, 2, THIRD>(d, base, offsets, grads, counts[1]);
  add_share<NV, 3, THIRD>(d, base, offsets, grads, counts[2]);
  add_share<NV, 4, THIRD>(d, base, offsets, grads, counts[3]);
  add_share<NV, 5, THIRD>(d, base, offsets, grads, counts[4]);
  add_share<NV, 6, THIRD>(d, base, offsets, grads, counts[5]);
  add_share<NV, 7, THIRD>(d, base, offsets, grads, counts[6]);
}

struct Grads {
  vec* carry;    // [h, WIDTH] of the state that the step before (in backward order) started from
  vec* gates;    // [h, 4, WIDTH]
  vec* weights;  // [weights, LANES]
  vec* biases;   // [h, 4, WIDTH] sum over time
  char* out[2];  // [points, 2 h] of the layer's states, and of its input
};

// in, kept, d_out: of this time step; d_in: of its input, null where nobody wants it; add: to what is there.
template <int NV>
void backward_step(const char* in, const char* kept, const vec* d_out, vec* d_in, bool add, ivec running,
                   const TrainSide& train, int inputs, int hidden, const Grads& grads) {
  const vec* before = (const vec*)(in + train.side.before);
  const int32_t *counts = train.side.counts, *offsets = train.side.offsets;
  vec* weights = grads.weights;
  for (int unit = 0; unit < hidden; ++unit, counts += 14) {
    const vec* gates = (const vec*)kept + 4 * unit * VECTORS;
    vec d[4][NV];
    for (int v = 0; v < NV; ++v) {
      const vec r = gates[v], z = gates[VECTORS + v], n = gates[2 * VECTORS + v];
      const vec q = gates[3 * VECTORS + v] * UNSCALE;
      vec state = d_out[unit * VECTORS + v] + grads.carry[unit * VECTORS + v];
      if (v == NV - 1) state = (vec)((ivec)state & running);
      d[2][v] = state * (1.f - z) * (1.f - n * n);
      d[1][v] = state * (before[unit * VECTORS + v] - n) * z * (1.f - z);
      d[3][v] = d[2][v] * r;
      d[0][v] = d[3][v] * q * (1.f - r);
      grads.carry[unit * VECTORS + v] = state * z;
      for (int gate = 0; gate < 4; ++gate) {
        grads.gates[(4 * unit + gate) * VECTORS + v] = d[gate][v];
        grads.biases[(4 * unit + gate) * VECTORS + v] += d[gate][v];
      }
    }
    add_all<NV, 2>(d, in, offsets, weights, counts);
    add_all<NV, 3>(d, in, offsets, weights, counts + 7);
  }
  const int32_t* rows = train.rows;
  for (int unit = 0; unit < hidden; ++unit, ++rows)
    walk<NV>(grads.carry + unit * VECTORS, (const char*)grads.gates, train.places + rows[0], train.weights + rows[0],
             rows[1] - rows[0]);
  if (!d_in) return;
  for (int i = 0; i < inputs; ++i, ++rows) {
    vec sums[NV];
    for (int v = 0; v < NV; ++v) sums[v] = add ? d_in[i * VECTORS + v] : vec{};
    walk<NV>(sums, (const char*)grads.gates, train.places + rows[0], train.weights + rows[0], rows[1] - rows[0]);
    for (int v = 0; v < NV; ++v) d_in[i * VECTORS + v] = sums[v];
  }
}

ivec lanes_of(int running, int vectors) {
  ivec lanes;
  for (int j = 0; j < LANES; ++j) lanes[j] = (vectors - 1) * LANES + j < running ? -1 : 0;
  return lanes;
}

struct Chunk {
  const TrainNet& net;
  const TrainBatch& batch;
  int64_t number, stride, steps;
  int count;
  const int64_t* order;
  char* rows;
  std::vector<int> running;

  Chunk(const TrainNet& net, const TrainBatch& batch, int64_t number) : net(net), batch(batch), number(number) {
    const int64_t first = number * WIDTH, left = batch.sketches - first;
    count = (int)(left < WIDTH ? left : WIDTH);
    order = batch.order + first;
    steps = batch.lengths[order[0]];
    stride = net.places * ROW;
    rows = batch.kept + number * (batch.points + 2) * stride + stride;
    running.resize(steps);
    for (int64_t t = 0, left = count; t < steps; ++t) {
      while (batch.lengths[order[left - 1]] <= t) --left;
      running[t] = (int)left;
    }
  }
  int vectors(int64_t t) const { return (running[t] + LANES - 1) / LANES; }

  void forward(char* scratch) const {
    const int h = net.hidden;
    float *starts = (float*)scratch, *tails = starts + 8ll * h * WIDTH;
    memset(rows - stride, 0, stride);
    memset(rows + steps * stride, 0, stride);
    for (int lane = 0; lane < WIDTH; ++lane) {
      const bool used = lane < count;
      const int64_t sketch = used ? order[lane] : 0, length = used ? batch.lengths[sketch] : 0;
      for (int i = 0; i < 8 * h; ++i) starts[i * WIDTH + lane] = used ? batch.start[sketch * 8 * h + i] : 0;
      for (int i = 0; i < net.outputs; ++i) tails[i * WIDTH + lane] = used ? batch.tail[sketch * net.outputs + i] : 0;
      const float* x = batch.x + sketch * batch.points * net.inputs;
      for (int64_t t = 0; t < steps; ++t)
        for (int i = 0; i < net.inputs; ++i)
          ((float*)(rows + t * stride))[i * WIDTH + lane] = t < length ? x[t * net.inputs + i] : 0;
    }
    for (int l = 0; l < net.layers; ++l)
      for (int reverse = 0; reverse < 2; ++reverse) forward_side(l, reverse, l ? nullptr : starts + reverse * 4ll * h * WIDTH);
    for (int64_t t = 0; t < steps; ++t) {
      const vec* states = (const vec*)(rows + t * stride + net.last);
      for (int out = 0; out < net.outputs; ++out) {
        const float* weights = net.head + out * 2 * h;
        union { vec sums[VECTORS]; float lanes[WIDTH]; };
        for (int v = 0; v < VECTORS; ++v) sums[v] = ((const vec*)(tails + out * WIDTH))[v];
        for (int j = 0; j < 2 * h; ++j)
          for (int v = 0; v < VECTORS; ++v) sums[v] += weights[j] * states[j * VECTORS + v];
        for (int lane = 0; lane < running[t]; ++lane)
          batch.y[(order[lane] * batch.points + t) * net.outputs + out] = lanes[lane];
      }
    }
  }

  // Whole vectors beyond those in use are 0 too: the gradient of the weights reads what the head and later layers left.
  void forward_side(int l, int reverse, const float* start) const {
    const TrainSide& train = net.sides[2 * l + reverse];
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = reverse ? steps - 1 - k : k;
      char* row = rows + t * stride;
      const int used = vectors(t);
      for (int v = used; v < VECTORS; ++v)
        for (int unit = 0; unit < net.hidden; ++unit) memset(row + train.side.to + unit * ROW + v * sizeof(vec), 0, sizeof(vec));
      constexpr auto STEPS = [] { struct { decltype(&forward_step<1>) of[2]; } s = {{forward_step<1>, forward_step<2>}}; return s; }();
      STEPS.of[used - 1](row + net.from[l], row + train.side.to, row + train.kept, row + net.from[l] + (reverse ? -stride : stride),
                    start, lanes_of(running[t], used), train.side, net.widths[l], net.hidden);
    }
  }

  void backward(char* scratch) const {
    const int h = net.hidden;
    Grads g;
    g.carry = (vec*)scratch;
    g.gates = g.carry + h * VECTORS;
    g.biases = g.gates + 4 * h * VECTORS;
    g.weights = g.biases + 4 * h * VECTORS;
    g.out[0] = (char*)(g.weights + net.most);
    g.out[1] = g.out[0] + batch.points * 2 * h * ROW;
    read_back(g);
    for (int l = net.layers - 1; l >= 0; --l) {
      for (int reverse = 0; reverse < 2; ++reverse) backward_side(l, reverse, g);
      char* swap = g.out[0]; g.out[0] = g.out[1]; g.out[1] = swap;
    }
  }

  void read_back(const Grads& g) const {
    const int h = net.hidden;
    std::vector<float> head((size_t)net.outputs * 2 * h * LANES, 0.f);
    for (int64_t t = 0; t < steps; ++t) {
      const vec* states = (const vec*)(rows + t * stride + net.last);
      vec* d_states = (vec*)(g.out[0] + t * 2 * h * ROW);
      for (int i = 0; i < 2 * h * VECTORS; ++i) d_states[i] = vec{};
      for (int out = 0; out < net.outputs; ++out) {
        union { vec d[VECTORS]; float lanes[WIDTH]; };
        for (int lane = 0; lane < WIDTH; ++lane) {
          lanes[lane] = lane < running[t] ? batch.d_y[(order[lane] * batch.points + t) * net.outputs + out] : 0;
          if (lane < running[t]) batch.d_tail[order[lane] * net.outputs + out] += lanes[lane];
        }
        const float* weights = net.head + out * 2 * h;
        for (int j = 0; j < 2 * h; ++j) {
          vec sum = {};
          for (int v = 0; v < VECTORS; ++v) {
            d_states[j * VECTORS + v] += weights[j] * d[v];
            sum += d[v] * states[j * VECTORS + v];
          }
          float* at = &head[((size_t)out * 2 * h + j) * LANES];
          for (int lane = 0; lane < LANES; ++lane) at[lane] += sum[lane];
        }
      }
    }
    float* d_head = batch.d_head + number * net.outputs * 2 * h;
    for (int i = 0; i < net.outputs * 2 * h; ++i) {
      float sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += head[(size_t)i * LANES + lane];
      d_head[i] = sum;
    }
  }

  void backward_side(int l, int reverse, const Grads& g) const {
    const int h = net.hidden;
    const TrainSide& train = net.sides[2 * l + reverse];
    const int64_t active = train.rows[h + net.widths[l]];
    memset(g.carry, 0, h * ROW);
    memset(g.biases, 0, 4 * h * ROW);
    memset(g.weights, 0, active * sizeof(vec));
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = reverse ? k : steps - 1 - k;
      const char* row = rows + t * stride;
      const int used = vectors(t);
      const vec* d_out = (const vec*)(g.out[0] + (t * 2 + reverse) * h * ROW);
      vec* d_in = l ? (vec*)(g.out[1] + t * 2 * h * ROW) : nullptr;
      constexpr auto STEPS = [] { struct { decltype(&backward_step<1>) of[2]; } s = {{backward_step<1>, backward_step<2>}}; return s; }();
      STEPS.of[used - 1](row + net.from[l], row + train.kept, d_out, d_in, reverse, lanes_of(running[t], used), train,
                    net.widths[l], h, g);
    }
    float* d_values = train.d_values + number * active;
    for (int64_t k = 0; k < active; ++k) {
      float sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += g.weights[k][lane];
      d_values[k] = sum;
    }
    const float* biases = (const float*)g.biases;
    for (int i = 0; i < 4 * h; ++i) {
      float sum = 0;
      for (int lane = 0; lane < count; ++lane) {
        sum += biases[i * WIDTH + lane];
        if (!l) batch.d_start[(order[lane] * 2 + reverse) * 4 * h + i] = biases[i * WIDTH + lane];
      }
      if (l) train.d_bias[number * 4 * h + i] = sum;
    }
  }
};

int64_t scratch_of(const TrainNet& net, int64_t points) {
  const int64_t ahead = (8ll * net.hidden + net.outputs) * ROW;
  const int64_t back = (9ll * net.hidden + 4 * points * net.hidden) * ROW + net.most * (int64_t)sizeof(vec);
  return ahead > back ? ahead : back;
}

template <class Work>
void each_chunk(const TrainNet& net, const TrainBatch& batch, int threads, Work work) {
  const int64_t chunks = (batch.sketches + WIDTH - 1) / WIDTH, scratch = scratch_of(net, batch.points);
  std::atomic<int64_t> next{0};
  auto run = [&](int thread) {
    for (int64_t number; (number = next++) < chunks;) work(Chunk(net, batch, number), batch.scratch + thread * scratch);
  };
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < threads && thread < chunks; ++thread) others.emplace_back(run, thread);
  } catch (const std::system_error&) {
  }
  run(0);
  for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

int32_t raysparse_width() { return WIDTH; }
int64_t raysparse_train_scratch(const TrainNet* net, int64_t points) { return scratch_of(*net, points); }

void raysparse_forward(const TrainNet* net, const TrainBatch* batch, int32_t threads) {
  each_chunk(*net, *batch, threads, [](const Chunk& chunk, char* scratch) { chunk.forward(scratch); });
}

void raysparse_backward(const TrainNet* net, const TrainBatch* batch, int32_t threads) {
  each_chunk(*net, *batch, threads, [](const Chunk& chunk, char* scratch) { chunk.backward(scratch); });
}
}
