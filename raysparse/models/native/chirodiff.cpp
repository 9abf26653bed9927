// ChiroDiff's prediction with sparse weights. See raysparse/models/_sparse_chirodiff.py, which packs the weights and
// checks what is handed over: nothing is checked here. A chunk of sketches runs all layers alone, and a layer reads
// where the one before it wrote, in a row of two places in turn.
#define RAYSPARSE_VECTORS 4
#include "few.h"

namespace {

struct Layer {
  Side sides[2];   // forward, reverse
  int64_t from;    // bytes from a time step's row to the layer's input
  int32_t inputs;  // features
};

struct Net {
  const Layer* layers;
  Head head;
  int32_t layer_count;
  int64_t places;  // features of a time step's row
};

template <int NV>
void dense_step(const Now& now, const Side& side, int hidden) {
  const vec* before = (const vec*)(now.in + side.before);
  const float* values = side.values;
  vec block[BLOCK][4][NV];
  for (int first = 0; first < hidden; first += UNITS) {
    const int units = hidden - first < UNITS ? hidden - first : UNITS;
    vec sums[UNITS][4][NV] = {};
    for (int u = 0; u < units; ++u)
      for (int gate = 0; gate < 4; ++gate) begin<NV>(sums[u][gate], side, now.start, 4 * (first + u) + gate);
    values = tile<NV, 2>(sums, now.in, values, now.inputs);
    values = tile<NV, 3>(sums, (const char*)before, values, hidden);
    const int place = first % BLOCK;
    memcpy(block[place], sums, units * sizeof(sums[0]));
    if (place + units == BLOCK || first + units == hidden)
      activate_all<NV, false>(block, before, now, first - place, place + units);
  }
}

using Step = void (*)(const Now&, const Side&, int);
constexpr Step SPARSE[] = {sparse_step<1, false>, sparse_step<2, false>, sparse_step<3, false>, sparse_step<4, false>};
constexpr Step DENSE[] = {dense_step<1>, dense_step<2>, dense_step<3>, dense_step<4>};

void run_side(const Layer& layer, int reverse, int hidden, const Chunk& chunk, const float* start, vec* partial) {
  const Side& side = layer.sides[reverse];
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = reverse ? chunk.steps - 1 - k : k;
    char* row = chunk.rows + t * chunk.stride;
    const int used = chunk.vectors(t);
    const char* next = row + layer.from + (reverse ? -chunk.stride : chunk.stride);
    if (reverse) chunk.start_reverse(t, side.to, hidden);
    const ivec lanes = lanes_of(chunk.running[t], used);
    const Now now = {row + layer.from, row + side.to, nullptr, next, start, lanes, layer.inputs, partial};
    (side.counts ? SPARSE : DENSE)[used - 1](now, side, hidden);
  }
}

int64_t rows_of(const Net& net, int64_t points) { return (points + 2) * net.places * ROW; }

int64_t scratch_of(const Net& net, int64_t points) {
  return rows_of(net, points) + 4ll * net.head.hidden * ROW + sums_of(net.head);
}

}  // namespace

extern "C" {

int32_t raysparse_units() { return UNITS; }
int32_t raysparse_width() { return WIDTH; }

int32_t raysparse_lanes() { return LANES; }
int32_t raysparse_columns() { return COLUMNS; }

int32_t raysparse_features_in_cache() { return features_in_cache(); }

// Bytes of memory that each thread needs, a multiple of a vector's.
int64_t raysparse_scratch(const Net* net, int64_t points) { return scratch_of(*net, points); }

// memory: `threads` times raysparse_scratch, on a boundary of 64 bytes. y must be 0 where it shall be beyond the ends.
void raysparse_predict(const Net* net, const Sketches* all, char* memory, int32_t threads) {
  // As many sketches for each thread, in whole vectors.
  const int64_t share = (all->sketches + LANES * threads - 1) / (LANES * threads) * LANES;
  const int64_t size = share < WIDTH ? share : WIDTH;
  const int64_t each = scratch_of(*net, all->points), stride = net->places * ROW;
  over_threads((all->sketches + size - 1) / size, threads, [&](int64_t number, int thread) {
    char* mine = memory + thread * each;
    vec* partial = (vec*)(mine + rows_of(*net, all->points));
    char* sums = (char*)partial + 4ll * net->head.hidden * ROW;
    const Chunk chunk(*all, number * size, size, mine, stride, sums, net->head);
    chunk.read_in(net->head);
    for (int l = 0; l < net->layer_count; ++l)
      for (int reverse = 0; reverse < 2; ++reverse)
        run_side(net->layers[l], reverse, net->head.hidden, chunk,
                 l ? nullptr : chunk.starts + reverse * 4ll * net->head.hidden * WIDTH, partial);
    chunk.read_out(net->head);
  });
}

int64_t raysparse_few_scratch(const FewNet* net, int64_t points) {
  FewMemory memory;
  return lay_out(*net, points, nullptr, memory);
}

// As raysparse_predict.
void raysparse_predict_few(const FewNet* net, const Sketches* all, char* memory, int32_t threads) {
  const int64_t each = raysparse_few_scratch(net, all->points);
  over_threads(all->sketches, threads, [&](int64_t number, int thread) {
    const int64_t sketch = all->order[number];
    FewSketch one{*all, *net, sketch, all->lengths[sketch], {}};
    lay_out(*net, all->points, memory + thread * each, one.memory);
    one.run();
  });
}
}
