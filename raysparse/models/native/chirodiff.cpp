// ChiroDiff's prediction with sparse weights. See raysparse/models/_sparse_chirodiff.py, which packs the weights and
// checks what is handed over: nothing is checked here.
//
// A chunk of sketches runs all layers alone. Its scratch memory has a row of `places` features per time step, and one
// of zeros before and after, from which the two directions start; a state is written where the next layer and the next
// time step read it. The sketches of a chunk are sorted, longest first: those still running are its first columns, and
// what lies in the other columns is 0.
#include "gru.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

struct Net {
  const Layer* layers;
  const float* head;  // [outputs, 2 h]
  int32_t layer_count, hidden, inputs, outputs;
  int64_t places;  // features of a time step in scratch memory
  int64_t last;    // bytes from a time step's first row to the last layer's states
};

struct Batch {
  const float* x;          // [sketches, points, inputs]
  const float* start;      // [sketches, 2, 4 h] sums of the first layer before its inputs by point
  const float* tail;       // [sketches, outputs] the same of the outputs
  float* y;                // [sketches, points, outputs]
  const int64_t* order;    // [sketches] longest first
  const int64_t* lengths;  // [sketches]
  int64_t sketches, points;
};

template <int NV>
inline void activate(const vec (*sums)[NV], const vec* before, vec* to, ivec running) {
  for (int v = 0; v < NV; ++v) {
    // h' = (1 - z) n + z h with z = 1 / (1 + z_), n = (1 - n_) / (1 + n_): one division for both
    const vec r = 1.f / (1.f + exp2(sums[0][v]));
    const vec z_ = exp2(sums[1][v]), n_ = exp2(sums[2][v] + r * sums[3][v]);
    const vec state = (z_ * (1.f - n_) + before[v] * (1.f + n_)) / ((1.f + z_) * (1.f + n_));
    to[v] = v == NV - 1 ? (vec)((ivec)state & running) : state;
  }
}

// A time step of one direction.
struct Now {
  const char* in;      // the layer's input
  char* to;            // the new states
  const char* next;    // the input of the time step that follows
  const float* start;  // of the first layer: its sums before any weight, [4 h, WIDTH]; else null
  ivec running;        // which lanes of the last vector are in use
};

template <int NV>
void sparse_step(const Now& now, const Layer& layer, const Side& side, int hidden) {
  const vec* before = (const vec*)(now.in + side.before);
  const int32_t *counts = side.counts, *offsets = side.offsets;
  const float* values = side.values;
  const int ahead = (layer.inputs + hidden - 1) / hidden;  // features
  for (int unit = 0; unit < hidden; ++unit, counts += 14) {
    vec sums[4][NV];
    for (int gate = 0; gate < 4; ++gate) begin<NV>(sums[gate], side, now.start, 4 * unit + gate);
    for (int i = 0; i < ahead; ++i)  // 5 to 9 % of the time: the order of the columns is none that the CPU foresees
      for (int v = 0; v < NV; ++v) __builtin_prefetch((const vec*)(now.next + (unit * ahead + i) * ROW) + v);
    share_all<NV, 2>(sums, now.in, offsets, values, counts);
    share_all<NV, 3>(sums, now.in, offsets, values, counts + 7);
    activate<NV>(sums, before + unit * VECTORS, (vec*)now.to + unit * VECTORS, now.running);
  }
}

template <int NV>
void dense_step(const Now& now, const Layer& layer, const Side& side, int hidden) {
  const vec* before = (const vec*)(now.in + side.before);
  const float* values = side.values;
  for (int first = 0; first < hidden; first += UNITS) {
    const int units = hidden - first < UNITS ? hidden - first : UNITS;
    vec sums[UNITS][4][NV] = {};
    for (int u = 0; u < units; ++u)
      for (int gate = 0; gate < 4; ++gate) begin<NV>(sums[u][gate], side, now.start, 4 * (first + u) + gate);
    values = tile<NV, 2>(sums, now.in, values, layer.inputs);
    values = tile<NV, 3>(sums, (const char*)before, values, hidden);
    for (int u = 0; u < units; ++u)
      activate<NV>(sums[u], before + (first + u) * VECTORS, (vec*)now.to + (first + u) * VECTORS, now.running);
  }
}

using Step = void (*)(const Now&, const Layer&, const Side&, int);
constexpr Step SPARSE[] = {sparse_step<1>, sparse_step<2>}, DENSE[] = {dense_step<1>, dense_step<2>};

struct Scratch {
  float *starts, *tails;  // [2, 4 h, WIDTH], [outputs, WIDTH]
  char* rows;             // of time step 0
  int64_t stride;         // bytes of a time step

  Scratch(const Net& net, char* memory) {
    stride = net.places * ROW;
    starts = (float*)memory;
    tails = starts + 8ll * net.hidden * WIDTH;
    rows = (char*)(tails + net.outputs * WIDTH) + stride;
  }
};

int64_t scratch_of(const Net& net, int64_t points) {
  return (8ll * net.hidden + net.outputs + (points + 2) * net.places) * ROW;
}

