// Products of sparse weights with many columns: a linear layer over tokens, a convolution over the pixels of an image.
// See raysparse/models/_sparse_products.py, which packs the weights and checks what is handed over: nothing is checked
// here.
//
// WIDTH columns (tokens or pixels) are a chunk, and lie side by side: each weight is then one number times four of the
// CPU's vectors, wherever it stands in its row, so that every pattern is as fast as any other. With four, a linear layer
// of 512 x 1,536 is 1.0 to 1.15 times faster than with two, a 3x3 convolution 1.15 to 1.28 times; with AVX2, 1.14 to
// 1.23 and 1.21 to 1.25 times. Rows are walked block by block of their inputs, whose columns of a chunk stay in the
// first cache meanwhile. With AVX-512 these are 128 inputs of 32 KiB (AMD) or 192 of 48 (Intel). On the former 192 are
// .91 to 1.03 times as fast at density .5 to .1, 256 .76 to 1.02, 96 .92 to 1.01.
#define RAYSPARSE_VECTORS 4
#include "blocks.h"
#include "gru.h"
#include "layout.h"
#include "threads.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace {

// A convolution's images are padded already. A linear layer's tokens are pixels, if they lie as those do.
struct Images {
  const float* x;  // [count, channels, height, width]
  float* y;        // [count, outputs, out_height * out_width]
  int64_t count, channels, height, width, out_height, out_width, kernel_height, kernel_width, down, across;
  int64_t by_token;  // whether y is [count, out_height * out_width, outputs]
};

struct Floats {
  static constexpr int IN_ONE = 1;  // columns side by side in the 32 bits of a float, where gradients are summed
  static vec weight(const float* value) { return splat(*value); }
  static void add(vec& sum, const vec& x, vec y) { sum += x * y; }
  static void add_loaded(vec& sum, vec x, vec y) { sum += x * y; }
};

// RHEL 8's GCC 8 comes with an assembler that does not know the instruction.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define RAYSPARSE_PAIRS 1
struct Pairs {
  static constexpr int IN_ONE = 2;
  static vec weight(const float* value) {
    int32_t bits;
    memcpy(&bits, value, sizeof bits);
    return (vec)(bits - ivec{});
  }
  // No intrinsic: that would need a flag of the compiler for a CPU that may not have the instruction.
  static void add(vec& sum, const vec& x, vec y) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(y), "m"(x)); }
  static void add_loaded(vec& sum, vec x, vec y) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(y), "v"(x)); }
};
#else
#define RAYSPARSE_PAIRS 0
typedef Floats Pairs;  // never used
#endif

#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int TILE_VECTORS = 2;  // of 16 registers: with four its sums, which are in memory then, take 1.4 times as long
#else
constexpr int TILE_VECTORS = 4;
#endif
constexpr int DEEP = 8 * LANES;  // floats of a chunk of which weights' gradients are summed: a row of dy is 8 vectors

// sums [weights] += for each weight, dy of its output times x of its input, over a chunk: in [inputs, DEEP], dy
// [outputs, DEEP]
template <class Product>
void add_gradients(const Layer& layer, const float* in, const float* dy, float* sums) {
  const int stride = (int)layer.tile;
  const int32_t* start = layer.starts;
  for (int64_t first = 0; first < layer.inputs; first += layer.block) {
    const char* base = (const char*)(in + first * DEEP);
    for (int64_t o = 0; o < layer.outputs; ++o) {
      vec of_output[8];
      memcpy(of_output, dy + o * DEEP, sizeof of_output);
      float* to = sums + o % stride;
      for (int32_t i = start[0]; i < start[1]; ++i) {
        const vec* x = (const vec*)(base + layer.offsets[i] * (DEEP / WIDTH));
        vec even = {}, odd = {};
        for (int v = 0; v < 8; v += 2)
          Product::add(even, x[v], of_output[v]), Product::add(odd, x[v + 1], of_output[v + 1]);
        to[stride * i] += sum_of(even + odd);
      }
      if (o % stride == stride - 1) ++start;
    }
  }
}

