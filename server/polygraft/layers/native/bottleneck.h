// Bottleneck adapters (Houlsby et al., arXiv 1902.00751) where a layer adds a part's output h to the residual
// stream r, by the segments of side_path.h: only rows of adapters that have weights at the site are touched.
// core/primitives.py says what is computed, layers/residual/bottlenecks.py holds the same in torch.

#pragma once

#include <omp.h>

#include <cmath>

#include "elementwise.h"
#include "side_path.h"

namespace {

enum Reads { kReadsSum = 0, kReadsOutput = 1, kReadsResidual = 2 };

// In the order of layers/residual/activations.py.
enum Nonlinearity {
  kRelu,
  kSwish,
  kGelu,
  kGeluByTanh,
  kTanh,
  kSigmoid,
  kLeakyRelu,
  kLinear,
  kRelu2,
  kRelu6,
  kMish,
  kQuickGelu,
  kLaplace,
  kGelu10
};

struct Bottleneck {   // layers/residual/bottlenecks.py fills it
  int64_t down;       // address of [width, hidden]
  int64_t up;         // address of [hidden, width] in panels [panels, width, kPanel], padded with zeros
  int64_t down_bias;  // address of [width] in float32, or 0
  int64_t up_bias;    // address of a bias in float32, padded to whole panels, or 0
  int64_t width;
  int64_t dtype;  // of down and up: 0 float32, 1 bfloat16
  int64_t activation;
  int64_t reads;
  int64_t normalizes;
  int64_t residual;     // how often r is in the result
  int64_t norm_weight;  // address of [hidden] in float32, or 0: no norm behind it
  int64_t norm_bias;
  int64_t norm_skips_sum;  // whether the norm's skip connection carries r + h; else h
  int64_t norm_inside;     // whether it is added before the norm
  double scaling;          // of the product with `up`
};

struct Site {
  const Bottleneck* const* table;  // by slot; null: the adapter has nothing here
  int64_t slots;                   // in the table; later ones have nothing here either
};

inline const Bottleneck* at_site(const Site& site, const Segment& segment) {
  return segment.slot < site.slots ? site.table[segment.slot] : nullptr;
}

constexpr float kLayerNormEpsilon = 1e-5f;

inline float apply(int64_t activation, float x) {
  switch (activation) {
    case kRelu: return x > 0 ? x : 0;
    case kSwish: return x / (1 + std::exp(-x));
    case kGelu: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case kGeluByTanh: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case kTanh: return std::tanh(x);
    case kSigmoid: return 1 / (1 + std::exp(-x));
    case kLeakyRelu: return x > 0 ? x : 0.01f * x;
    case kRelu2: return x > 0 ? x * x : 0;
    case kRelu6: return std::min(std::max(x, 0.0f), 6.0f);
    case kMish: return x * std::tanh(x > 20 ? x : std::log1p(std::exp(x)));
    case kQuickGelu: return x / (1 + std::exp(-1.702f * x));
    case kLaplace: return 0.5f * (1 + std::erf((x - 0.707107f) / (0.282095f * 1.41421356f)));
    case kGelu10: return std::min(std::max(0.5f * x * (1 + std::erf(x * 0.70710678f)), -10.0f), 10.0f);
    default: return x;
  }
}

// Brings a row to mean 0 and variance 1.
inline void layer_norm(float* x, int64_t width) {
  double total = 0, squares = 0;
  for (int64_t i = 0; i < width; i++) total += x[i];
  const float mean = float(total / width);
  for (int64_t i = 0; i < width; i++) squares += double(x[i] - mean) * (x[i] - mean);
  const float factor = 1 / std::sqrt(float(squares / width) + kLayerNormEpsilon);
  for (int64_t i = 0; i < width; i++) x[i] = (x[i] - mean) * factor;
}

// Calls body(row, entry) for the calling thread's share of the rows that have something at the site.
template <typename Body>
void for_adapted_rows(const Site& site, const Segment* segments, int64_t num_segments, Body&& body) {
  const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  for (int64_t s = 0; s < num_segments; s++) {
    const Bottleneck* entry = at_site(site, segments[s]);
    if (!entry) continue;
    for (int64_t row = segments[s].first; row < segments[s].last; row++)
      if (row % team == thread) body(row, *entry);
  }
}

// a [rows, max_width] = scaling act(down x + down_bias), in pieces that one long segment and many short ones
// both share out to all threads.
inline void down_share(const Site& site, const Segment* segments, int64_t num_segments, int64_t hidden,
                       const float* x, float* a, int64_t max_width) {
  constexpr int64_t kRows = 64;
  const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  int64_t piece = 0;
  for (int64_t s = 0; s < num_segments; s++) {
    if (!at_site(site, segments[s])) continue;
    const Bottleneck& entry = *at_site(site, segments[s]);
    const float* bias = reinterpret_cast<const float*>(entry.down_bias);
    const float scaling = float(entry.scaling);
    for (int64_t row = segments[s].first; row < segments[s].last; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, segments[s].last - row);
      for (int64_t j = 0; j < entry.width; j += kRanks) {
        if (piece++ % team != thread) continue;
        const int ranks = int(std::min<int64_t>(kRanks, entry.width - j));
        float* to = a + row * max_width + j;
        if (entry.dtype == 0)
          shrink(x + row * hidden, rows, hidden, reinterpret_cast<const float*>(entry.down) + j * hidden,
                 ranks, 1.0f, to, max_width);
        else
          shrink(x + row * hidden, rows, hidden, reinterpret_cast<const bf16*>(entry.down) + j * hidden,
                 ranks, 1.0f, to, max_width);
        for (int64_t r = 0; r < rows; r++)
          for (int k = 0; k < ranks; k++)
            to[r * max_width + k] =
                scaling * apply(entry.activation, to[r * max_width + k] + (bias ? bias[j + k] : 0));
      }
    }
  }
}