void fill(const Net& net, const Batch& batch, const int64_t* order, int count, int64_t steps, const Scratch& at) {
  memset(at.rows - at.stride, 0, at.stride);
  memset(at.rows + steps * at.stride, 0, at.stride);
  for (int lane = 0; lane < WIDTH; ++lane) {
    const bool used = lane < count;
    const int64_t sketch = used ? order[lane] : 0, length = used ? batch.lengths[sketch] : 0;
    for (int i = 0; i < 8 * net.hidden; ++i)
      at.starts[i * WIDTH + lane] = used ? batch.start[sketch * 8 * net.hidden + i] : 0;
    for (int i = 0; i < net.outputs; ++i)
      at.tails[i * WIDTH + lane] = used ? batch.tail[sketch * net.outputs + i] : 0;
    const float* x = batch.x + sketch * batch.points * net.inputs;
    for (int64_t t = 0; t < steps; ++t)
      for (int i = 0; i < net.inputs; ++i)
        ((float*)(at.rows + t * at.stride))[i * WIDTH + lane] = t < length ? x[t * net.inputs + i] : 0;
  }
}

void run_side(const Net& net, const Layer& layer, int reverse, const int* running, int64_t steps, const Scratch& at,
              const float* start) {
  const Side& side = layer.sides[reverse];
  int used = 0;  // vectors of the time step before
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t t = reverse ? steps - 1 - k : k;
    char* row = at.rows + t * at.stride;
    const int vectors = (running[t] + LANES - 1) / LANES;
    Now now = {row + layer.from, row + side.to, row + layer.from + (reverse ? -at.stride : at.stride), start, {}};
    for (int j = 0; j < LANES; ++j) now.running[j] = (vectors - 1) * LANES + j < running[t] ? -1 : 0;
    if (reverse && k && vectors > used)  // sketches whose last point this is start from 0
      for (int unit = 0; unit < net.hidden; ++unit)
        memset(row + at.stride + side.to + unit * ROW + used * sizeof(vec), 0, (vectors - used) * sizeof(vec));
    used = vectors;
    (side.counts ? SPARSE : DENSE)[vectors - 1](now, layer, side, net.hidden);
  }
}

void read_out(const Net& net, const Batch& batch, const int64_t* order, const int* running, int64_t steps,
              const Scratch& at) {
  for (int64_t t = 0; t < steps; ++t) {
    const vec* states = (const vec*)(at.rows + t * at.stride + net.last);
    for (int out = 0; out < net.outputs; ++out) {
      const float* weights = net.head + out * 2 * net.hidden;
      union { vec sums[VECTORS]; float lanes[WIDTH]; };
      for (int v = 0; v < VECTORS; ++v) sums[v] = ((const vec*)(at.tails + out * WIDTH))[v];
      for (int j = 0; j < 2 * net.hidden; ++j)
        for (int v = 0; v < VECTORS; ++v) sums[v] += weights[j] * states[j * VECTORS + v];
      for (int lane = 0; lane < running[t]; ++lane)
        batch.y[(order[lane] * batch.points + t) * net.outputs + out] = lanes[lane];
    }
  }
}

void run_chunk(const Net& net, const Batch& batch, int64_t first, int count, char* memory) {
  const int64_t* order = batch.order + first;
  const int64_t steps = batch.lengths[order[0]];
  const Scratch at(net, memory);
  fill(net, batch, order, count, steps, at);
  std::vector<int> running(steps);
  for (int64_t t = 0, left = count; t < steps; ++t) {
    while (batch.lengths[order[left - 1]] <= t) --left;
    running[t] = (int)left;
  }
  for (int l = 0; l < net.layer_count; ++l)
    for (int reverse = 0; reverse < 2; ++reverse)
      run_side(net, net.layers[l], reverse, running.data(), steps, at,
               l ? nullptr : at.starts + reverse * 4ll * net.hidden * WIDTH);
  read_out(net, batch, order, running.data(), steps, at);
}

}  // namespace

extern "C" {

int32_t raysparse_units() { return UNITS; }
int32_t raysparse_width() { return WIDTH; }

// Bytes of scratch memory that each thread needs, a multiple of a vector's.
int64_t raysparse_scratch(const Net* net, int64_t points) { return scratch_of(*net, points); }

// memory: `threads` times raysparse_scratch, on a boundary of 64 bytes. y must be 0 where it shall be beyond the ends.
void raysparse_predict(const Net* net, const Batch* batch, char* memory, int32_t threads) {
  // Where there are too few sketches for all threads, two threads with half a chunk each are faster.
  const int64_t size = batch->sketches >= WIDTH * (int64_t)threads ? WIDTH : LANES;
  const int64_t each = scratch_of(*net, batch->points);
  std::atomic<int64_t> next{0};
  auto work = [&](int thread) {
    for (int64_t first; (first = size * next++) < batch->sketches;) {
      const int64_t left = batch->sketches - first;
      run_chunk(*net, *batch, first, (int)(left < size ? left : size), memory + thread * each);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < threads && size * thread < batch->sketches; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {  // the system gives no more threads: those there are do it all
  }
  work(0);
  for (auto& other : others) other.join();
}
}
