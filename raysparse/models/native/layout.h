// Where the active weights of a layer lie in the order in which its products walk them, and how they get there and back.
// It is done anew at each update of a topology: by PyTorch's operations it took 1 to 2.5 times as long as a training
// step, and kept the place of each weight.
#pragma once
#include "gru.h"
#include "threads.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int TILE = 4, BLOCK_TILE = 16;

// In bfloat16 an input and a weight are two each, side by side in the 32 bits of a float, whose products are summed.
struct Layer {
  const int32_t* starts;   // [blocks * outputs + 1] where each row's weights of a block begin
  const int32_t* offsets;  // [weights] bytes from the block's first input to the one that the weight takes
  const float* values;     // [weights]
  const float* bias;       // [outputs]
  int64_t inputs, outputs, block;
  int64_t pairs;  // whether it is in bfloat16
  int64_t tile;   // so many outputs take the same inputs, 1, TILE or BLOCK_TILE: starts and offsets are of all of them,
                  // and an input's values lie side by side
};

// Where a weight of the model has the rows and columns of the products, which may be those of its transposed.
struct Matrix {
  const int32_t* columns;  // [inputs] of the first row; of pairs, the first of both
  int64_t row;             // from a row to the next
  int64_t pair;            // from the first to the second of a pair; 0: no pairs
};

inline uint32_t half(uint16_t bits) { return bits; }
inline uint32_t half(float x) {  // to bfloat16
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// To bfloat16, the upper half of each number.
inline ivec rounded(vec x) {
  const ivec bits = (ivec)x, up = bits + 0x7fff + ((bits >> 16) & 1), odd = x != x;
  return (up & ~odd) | (0x7fc00000 & odd);
}

// Flags of the matrix whether the mask has each column of a row, or one of a pair.
struct Used {
  const Matrix& matrix;
  const uint8_t* mask;
  bool operator()(int64_t row, int64_t column) const {
    const uint8_t* at = mask + row * matrix.row + matrix.columns[column];
    return at[0] | at[matrix.pair];
  }
};

// work(number, output, first input, end) for each row of each block, for `tile` of them at a time: number is its
// place in Layer::starts. Rows go together to a thread, for those of a transposed weight lie side by side.
template <class Work>
void over_rows(const Layer& layer, int threads, const Work& work) {
  constexpr int64_t TOGETHER = 64;
  const int64_t step = layer.tile, rows = layer.outputs / step;
  const int64_t blocks = (layer.inputs + layer.block - 1) / layer.block, parts = (rows + TOGETHER - 1) / TOGETHER;
  over_threads(blocks * parts, threads, [&](int64_t part, int) {
    const int64_t block = part / parts, first = block * layer.block;
    const int64_t begin = part % parts * TOGETHER, end = std::min(begin + TOGETHER, rows);
    for (int64_t row = begin; row < end; ++row)
      work(block * rows + row, step * row, first, std::min(first + layer.block, layer.inputs));
  });
}

// work(number of the weight, its place in the matrix) for each one that products take.
template <int STEP, class Work>
void over_weights_by(const Layer& layer, const Matrix& matrix, int threads, const Work& work) {
  over_rows(layer, threads, [&](int64_t number, int64_t output, int64_t first, int64_t) {
    const int32_t *columns = matrix.columns + first, *offsets = layer.offsets;
    const int64_t begin = output * matrix.row, row = matrix.row, end = layer.starts[number + 1];
    for (int64_t i = layer.starts[number]; i < end; ++i) {
      const int64_t place = begin + columns[(uint32_t)offsets[i] / (uint32_t)ROW];
      for (int k = 0; k < STEP; ++k) work(STEP * i + k, place + k * row);
    }
  });
}

template <class Work>
void over_weights(const Layer& layer, const Matrix& matrix, int threads, const Work& work) {
  if (layer.tile == TILE) over_weights_by<TILE>(layer, matrix, threads, work);
  else if (layer.tile == BLOCK_TILE) over_weights_by<BLOCK_TILE>(layer, matrix, threads, work);
  else over_weights_by<1>(layer, matrix, threads, work);
}

}  // namespace