// out [outputs, WIDTH] += weights times in [inputs, WIDTH], of the first NV vectors
template <class Product, int NV>
void multiply_by(const Layer& layer, const float* in, float* out) {
  const int32_t* start = layer.starts;
  for (int64_t first = 0; first < layer.inputs; first += layer.block) {
    const char* base = (const char*)(in + first * WIDTH);
    for (int64_t o = 0; o < layer.outputs; ++o, ++start) {
      vec* y = (vec*)out + o * VECTORS;
      vec even[NV], odd[NV] = {};  // two sums: a product need not wait for the one before it
      for (int v = 0; v < NV; ++v) even[v] = y[v];
      int32_t i = start[0];
      for (; i + 2 <= start[1]; i += 2) {
        const vec* x = at(base + layer.offsets[i]);
        const vec* z = at(base + layer.offsets[i + 1]);
        const auto of_x = Product::weight(layer.values + i), of_z = Product::weight(layer.values + i + 1);
        for (int v = 0; v < NV; ++v) Product::add(even[v], x[v], of_x), Product::add(odd[v], z[v], of_z);
      }
      if (i < start[1])
        for (int v = 0; v < NV; ++v)
          Product::add(even[v], at(base + layer.offsets[i])[v], Product::weight(layer.values + i));
      for (int v = 0; v < NV; ++v) y[v] = even[v] + odd[v];
    }
  }
}

// The same of a layer that is tiled: an input is loaded once for TILE outputs, whose sums are as many as can wait for
// nothing. On an AMD EPYC, which loads one vector at a time, the products take 1.37 times less.
template <class Product, int NV>
void multiply_tiles(const Layer& layer, const float* in, float* out) {
  const int32_t* start = layer.starts;
  for (int64_t first = 0; first < layer.inputs; first += layer.block) {
    const char* base = (const char*)(in + first * WIDTH);
    for (int64_t o = 0; o < layer.outputs; o += TILE, ++start) {
      vec* y = (vec*)out + o * VECTORS;
      for (int32_t i = start[0]; i < start[1];) {
        const int32_t end = std::min(i + 128, start[1]);  // one sum of all inputs would round three times as much
        vec sums[TILE][NV] = {};
        for (; i < end; ++i) {
          const vec* x = at(base + layer.offsets[i]);
          vec weights[TILE];
          for (int k = 0; k < TILE; ++k) weights[k] = Product::weight(layer.values + TILE * i + k);
          for (int v = 0; v < NV; ++v) {
            vec loaded = x[v];
            in_register(loaded);
            for (int k = 0; k < TILE; ++k) Product::add_loaded(sums[k][v], loaded, weights[k]);
          }
        }
        for (int k = 0; k < TILE; ++k)
          for (int v = 0; v < NV; ++v) y[k * VECTORS + v] += sums[k][v];
      }
    }
  }
}

// out = weights times in, plus the bias
template <class Product, int NV>
void multiply_vectors(const Layer& layer, const float* in, float* out) {
  for (int64_t o = 0; o < layer.outputs; ++o)
    for (int v = 0; v < NV; ++v) ((vec*)out)[o * VECTORS + v] = splat(layer.bias[o]);
  if (layer.tile == 1) return multiply_by<Product, NV>(layer, in, out);
  if constexpr (Product::IN_ONE == 2)
    if (layer.tile == BLOCK_TILE) return multiply_blocks<NV>(layer, in, out);
  constexpr int FIRST = NV < TILE_VECTORS ? NV : TILE_VECTORS;
  multiply_tiles<Product, FIRST>(layer, in, out);
  if constexpr (FIRST < NV) multiply_tiles<Product, NV - FIRST>(layer, in + FIRST * LANES, out + FIRST * LANES);
}

// count: columns in use
template <class Product>
void multiply_with(const Layer& layer, const float* in, float* out, int64_t count) {
  switch ((count + LANES - 1) / LANES) {
    case 1: return multiply_vectors<Product, 1>(layer, in, out);
    case 2: return multiply_vectors<Product, 2>(layer, in, out);
    case 3: return multiply_vectors<Product, 3>(layer, in, out);
    default: return multiply_vectors<Product, 4>(layer, in, out);
  }
}

void multiply(const Layer& layer, const float* in, float* out, int64_t count) {
  return layer.pairs ? multiply_with<Pairs>(layer, in, out, count) : multiply_with<Floats>(layer, in, out, count);
}

// Of a square of LANES x LANES: swaps the upper right and the lower left corner of each square of 2 STEP.
template <int STEP, int... I>
inline void swap_corners(vec* rows, std::integer_sequence<int, I...> lanes) {
  if constexpr (STEP < LANES) {
    for (int r = 0; r < LANES; ++r)
      if (!(r & STEP)) {
        const vec upper = rows[r], lower = rows[r + STEP];
        rows[r] = PICK(upper, lower, (I & STEP ? LANES + I - STEP : I)...);
        rows[r + STEP] = PICK(upper, lower, (I & STEP ? LANES + I : I + STEP)...);
      }
    swap_corners<2 * STEP>(rows, lanes);
  }
}

