// What lies between the products of a time step of the packed GRU, forward and backward: the gates, element by element.
// See raysparse/models/_compiled_gru.py, which makes the products: nothing is checked here.
//
// PyTorch makes twelve passes over the gates for it, most of them through the second cache or beyond; here it is one.
#include "gru.h"

namespace {

// The reverse direction has the rows of each sketch from its other end: outside [points, 2 h], where both lie side by side
// in the order of the forward one, row reverse[i] is its row i.
struct Layer {
  const float* bias;       // [2, 4 h] of q, r, z, n
  float* states;           // [2, points, h]
  float* outside;          // [points, 2 h] the layer's output; backward: its gradient
  const int64_t* reverse;  // [points]
  int64_t points, hidden;
};

// Up to LANES numbers; the lanes beyond are 0. Two copies, of which one has a size that the compiler knows: with one of
// any size a training step takes 1.5 times as long.
inline vec load(const float* from, int64_t count) {
  vec x = {};
  if (count >= LANES) memcpy(&x, from, sizeof x);
  else memcpy(&x, from, count * sizeof(float));
  return x;
}

inline void store(float* to, vec x, int64_t count) {
  if (count >= LANES) memcpy(to, &x, sizeof x);
  else memcpy(to, &x, count * sizeof(float));
}

inline vec sigmoid(vec x) { return 1.f / (1.f + exp2(x * -1.44269504f)); }

inline float* outside(const Layer& layer, int side, int64_t row) {
  return layer.outside + (side ? layer.reverse[row] : row) * 2 * layer.hidden + side * layer.hidden;
}

}  // namespace

extern "C" {

// gates [2, rows, 4 h], `apart` floats between the two: sums of q, r, z, n without their bias -> q, r, z, n. The time step
// is `rows` rows of the states from `first` on, the one before it starts at `last`; -1: there is none.
void raysparse_gates(const Layer* layer, float* gates, int64_t apart, int64_t last, int64_t first, int64_t rows) {
  const int64_t hidden = layer->hidden;
  for (int side = 0; side < 2; ++side) {
    const float* bias = layer->bias + side * 4 * hidden;
    float* states = layer->states + side * layer->points * hidden;
    for (int64_t row = 0; row < rows; ++row) {
      float* q = gates + side * apart + row * 4 * hidden;
      float *r = q + hidden, *z = r + hidden, *n = z + hidden;
      const float* before = last < 0 ? nullptr : states + (last + row) * hidden;
      float *to = states + (first + row) * hidden, *out = outside(*layer, side, first + row);
      for (int64_t j = 0; j < hidden; j += LANES) {
        const int64_t left = hidden - j;
        const vec q_ = load(q + j, left) + load(bias + j, left);
        const vec r_ = sigmoid(load(r + j, left) + load(bias + hidden + j, left));
        const vec z_ = sigmoid(load(z + j, left) + load(bias + 2 * hidden + j, left));
        const vec sum = load(n + j, left) + load(bias + 3 * hidden + j, left) + r_ * q_;
        const vec n_ = 2.f * sigmoid(2.f * sum) - 1.f;
        const vec h = before ? load(before + j, left) : vec{};
        const vec state = n_ + z_ * (h - n_);
        store(q + j, q_, left);
        store(r + j, r_, left);
        store(z + j, z_, left);
        store(n + j, n_, left);
        store(to + j, state, left);
        store(out + j, state, left);
      }
    }
  }
}

// d_gates [2, rows, 4 h] of the sums, from the states' gradients and what later time steps passed on to the first `later`
// rows, carried [2, later, h]. passed [2, rows, h]: what goes on to the time step before, but for the product; copy [2,
// rows, h], `copies_apart` floats between the two: the states before.
void raysparse_gates_back(const Layer* layer, const float* gates, float* d_gates, int64_t apart, int64_t last,
                          int64_t first, int64_t rows, const float* carried, int64_t later, float* passed, float* copy,
                          int64_t copies_apart) {
  const int64_t hidden = layer->hidden;
  for (int side = 0; side < 2; ++side) {
    const float* states = layer->states + side * layer->points * hidden;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = side * apart + row * 4 * hidden;
      const float *q = gates + at, *r = q + hidden, *z = r + hidden, *n = z + hidden;
      float *d_q = d_gates + at, *d_r = d_q + hidden, *d_z = d_r + hidden, *d_n = d_z + hidden;
      const float* before = last < 0 ? nullptr : states + (last + row) * hidden;
      const float* grad = outside(*layer, side, first + row);
      const float* more = row < later ? carried + (side * later + row) * hidden : nullptr;
      float *to = passed + (side * rows + row) * hidden, *copied = copy + side * copies_apart + row * hidden;
      for (int64_t j = 0; j < hidden; j += LANES) {
        const int64_t left = hidden - j;
        const vec r_ = load(r + j, left), z_ = load(z + j, left), n_ = load(n + j, left);
        const vec h = before ? load(before + j, left) : vec{};
        const vec d = more ? load(grad + j, left) + load(more + j, left) : load(grad + j, left);
        const vec of_n = d * (1.f - z_) * (1.f - n_ * n_), of_q = of_n * r_;
        store(d_q + j, of_q, left);
        store(d_r + j, of_q * load(q + j, left) * (1.f - r_), left);
        store(d_z + j, d * (h - n_) * z_ * (1.f - z_), left);
        store(d_n + j, of_n, left);
        store(to + j, d * z_, left);
        store(copied + j, h, left);
      }
    }
  }
}
}
