// Rows times one panel of weights, float32 or bfloat16, with sums in float32. Where the processor has no
// products of bfloat16, weights and rows are widened.

#pragma once

#include <type_traits>
#include <vector>

#include "ahead.h"
#include "vectors.h"

namespace {

// Rows whose sums fit in the registers beside one panel of weights.
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 3;
// Likewise where the weights are widened on the way, which takes registers too: with one row more they spill,
// and a tile takes twice as long.
constexpr int kWideningRows = kLanes == 8 ? 5 : kTileRows;
constexpr int kWideningTiles = kLanes == 8 ? 6 : 2;  // with more, widening once costs less than in every tile
constexpr int64_t kBlockInputs = 576;  // inputs in a block of a panel: in float32 it stays in the L1/L2 cache

// How weights lie in a panel, by the type that they are kept in, and in which type rows are multiplied by
// them.
template <typename T>
struct Panel;

template <>
struct Panel<float> {  // [in, kPanel]
  typedef float Row;
  static int64_t inputs(int64_t in) { return in; }
  static const float* at(const void* weight, int64_t panel, int64_t in) {
    return static_cast<const float*>(weight) + panel * in * kPanel;
  }
  static float* at(void* weight, int64_t panel, int64_t in) {
    return static_cast<float*>(weight) + panel * in * kPanel;
  }
};

template <>
struct Panel<bf16> {  // [in / 2, kPanel] of two inputs' weights each, the first in the lower half
  typedef std::conditional_t<POLYGRAFT_DOTS_OF_BF16, bf16, float> Row;
  static int64_t inputs(int64_t in) { return (in + 1) / 2 * 2; }
  static const uint32_t* at(const void* weight, int64_t panel, int64_t in) {
    return static_cast<const uint32_t*>(weight) + panel * (inputs(in) / 2) * kPanel;
  }
  static uint32_t* at(void* weight, int64_t panel, int64_t in) {
    return static_cast<uint32_t*>(weight) + panel * (inputs(in) / 2) * kPanel;
  }
};

// acc[ROWS, kPanel] (+)= x[ROWS, inputs] w[inputs, kPanel]
template <int ROWS>
void multiply_tile(const float* x, int64_t x_stride, const float* w, int64_t inputs, float* out, bool first,
                   Ahead ahead) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = first ? vec{} : load(out + r * kPanel + v * kLanes);
  for (int64_t i = 0; i < inputs; i++) {
    ahead.step();
    vec weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = load(w + i * kPanel + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

inline vec lower(const uint32_t* w) { return vec(load(w) << 16); }
inline vec upper(const uint32_t* w) { return vec(load(w) & 0xffff0000u); }

template <int ROWS>
void multiply_tile(const float* x, int64_t x_stride, const uint32_t* w, int64_t inputs, float* out,
                   bool first, Ahead ahead) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = first ? vec{} : load(out + r * kPanel + v * kLanes);
  for (int64_t i = 0; i < inputs; i += 2, w += kPanel) {
    ahead.step();
    vec weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = lower(w + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
    for (int v = 0; v < kVecs; v++) weights[v] = upper(w + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i + 1]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

#if POLYGRAFT_DOTS_OF_BF16

template <int ROWS>
void multiply_tile(const bf16* x, int64_t x_stride, const uint32_t* w, int64_t inputs, float* out, bool first,
                   Ahead ahead) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = first ? vec{} : load(out + r * kPanel + v * kLanes);
  for (int64_t i = 0; i < inputs; i += 2, w += kPanel) {
    ahead.step();
    uvec weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = load(w + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const uvec pair = splat_pair(x + r * x_stride + i);
      for (int v = 0; v < kVecs; v++) acc[r][v] = add_products_of_pairs(acc[r][v], weights[v], pair);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

#endif

template <typename X, typename W, int ROWS = kTileRows>
void multiply(int64_t rows, const X* x, int64_t x_stride, const W* w, int64_t inputs, float* out, bool first,
              Ahead ahead) {
  if (rows == ROWS) {
    multiply_tile<ROWS>(x, x_stride, w, inputs, out, first, ahead);
  } else if constexpr (ROWS > 1) {
    multiply<X, W, ROWS - 1>(rows, x, x_stride, w, inputs, out, first, ahead);
  }
}

// A block of rows in tiles of as equal a height as can be, while `bytes` from `next` on and what is read
// later are fetched.
template <typename X, typename W>
void multiply_tiles(int64_t rows, int64_t tiles, const X* x, int64_t x_stride, const W* w, int64_t inputs,
                    float* out, bool first, const void* next, int64_t bytes, Later& later) {
  const int64_t steps = std::is_integral_v<W> ? inputs / 2 : inputs;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
    multiply(to - from, x + from * x_stride, x_stride, w, inputs, out + from * kPanel, first,
             Ahead::of_tile(next, bytes, t, tiles, steps, later));
  }
}

// acc[rows, kPanel] = x[rows, inputs] times one panel.
inline void multiply_panel(const float* x, int64_t rows, int64_t inputs, const float* w, float* acc,
                           Later& later) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    const float* block = w + i * kPanel;
    multiply_tiles(rows, tiles, x + i, inputs, block, count, acc, i == 0, block + inputs * kPanel,
                   count * kPanel * sizeof(float), later);
  }
}

inline void multiply_panel(const float* x, int64_t rows, int64_t inputs, const uint32_t* w, float* acc,
                           Later& later) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t widening = (rows + kWideningRows - 1) / kWideningRows;
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    const uint32_t* block = w + i / 2 * kPanel;
    const uint32_t* next = block + inputs / 2 * kPanel;
    const int64_t bytes = count / 2 * kPanel * sizeof(uint32_t);
    if (widening <= kWideningTiles) {
      multiply_tiles(rows, widening, x + i, inputs, block, count, acc, i == 0, next, bytes, later);
      continue;
    }
    alignas(64) float wide[kBlockInputs * kPanel];
    for (int64_t p = 0; p < count / 2; p++)
      for (int v = 0; v < kVecs; v++) {
        store(wide + 2 * p * kPanel + v * kLanes, lower(block + p * kPanel + v * kLanes));
        store(wide + (2 * p + 1) * kPanel + v * kLanes, upper(block + p * kPanel + v * kLanes));
      }
    multiply_tiles(rows, tiles, x + i, inputs, static_cast<const float*>(wide), count, acc, i == 0, next,
                   bytes, later);
  }
}

#if POLYGRAFT_DOTS_OF_BF16

inline void multiply_panel(const bf16* x, int64_t rows, int64_t inputs, const uint32_t* w, float* acc,
                           Later& later) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    const uint32_t* block = w + i / 2 * kPanel;
    multiply_tiles(rows, tiles, x + i, inputs, block, count, acc, i == 0, block + inputs / 2 * kPanel,
                   count / 2 * kPanel * sizeof(uint32_t), later);
  }
}