// to[c * to_row + r] = from[r * from_row + c], in squares of whole vectors: with pieces of four y's lines were fetched
// four times, and a linear layer took 1.3 times as long at S = .9.
void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  int64_t r = 0;
  for (; r + LANES <= rows; r += LANES) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
      vec square[LANES];
      for (int k = 0; k < LANES; ++k) memcpy(&square[k], from + (r + k) * from_row + c, sizeof(vec));
      swap_corners<1>(square, std::make_integer_sequence<int, LANES>());
      for (int k = 0; k < LANES; ++k) memcpy(to + (c + k) * to_row + r, &square[k], sizeof(vec));
    }
    for (; c < columns; ++c)
      for (int k = 0; k < LANES; ++k) to[c * to_row + r + k] = from[(r + k) * from_row + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

// Rows of pairs [rows, 2 DEEP], the two numbers of a pair on top of each other: [2 rows, DEEP], columns t and t + LANES
// of every 2 LANES side by side.
void take_apart(float* pairs, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, pairs += 2 * DEEP) {
    ivec of_row[16], apart[16];
    memcpy(of_row, pairs, sizeof of_row);
    for (int v = 0; v < 8; ++v) {
      const ivec left = of_row[2 * v], right = of_row[2 * v + 1];
      apart[v] = (left & 0xffff) | (right << 16);
      apart[v + 8] = ((left >> 16) & 0xffff) | (right & ~0xffff);
    }
    memcpy(pairs, apart, sizeof apart);
  }
}

// rows [count, WIDTH] in pairs: [count / 2, WIDTH]
void put_beside(float* rows, int64_t count) {
  float* to = rows;
  for (int64_t r = 0; r < count; r += 2, rows += 2 * WIDTH, to += WIDTH) {
    vec both[2 * VECTORS];
    memcpy(both, rows, sizeof both);
    for (int v = 0; v < VECTORS; ++v) {
      const ivec found = ((rounded(both[v]) >> 16) & 0xffff) | (rounded(both[v + VECTORS]) & ~0xffff);
      memcpy(to + v * LANES, &found, sizeof found);
    }
  }
}

// A row of WIDTH numbers, one by one.
void halve(const float* row, uint16_t* halves) {
  uint32_t bits[WIDTH];
  for (int v = 0; v < VECTORS; ++v) {
    const ivec found = rounded(((const vec*)row)[v]);
    memcpy(bits + v * LANES, &found, sizeof found);
  }
  for (int k = 0; k < WIDTH; ++k) halves[k] = (uint16_t)(bits[k] >> 16);
}

struct Padded {
  int64_t planes, height, width, up, side;
};

template <class T>
void pair_images(const T* x, uint32_t* to, const Padded& images, int threads) {
  const int64_t wide = images.width + 2 * images.side, size = (images.height + 2 * images.up) * wide;
  over_threads(images.planes, threads, [&](int64_t plane, int) {
    uint32_t* out = to + plane * size;
    memset(out, 0, size * sizeof(uint32_t));
    out += images.up * wide + images.side;
    const T* even = x + 2 * plane * images.height * images.width;
    for (int64_t row = 0; row < images.height; ++row, even += images.width, out += wide) {
      const T* odd = even + images.height * images.width;
      for (int64_t k = 0; k < images.width; ++k) out[k] = half(even[k]) | half(odd[k]) << 16;
    }
  });
}

struct Run {
  int64_t from, to, length;  // pixels side by side in a row of an image: the first one's place in x, and its column
  int64_t out;               // its place in y
};

// Of the pixels that are a chunk, the images end to end.
std::vector<Run> runs_of(const Images& images, int64_t outputs, int64_t first, int64_t count) {
  const int64_t pixels = images.out_height * images.out_width;
  std::vector<Run> runs;
  for (int64_t t = 0, length; t < count; t += length) {
    const int64_t image = (first + t) / pixels, pixel = (first + t) % pixels;
    const int64_t row = pixel / images.out_width, column = pixel % images.out_width;
    length = std::min(count - t, images.out_width - column);
    const int64_t corner = (image * images.channels * images.height + row * images.down) * images.width;
    runs.push_back({corner + column * images.across, t, length, image * outputs * pixels + pixel});
  }
  return runs;
}

