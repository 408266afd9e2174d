// An adapter folded into a module's weights: W, rotated and scaled, + B A with its scaling and Kronecker
// products, rounded once, in panels of the base's type. layers/linear/merging.py keeps the copies.

#pragma once

#include "linear.h"

namespace {

// One panel of weights in float32, wide [inputs, kPanel]; inputs are padded as panels of T are.
template <typename T>
void widen_panel(const Weights& from, int64_t panel, int64_t in, float* wide) {
  if (from.storage == kRowsType) {
    const auto* w = Panel<T>::at(from.weight, panel, in);
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(wide, w, in * kPanel * sizeof(float));
    } else {
      for (int64_t p = 0; p < Panel<T>::inputs(in) / 2; p++)
        for (int v = 0; v < kVecs; v++) {
          store(wide + 2 * p * kPanel + v * kLanes, lower(w + p * kPanel + v * kLanes));
          store(wide + (2 * p + 1) * kPanel + v * kLanes, upper(w + p * kPanel + v * kLanes));
        }
    }
  } else if (from.storage == kInt8) {
    widen_int8(from.weight, from.scale, panel, in, wide);
    std::fill(wide + in * kPanel, wide + Panel<T>::inputs(in) * kPanel, 0.0f);
  } else {
    widen_4bit(static_cast<const uint8_t*>(from.weight) + panel * in / 2 * kPanel,
               from.scale + panel * in / kScaleInputs * kPanel, Codes(from.values), in, wide);
  }
}

inline void store_panel_weights(const float* wide, int64_t in, float* out) {
  std::memcpy(out, wide, in * kPanel * sizeof(float));
}
inline void store_panel_weights(const float* wide, int64_t in, uint32_t* out) {
  for (int64_t p = 0; p < Panel<bf16>::inputs(in) / 2; p++)
    for (int64_t c = 0; c < kPanel; c++) {
      bf16 even, odd;
      from_float(wide[2 * p * kPanel + c], &even);
      from_float(wide[(2 * p + 1) * kPanel + c], &odd);
      out[p * kPanel + c] = even.bits | uint32_t(odd.bits) << 16;
    }
}

// A^T [in, rank] in float32.
template <typename W>
void transpose(const W* a, int64_t rank, int64_t in, float* out) {
  for (int64_t r = 0; r < rank; r++)
    for (int64_t i = 0; i < in; i++) out[i * rank + r] = to_float(a[r * in + i]);
}

// The same of an A that lies in panels.
template <typename T>
void transpose_panels(const void* a, int64_t rank, int64_t in, float* out) {
  const Weights from{a, nullptr, nullptr, nullptr, kRowsType};
  std::vector<float> wide(Panel<T>::inputs(in) * kPanel);
  for (int64_t panel = 0; panel < rank / kPanel; panel++) {
    widen_panel<T>(from, panel, in, wide.data());
    for (int64_t i = 0; i < in; i++)
      std::memcpy(out + i * rank + panel * kPanel, wide.data() + i * kPanel, kPanel * sizeof(float));
  }
}

// A^T [in, rank] of an adapter times its scaling, in float32.
inline void transpose_a(const Entry& entry, int64_t in, float* out) {
  const void* a = reinterpret_cast<const void*>(entry.a);
  if (entry.a_in_panels())
    (entry.dtype == 0 ? transpose_panels<float> : transpose_panels<bf16>)(a, entry.rank, in, out);
  else if (entry.dtype == 0)
    transpose(static_cast<const float*>(a), entry.rank, in, out);
  else
    transpose(static_cast<const bf16*>(a), entry.rank, in, out);
  const float scaling = entry.factor(1.0f);
  for (int64_t i = 0; i < in * entry.rank; i++) out[i] *= scaling;
}

// wide [in, kPanel] times an adapter's scale of the inputs.
inline void scale_inputs(const Entry& entry, int64_t in, float* wide) {
  const float* inputs = reinterpret_cast<const float*>(entry.in_scale);
  if (!inputs) return;
  for (int64_t i = 0; i < in; i++)
    for (int64_t c = 0; c < kPanel; c++) wide[i * kPanel + c] *= inputs[i];
}

// Panels [first, last) of a module's weights with the adapter in `slot`, to where they belong in `out`.
template <typename T>
void merge(const Group& group, int64_t member, int64_t slot, int64_t first, int64_t last, void* out,
           int threads) {
  const Module& module = group.module[member];
  const Entry& entry = module.table[slot];
  const int64_t in = group.in_features, inputs = Panel<T>::inputs(in), rank = entry.rank;
  const Kron kron = kron_of(entry, in, module.width);
  std::vector<float> a(in * rank);
  transpose_a(entry, in, a.data());
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> wide(inputs * kPanel);
#pragma omp for
    for (int64_t panel = first; panel < last; panel++) {
      widen_panel<T>(module.weights, panel, in, wide.data());
      rotate_panel(entry, in, wide.data());
      scale_inputs(entry, in, wide.data());
      if (entry.out_scale && !entry.scales_sum()) scale_outputs(entry, panel, in, wide.data());
      const int64_t at = panel * rank * kPanel;
      if (entry.dtype == 0)
        expand(wide.data(), in, reinterpret_cast<const float*>(entry.b) + at, a.data(), rank, rank);
      else
        expand(wide.data(), in, reinterpret_cast<const bf16*>(entry.b) + at, a.data(), rank, rank);
      if (entry.out_scale && entry.scales_sum()) scale_outputs(entry, panel, in, wide.data());
      const int64_t column = panel * kPanel;
      kron_fold(kron, column, std::min<int64_t>(kPanel, module.width - column), wide.data(), kPanel);
      store_panel_weights(wide.data(), in, Panel<T>::at(out, panel, in));
    }
  }
}

}  // namespace