#endif

// Rows in float32, in place where they are so already.
inline const float* widen(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
inline const float* widen(const bf16* x, int64_t rows, int64_t in, std::vector<float>& buffer) {
  const int64_t inputs = Panel<bf16>::inputs(in);
  buffer.resize(rows * inputs);
  for (int64_t r = 0; r < rows; r++) {
    float* to = buffer.data() + r * inputs;
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) store(to + i, load(x + r * in + i));
    for (; i < in; i++) to[i] = to_float(x[r * in + i]);
    if (in < inputs) to[in] = 0.0f;
  }
  return buffer.data();
}

// Rows of `in` numbers as panels of weights in T are multiplied by them, in place where they are so already.
template <typename T, typename X>
const typename Panel<T>::Row* as_rows(const X* x, int64_t rows, int64_t in,
                                      std::vector<typename Panel<T>::Row>& buffer) {
  if constexpr (std::is_same_v<typename Panel<T>::Row, float>) {
    return widen(x, rows, in, buffer);
  } else {
    const int64_t inputs = Panel<T>::inputs(in);
    if constexpr (std::is_same_v<X, bf16>)
      if (inputs == in) return x;
    buffer.resize(rows * inputs);
    for (int64_t r = 0; r < rows; r++) {
      bf16* to = buffer.data() + r * inputs;
      int64_t i = 0;
      for (; i + kLanes <= in; i += kLanes) store(to + i, load(x + r * in + i));
      for (; i < in; i++) from_float(to_float(x[r * in + i]), to + i);
      if (in < inputs) to[in] = bf16{0};
    }
    return buffer.data();
  }
}

}  // namespace