// Lengths that the compiler knows take a tenth of a call.
template <class T>
inline void copy(const T* from, int64_t step, T* to, int64_t length) {
  if (step != 1)
    for (int64_t k = 0; k < length; ++k) to[k] = from[k * step];
  else if (length == WIDTH)
    memcpy(to, from, WIDTH * sizeof(T));
  else if (length == 32)
    memcpy(to, from, 32 * sizeof(T));
  else if (length == 16)
    memcpy(to, from, 16 * sizeof(T));
  else if (length == 8)
    memcpy(to, from, 8 * sizeof(T));
  else if (length == 4)
    memcpy(to, from, 4 * sizeof(T));
  else
    for (int64_t k = 0; k < length; ++k) to[k] = from[k];
}

// in [inputs, columns]: what the kernel's window sees at each pixel of the chunk
template <class T>
void gather(const Images& images, const std::vector<Run>& runs, int columns, T* in) {
  for (int64_t c = 0; c < images.channels; ++c)
    for (int64_t i = 0; i < images.kernel_height; ++i)
      for (int64_t j = 0; j < images.kernel_width; ++j, in += columns)
        for (const Run& run : runs) {
          const T* row = (const T*)images.x + (c * images.height + i) * images.width + j;
          copy(row + run.from, images.across, in + run.to, run.length);
        }
}

// work(first column, how many, in, out) for all columns, on this thread and others. Where not every thread would have a
// chunk those are narrower: with two threads a 3x3 convolution of 64 pixels was 1.0 times as fast as with one. (Shares
// of the outputs instead: 1.05 with one `in` for both, which then goes from cache to cache, and 1.15 with one each.)
template <class Work>
void in_chunks(const Layer& layer, int64_t columns, char* memory, int threads, const Work& work) {
  const int64_t each = (columns + threads - 1) / threads;
  const int64_t size = std::min<int64_t>(WIDTH, (each + LANES - 1) / LANES * LANES);
  std::atomic<int64_t> next{0};
  on_threads(threads, (columns + size - 1) / size, [&](int thread) {
    float* in = (float*)(memory + thread * (layer.inputs + layer.outputs) * ROW);
    memset(in, 0, layer.inputs * ROW);  // the columns beyond the last token or pixel are numbers, whatever they are
    for (int64_t first; (first = size * next++) < columns;)
      work(first, std::min(size, columns - first), in, in + layer.inputs * WIDTH);
  });
}

// y [tokens, outputs]: `count` tokens from the first one on are out's columns
void put_tokens(const Layer& layer, float* out, float* y, int64_t first, int64_t count) {
  const int64_t wide = layer.pairs ? layer.outputs / 2 : layer.outputs;
  if (layer.pairs) put_beside(out, layer.outputs);
  for (int64_t o = 0; o < wide; o += 64)  // narrow: a token's piece of y stays in the cache until it is whole
    transpose(out + o * WIDTH, WIDTH, y + first * wide + o, wide, std::min<int64_t>(64, wide - o), count);
}

struct Sums {
  float* values;
  int64_t weights, groups;
};

// fill(first column, how many, in, dy) for each chunk of each group, then its gradients
template <class Product, class Fill>
void in_groups(const Layer& layer, int64_t columns, const Sums& sums, char* memory, int threads, const Fill& fill) {
  constexpr int64_t SIZE = DEEP * Product::IN_ONE;
  const int64_t rows = layer.inputs + layer.outputs, chunks = (columns + SIZE - 1) / SIZE;
  std::atomic<int64_t> next{0};
  on_threads(threads, sums.groups, [&](int thread) {
    float* in = (float*)memory + thread * rows * DEEP;
    float* dy = in + layer.inputs * DEEP;
    for (int64_t group; (group = next++) < sums.groups;)
      for (int64_t chunk = group * chunks / sums.groups; chunk < (group + 1) * chunks / sums.groups; ++chunk) {
        const int64_t first = chunk * SIZE, count = std::min<int64_t>(SIZE, columns - first);
        if (count < SIZE) memset(in, 0, rows * DEEP * sizeof(float));
        fill(first, count, in, dy);
        asm volatile("" ::: "memory");  // what may have been written by halves is read by vectors
        add_gradients<Product>(layer, in, dy, sums.values + group * sums.weights);
      }
  });
}

