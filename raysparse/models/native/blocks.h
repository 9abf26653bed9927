// Products by blocks in bfloat16 on CPUs with AMX, for sampling: sixteen outputs take the same inputs.
//
// A tile is a register of sixteen rows of 64 bytes; one instruction multiplies two of them and adds to a third. It has
// no compiler flag here, for a library may run where there is no AMX: see raysparse_blocks.
//
// On an Intel Xeon U-ViT's linear layers with blocks of 16 x 16 are .85 to 1.2, 1.1 to 1.8, 1.4 to 2.5 and 1.9 to 3.7
// times as fast at density .7, .5, .25, .1 as PyTorch's dense ones in bfloat16, which use AMX too; by pairs of vdpbf16ps
// .2 to 1.2 times. Tokens as rows of a tile need no transposing: with them as columns, as convolutions have their
// pixels, 1,536 outputs of 512 inputs took 2.0 times as long at density .1 and 1.4 at .5. Two blocks beside each other
// in one tile would make density .7 and .5 1.05 times faster.
#pragma once
#include "layout.h"

#if defined(__x86_64__) && defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define RAYSPARSE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct alignas(64) TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles 4 and 5 have so many rows of so many bytes, the other ones are whole.
inline TileShapes tile_shapes(int rows_of_4, int bytes_of_5) {
  TileShapes found = {};
  found.palette = 1;
  for (int t = 0; t < 8; ++t) found.row_bytes[t] = 64, found.rows[t] = 16;
  found.rows[4] = (uint8_t)rows_of_4;
  found.row_bytes[5] = (uint16_t)bytes_of_5;
  return found;
}

// This thread's tiles while it lives, then as PyTorch's own products had left them.
struct Tiles {
  TileShapes before;
  explicit Tiles(const TileShapes& wanted) {
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(wanted));
  }
  ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before)); }
};

#define TILE_ZERO(T) asm volatile("tilezero %%tmm" #T ::: "memory")
#define TILE_LOAD(T, FROM, ROW) asm volatile("tileloadd (%0,%1,1), %%tmm" #T ::"r"(FROM), "r"(ROW) : "memory")
#define TILE_STORE(T, TO, ROW) asm volatile("tilestored %%tmm" #T ", (%0,%1,1)" ::"r"(TO), "r"(ROW) : "memory")
#define TILE_ADD(SUM, A, B) asm volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #SUM ::: "memory")

// y [16 T, outputs] of x [16 T, inputs / 2] pairs, its first `count` rows; T: 1 or 4. The inputs of a weight's block are
// RUN pairs side by side.
constexpr int RUN = 8;
template <int T>
void tokens_by_tiles(const Layer& layer, const uint32_t* x, uint16_t* y, int64_t count) {
  constexpr int64_t TIGHT = 64;
  const int64_t row = layer.inputs * sizeof(uint32_t), tile = 16 * layer.inputs;
  alignas(64) float sums[T][16][16];
  const int32_t* start = layer.starts;
  for (int64_t o = 0; o < layer.outputs; o += BLOCK_TILE, ++start) {
    TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    for (int32_t i = start[0]; i < start[1]; i += RUN) {
      const uint32_t* of = x + (uint32_t)layer.offsets[i] / (uint32_t)ROW;
      TILE_LOAD(4, layer.values + i * BLOCK_TILE, TIGHT);
      TILE_LOAD(5, of, row); TILE_ADD(0, 5, 4);
      if constexpr (T == 4) {
        TILE_LOAD(5, of + tile, row); TILE_ADD(1, 5, 4);
        TILE_LOAD(5, of + 2 * tile, row); TILE_ADD(2, 5, 4);
        TILE_LOAD(5, of + 3 * tile, row); TILE_ADD(3, 5, 4);
      }
    }
    TILE_STORE(0, sums[0], TIGHT);
    if constexpr (T == 4) {
      TILE_STORE(1, sums[1], TIGHT); TILE_STORE(2, sums[2], TIGHT); TILE_STORE(3, sums[3], TIGHT);
    }
    vec bias;
    memcpy(&bias, layer.bias + o, sizeof bias);
    for (int64_t t = 0; t < count; ++t) {
      const ivec found = rounded(*(const vec*)(sums[0][0] + 16 * t) + bias) >> 16;
      const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)found);
      memcpy(y + t * layer.outputs + o, &narrow, sizeof narrow);
    }
  }
}