// The calling thread's share of a site's rows; every thread of the team calls it, and needs a barrier before
// it reads another's outputs. Rows of no adapter at the site are left alone. `out` gets the residual stream
// after the site, minus r `minus` times.
//   r, h, out: [rows, hidden]; `out` may be r or h.
//   scratch: rows * (2 * hidden + max_width) floats.
template <typename T>
void bottleneck_share(const Site& site, const Segment* segments, int64_t num_segments, const T* r, const T* h,
                      T* out, int64_t rows, int64_t hidden, float* scratch, int64_t max_width,
                      int64_t minus) {
  constexpr int64_t kRows = 16;
  float *x = scratch, *y = x + rows * hidden, *a = y + rows * hidden;
  for_adapted_rows(site, segments, num_segments, [&](int64_t row, const Bottleneck& entry) {
    float* to = x + row * hidden;
    for (int64_t i = 0; i < hidden; i++)
      to[i] = (entry.reads != kReadsOutput ? to_float(r[row * hidden + i]) : 0) +
              (entry.reads != kReadsResidual ? to_float(h[row * hidden + i]) : 0);
    if (entry.normalizes) layer_norm(to, hidden);
  });
#pragma omp barrier
  down_share(site, segments, num_segments, hidden, x, a, max_width);
#pragma omp barrier
  const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  const int64_t panels = (hidden + kPanel - 1) / kPanel;
  bool norms = false;
  for (int64_t s = 0; s < num_segments; s++) {
    if (!at_site(site, segments[s])) continue;
    const Bottleneck& entry = *at_site(site, segments[s]);
    norms |= entry.norm_weight != 0;
    const float* bias = reinterpret_cast<const float*>(entry.up_bias);
    const float keep = float(entry.residual - minus);
    for (int64_t panel = panels * thread / team; panel < panels * (thread + 1) / team; panel++) {
      const int64_t column = panel * kPanel, columns = std::min<int64_t>(kPanel, hidden - column);
      const int64_t at = panel * entry.width * kPanel;
      for (int64_t row = segments[s].first; row < segments[s].last; row += kRows) {
        const int64_t count = std::min<int64_t>(kRows, segments[s].last - row);
        alignas(64) float acc[kRows * kPanel] = {};
        if (bias)
          for (int64_t k = 0; k < count; k++)
            std::memcpy(acc + k * kPanel, bias + column, kPanel * sizeof(float));
        if (entry.dtype == 0)
          expand(acc, count, reinterpret_cast<const float*>(entry.up) + at, a + row * max_width, entry.width,
                 max_width);
        else
          expand(acc, count, reinterpret_cast<const bf16*>(entry.up) + at, a + row * max_width, entry.width,
                 max_width);
        for (int64_t k = 0; k < count; k++) {
          const int64_t first = (row + k) * hidden + column;
          for (int64_t c = 0; c < columns; c++) {
            const float from_r = to_float(r[first + c]), from_h = to_float(h[first + c]);
            if (!entry.norm_weight)
              from_float(acc[k * kPanel + c] + keep * from_r + from_h, out + first + c);
            else
              y[first + c] = acc[k * kPanel + c] +
                             (entry.norm_inside ? from_h + (entry.norm_skips_sum ? from_r : 0) : 0);
          }
        }
      }
    }
  }
  if (!norms) return;  // every thread alike
#pragma omp barrier
  for_adapted_rows(site, segments, num_segments, [&](int64_t row, const Bottleneck& entry) {
    if (!entry.norm_weight) return;
    const float* weight = reinterpret_cast<const float*>(entry.norm_weight);
    const float* bias = reinterpret_cast<const float*>(entry.norm_bias);
    layer_norm(y + row * hidden, hidden);
    for (int64_t i = 0; i < hidden; i++) {
      const int64_t at = row * hidden + i;
      const float from_r = to_float(r[at]), from_h = to_float(h[at]);
      float result = y[at] * weight[i] + bias[i] + float(entry.residual - minus) * from_r;
      if (!entry.norm_inside) result += from_h + (entry.norm_skips_sum ? from_r : 0);
      from_float(result, out + at);
    }
  });
}

template <typename T>
void bottleneck(const Site& site, const Segment* segments, int64_t num_segments, const T* r, const T* h,
                T* out, int64_t rows, int64_t hidden, float* scratch, int64_t max_width, int64_t minus,
                int threads) {
#pragma omp parallel num_threads(threads)
  bottleneck_share(site, segments, num_segments, r, h, out, rows, hidden, scratch, max_width, minus);
}

}  // namespace
