// What prediction and training share around the layers: sketches in chunks, and chunks over threads.
//
// A chunk's memory has a row of features per time step, and one of zeros before and after, from which the two
// directions start; a state is written where the next layer and the next time step read it. The sketches of a chunk are
// sorted, longest first: those still running are its first columns, and what lies in the other columns is 0.
#pragma once
#include "gru.h"
#include "threads.h"

#include <utility>
#include <vector>

namespace {

struct Sketches {
  const float* x;          // [sketches, points, inputs - 2]; the last two inputs are derived from the first two
  const float* start;      // [sketches, 2, 4 h] sums of the first layer before its inputs by point
  const float* tail;       // [sketches, outputs] the same of the outputs
  float* y;                // [sketches, points, outputs]
  const int64_t* order;    // [sketches] longest first
  const int64_t* lengths;  // [sketches]
  int64_t sketches, points;
};

enum Derived : int32_t {  // from the first two inputs
  GROWTH,             // by how much they grow, from the point before on; 0 at the first point
  GROWTH_FROM_START,  // from 0 on
  SUM,                // up to the point
};

struct Head {
  const float* weights;  // [outputs, 2 h]
  int32_t hidden, inputs, outputs;
  Derived derived;  // the last two inputs
  int64_t last;  // bytes from a time step's row to the last layer's states
};

inline ivec lanes_of(int running, int vectors) {
  ivec lanes;
  for (int j = 0; j < LANES; ++j) lanes[j] = (vectors - 1) * LANES + j < running ? -1 : 0;
  return lanes;
}

// Bytes of the first layer's and the outputs' sums of a chunk.
inline int64_t sums_of(const Head& head) { return (8ll * head.hidden + head.outputs) * ROW; }

struct Chunk {
  const Sketches& all;
  const int64_t* order;  // its sketches, longest first
  int count;
  int64_t steps;  // points of the longest
  std::vector<int> running;  // sketches at each time step
  char* rows;      // of time step 0
  int64_t stride;  // bytes of a row
  float *starts, *tails;  // [2, 4 h, WIDTH], [outputs, WIDTH]

  // rows: `points` + 2 of them; sums: sums_of bytes
  Chunk(const Sketches& all, int64_t first, int64_t size, char* memory, int64_t stride, char* sums, const Head& head)
      : all(all), order(all.order + first), rows(memory + stride), stride(stride) {
    const int64_t left = all.sketches - first;
    count = (int)(left < size ? left : size);
    steps = all.lengths[order[0]];
    running.resize(steps);
    for (int64_t t = 0, now = count; t < steps; ++t) {
      while (all.lengths[order[now - 1]] <= t) --now;
      running[t] = (int)now;
    }
    starts = (float*)sums;
    tails = starts + 8ll * head.hidden * WIDTH;
  }

  int vectors(int64_t t) const { return (running[t] + LANES - 1) / LANES; }

  void read_in(const Head& head) const {
    memset(rows - stride, 0, stride);
    memset(rows + steps * stride, 0, stride);
    // All sketches of a feature, then the next: the rows lie too far apart to be walked once for each sketch.
    const int sums = 8 * head.hidden, outputs = head.outputs, given = head.inputs - 2;
    for (int i = 0; i < sums; ++i)
      for (int lane = 0; lane < WIDTH; ++lane)
        starts[i * WIDTH + lane] = lane < count ? all.start[order[lane] * sums + i] : 0;
    for (int i = 0; i < outputs; ++i)
      for (int lane = 0; lane < WIDTH; ++lane)
        tails[i * WIDTH + lane] = lane < count ? all.tail[order[lane] * outputs + i] : 0;
    for (int64_t t = 0; t < steps; ++t) {
      float *row = (float*)(rows + t * stride), *derived = row + given * WIDTH;
      const float *before = row - stride / sizeof(float), *derived_before = derived - stride / sizeof(float);
      for (int lane = 0; lane < WIDTH; ++lane)
        for (int i = 0; i < given; ++i)
          row[i * WIDTH + lane] = lane < running[t] ? all.x[(order[lane] * all.points + t) * given + i] : 0;
      const bool any = t || head.derived != GROWTH;
      for (int i = 0; i < 2 * WIDTH; ++i) {
        const float value = head.derived == SUM ? derived_before[i] + row[i] : row[i] - before[i];
        derived[i] = any && i % WIDTH < running[t] ? value : 0;
      }
    }
  }

  void read_out(const Head& head) const {
    for (int64_t t = 0; t < steps; ++t)
      for (int first = 0, used = vectors(t); first < used; first += 2)
        first + 1 == used ? read_out<1>(head, t, first) : read_out<2>(head, t, first);
  }

  template <int NV>
  void read_out(const Head& head, int64_t t, int first) const {
    const vec* states = (const vec*)(rows + t * stride + head.last) + first;
    const float* weights = head.weights;
    for (int out = 0; out < head.outputs; ++out, weights += 2 * head.hidden) {
      union { vec sums[NV]; float lanes[NV * LANES]; };
      vec second[NV] = {};
      for (int v = 0; v < NV; ++v) sums[v] = ((const vec*)(tails + out * WIDTH))[first + v];
      for (int j = 0; j < 2 * head.hidden; j += 2)
        for (int v = 0; v < NV; ++v) {
          sums[v] += weights[j] * states[j * VECTORS + v];
          second[v] += weights[j + 1] * states[(j + 1) * VECTORS + v];
        }
      for (int v = 0; v < NV; ++v) sums[v] += second[v];
      for (int lane = 0, left = running[t] - first * LANES; lane < NV * LANES && lane < left; ++lane)
        all.y[(order[first * LANES + lane] * all.points + t) * head.outputs + out] = lanes[lane];
    }
  }

  // Sketches whose last point this is start the reverse direction from 0. to: bytes from a row to the states of a side.
  void start_reverse(int64_t t, int64_t to, int hidden) const {
    if (t + 1 >= steps) return;  // the row of zeros
    const int used = vectors(t + 1), now = vectors(t);
    if (now > used)
      for (int unit = 0; unit < hidden; ++unit)
        memset(rows + (t + 1) * stride + to + unit * ROW + used * sizeof(vec), 0, (now - used) * sizeof(vec));
  }
};

}  // namespace