// T: a number of x and dy
template <class Product, class T>
void convolve_gradients(const Layer& layer, const Images& images, const Sums& sums, char* memory, int threads) {
  const int64_t pixels = images.out_height * images.out_width;
  const auto fill = [&](int64_t first, int64_t count, float* in, float* out) {
    constexpr int SIZE = DEEP * Product::IN_ONE;
    const std::vector<Run> runs = runs_of(images, layer.outputs, first, count);
    gather(images, runs, SIZE, (T*)in);
    for (int64_t o = 0; o < layer.outputs; ++o)
      for (const Run& run : runs)
        copy((const T*)images.y + run.out + o * pixels, 1, (T*)out + o * SIZE + run.to, run.length);
  };
  in_groups<Product>(layer, images.count * pixels, sums, memory, threads, fill);
}

}  // namespace

extern "C" {

int32_t raysparse_width() { return WIDTH; }
int32_t raysparse_deep() { return DEEP; }
int32_t raysparse_pairs() { return RAYSPARSE_PAIRS; }
int32_t raysparse_blocks() { return blocks_at_once(); }
int32_t raysparse_features_in_cache() { return features_in_cache(); }

// Whether each TILE outputs take the same inputs.
int32_t raysparse_tiled(const Layer* layer, const Matrix* matrix, const uint8_t* mask) {
  if (layer->outputs % TILE) return 0;
  const Used used{*matrix, mask};
  for (int64_t output = 0; output < layer->outputs; ++output)
    for (int64_t input = 0; input < layer->inputs; ++input)
      if (used(output, input) != used(output - output % TILE, input)) return 0;
  return 1;
}

// counts [blocks * outputs / tile]: how many inputs of a block a row takes.
void raysparse_counts(const Layer* layer, const Matrix* matrix, const uint8_t* mask, int32_t* counts, int32_t threads) {
  const Used used{*matrix, mask};
  over_rows(*layer, threads, [&](int64_t number, int64_t output, int64_t first, int64_t end) {
    int32_t found = 0;
    for (int64_t input = first; input < end; ++input) found += used(output, input);
    counts[number] = found;
  });
}

// offsets as Layer has them, whose starts are there
void raysparse_offsets(const Layer* layer, const Matrix* matrix, const uint8_t* mask, int32_t* offsets,
                       int32_t threads) {
  const Used used{*matrix, mask};
  over_rows(*layer, threads, [&](int64_t number, int64_t output, int64_t first, int64_t) {
    int32_t *to = offsets + layer->starts[number], *end = offsets + layer->starts[number + 1];
    for (int64_t input = first; to != end; ++input) {  // no branch that the CPU cannot foresee
      *to = (int32_t)((input - first) * ROW);
      to += used(output, input);
    }
  });
}

// values [weights]: those of the model's weight; 0 in a pair where the mask has only the other
void raysparse_values(const Layer* layer, const Matrix* matrix, const uint8_t* mask, const float* weight, float* values,
                      int32_t threads) {
  const int64_t pair = matrix->pair;
  const auto one = [=](int64_t number, int64_t place) { values[number] = weight[place]; };
  const auto two = [=](int64_t number, int64_t place) {
    const int64_t other = place + pair;
    const uint32_t both = half(mask[place] ? weight[place] : 0) | half(mask[other] ? weight[other] : 0) << 16;
    memcpy(values + number, &both, sizeof both);
  };
  if (layer->pairs) over_weights(*layer, *matrix, threads, two);
  else over_weights(*layer, *matrix, threads, one);
}

// packed: of values [weights] by BLOCK_TILE as raysparse_values leaves them, sixteen inputs at a time, by output, zeros
// behind the last ones of an output
void raysparse_pack_blocks(const Layer* layer, const float* values, float* packed) {
  for (int64_t row = 0; row < layer->outputs / BLOCK_TILE; ++row)
    for (int32_t i = layer->starts[row], end = layer->starts[row + 1]; i < end; i += 16, packed += 16 * BLOCK_TILE)
      for (int o = 0; o < BLOCK_TILE; ++o)
        for (int k = 0; k < 16; ++k) packed[o * 16 + k] = i + k < end ? values[(i + k) * BLOCK_TILE + o] : 0;
}

// gradients, zeros at first: of the model's weight, made of sums as raysparse_*_gradients leave them
void raysparse_spread(const Layer* layer, const Matrix* matrix, const Sums* sums, float* gradients, int32_t threads) {
  const float* values = sums->values;
  const int64_t weights = sums->weights, all = weights * sums->groups;
  over_weights(*layer, *matrix, threads, [=](int64_t number, int64_t place) {
    float sum = 0;
    for (int64_t of_group = number; of_group < all; of_group += weights) sum += values[of_group];
    gradients[place] = sum;
  });
}

// x [tokens, inputs], y [tokens, outputs], an even number if in bfloat16; memory: threads x (inputs + outputs) x WIDTH
// floats
void raysparse_linear(const Layer* layer, const float* x, float* y, int64_t tokens, char* memory, int32_t threads) {
  const int64_t inputs = layer->inputs;
  if (layer->tile == BLOCK_TILE)
    return linear_by_tiles(*layer, (const uint32_t*)x, (uint16_t*)y, tokens, memory, (inputs + layer->outputs) * ROW,
                           threads);
  in_chunks(*layer, tokens, memory, threads, [&](int64_t first, int64_t count, float* in, float* out) {
    transpose(x + first * inputs, inputs, in, WIDTH, count, inputs);
    multiply(*layer, in, out, count);
    put_tokens(*layer, out, y, first, count);
  });
}

// Gradients of the weights: sums [groups, weights], zeros at first, of each group of tokens or pixels; memory: threads x
// (inputs + outputs) x DEEP floats. x and dy are floats, or bfloat16 (layer->pairs): then single ones, not in pairs.
// x [tokens, inputs], dy [tokens, outputs], of both an even number if in bfloat16:
void raysparse_linear_gradients(const Layer* layer, const float* x, const float* dy, int64_t tokens, const Sums* sums,
                                char* memory, int32_t threads) {
  const int64_t inputs = layer->inputs, outputs = layer->outputs;
  const auto floats = [&](int64_t first, int64_t count, float* in, float* out) {
    transpose(x + first * inputs, inputs, in, DEEP, count, inputs);
    transpose(dy + first * outputs, outputs, out, DEEP, count, outputs);
  };
  const auto pairs = [&](int64_t first, int64_t count, float* in, float* out) {
    transpose(x + first * inputs / 2, inputs / 2, in, 2 * DEEP, count, inputs / 2);
    transpose(dy + first * outputs / 2, outputs / 2, out, 2 * DEEP, count, outputs / 2);
    take_apart(in, inputs / 2);
    take_apart(out, outputs / 2);
  };
  if (layer->pairs) in_groups<Pairs>(*layer, tokens, *sums, memory, threads, pairs);
  else in_groups<Floats>(*layer, tokens, *sums, memory, threads, floats);
}

// images: y is dy
void raysparse_convolve_gradients(const Layer* layer, const Images* images, const Sums* sums, char* memory,
                                  int32_t threads) {
  if (layer->pairs) convolve_gradients<Pairs, uint16_t>(*layer, *images, *sums, memory, threads);
  else convolve_gradients<Floats, float>(*layer, *images, *sums, memory, threads);
}

// Padded images of pairs of channels for raysparse_convolve: to [planes, height + 2 up, width + 2 side], of which each
// is made from two planes of x [2 planes, height, width], floats or bfloat16 (halves).
void raysparse_pair_images(const char* x, int64_t halves, uint32_t* to, const Padded* images, int32_t threads) {
  if (halves) pair_images((const uint16_t*)x, to, *images, threads);
  else pair_images((const float*)x, to, *images, threads);
}

void raysparse_convolve(const Layer* layer, const Images* images, char* memory, int32_t threads) {
  const int64_t pixels = images->out_height * images->out_width, all = images->count * pixels;
  in_chunks(*layer, all, memory, threads, [&](int64_t first, int64_t count, float* in, float* out) {
    const std::vector<Run> runs = runs_of(*images, layer->outputs, first, count);
    gather(*images, runs, WIDTH, in);
    multiply(*layer, in, out, count);
    if (images->by_token) return put_tokens(*layer, out, images->y, first, count);
    for (int64_t o = 0; o < layer->outputs; ++o) {
      const float* row = out + o * WIDTH;
      uint16_t halves[WIDTH];
      if (layer->pairs) halve(row, halves);
      for (const Run& run : runs) {
        const int64_t to = run.out + o * pixels;
        if (layer->pairs) copy<uint16_t>(halves + run.to, 1, (uint16_t*)images->y + to, run.length);
        else copy(row + run.to, 1, images->y + to, run.length);
      }
    }
  });
}
}