// x [tokens, inputs / 2] pairs, y [tokens, outputs]; memory: threads x `each` bytes, 64 for each pair of inputs at least
void linear_by_tiles(const Layer& layer, const uint32_t* x, uint16_t* y, int64_t tokens, char* memory, int64_t each,
                     int threads) {
  constexpr int64_t TOGETHER = 64;
  over_threads((tokens + TOGETHER - 1) / TOGETHER, threads, [&](int64_t part, int thread) {
    const Tiles tiles(tile_shapes(RUN, 4 * RUN));
    int64_t t = part * TOGETHER;
    const int64_t end = std::min(t + TOGETHER, tokens);
    if (end - t == TOGETHER) return tokens_by_tiles<4>(layer, x + t * layer.inputs, y + t * layer.outputs, TOGETHER);
    for (; t < end; t += 16) {
      const uint32_t* from = x + t * layer.inputs;
      const int64_t count = std::min<int64_t>(16, end - t), size = count * layer.inputs * sizeof(uint32_t);
      if (count < 16) {  // a tile reads sixteen rows
        char* whole = memory + thread * each;
        memcpy(whole, from, size);
        memset(whole + size, 0, 16 * layer.inputs * sizeof(uint32_t) - size);
        from = (const uint32_t*)whole;
      }
      tokens_by_tiles<1>(layer, from, y + t * layer.outputs, count);
    }
  });
}

// out [outputs, WIDTH] += weights, as pack_blocks leaves them, times in [inputs, WIDTH] of pairs, of the first NV vectors
template <int NV>
void multiply_blocks(const Layer& layer, const float* in, float* out) {
  const Tiles tiles(tile_shapes(16, 64));
  const int64_t row = ROW, of_taken = NV * sizeof(vec), tight = 64;
  alignas(64) vec taken[16][NV];
  const int32_t* start = layer.starts;
  const float* values = layer.values;
  for (int64_t o = 0; o < layer.outputs; o += BLOCK_TILE, ++start) {
    float* y = out + o * WIDTH;
    TILE_LOAD(0, y, row);
    if constexpr (NV > 1) TILE_LOAD(1, y + LANES, row);
    if constexpr (NV > 2) TILE_LOAD(2, y + 2 * LANES, row);
    if constexpr (NV > 3) TILE_LOAD(3, y + 3 * LANES, row);
    for (int32_t i = start[0]; i < start[1]; i += 16, values += 16 * BLOCK_TILE) {
      const int32_t count = std::min(16, start[1] - i);
      for (int32_t k = 0; k < count; ++k) memcpy(taken[k], (const char*)in + layer.offsets[i + k], sizeof taken[k]);
      memset(taken[count], 0, (16 - count) * sizeof taken[0]);
      TILE_LOAD(4, values, tight);
      TILE_LOAD(5, taken[0], of_taken); TILE_ADD(0, 4, 5);
      if constexpr (NV > 1) { TILE_LOAD(6, taken[0] + 1, of_taken); TILE_ADD(1, 4, 6); }
      if constexpr (NV > 2) { TILE_LOAD(7, taken[0] + 2, of_taken); TILE_ADD(2, 4, 7); }
      if constexpr (NV > 3) { TILE_LOAD(5, taken[0] + 3, of_taken); TILE_ADD(3, 4, 5); }
    }
    TILE_STORE(0, y, row);
    if constexpr (NV > 1) TILE_STORE(1, y + LANES, row);
    if constexpr (NV > 2) TILE_STORE(2, y + 2 * LANES, row);
    if constexpr (NV > 3) TILE_STORE(3, y + 3 * LANES, row);
  }
}

// Whether the CPU has it and the system lets this process use it: asked once, for all threads.
inline bool blocks_at_once() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  uint32_t a, b, c, d;
  asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tiles = d >> 24 & 1, bfloat16 = d >> 22 & 1;
  return tiles && bfloat16 && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

}  // namespace
#else
#define RAYSPARSE_AMX 0
namespace {
inline bool blocks_at_once() { return false; }
inline void linear_by_tiles(const Layer&, const uint32_t*, uint16_t*, int64_t, char*, int64_t, int) {}  // never used
template <int NV>
void multiply_blocks(const Layer&, const float*, float*) {}
}  // namespace
#endif
