// The operators that a step runs: products with the adapters' side paths, attention over the paged cache,
// and the small operations between them. layers/ holds each in torch as well, which is the reference in the tests and the fallback where no
// compiler is at hand.
//
// Plain C++ with GCC/Clang vector extensions and OpenMP, no torch headers: it builds in seconds and doesn't
// depend on torch's ABI. Everything is computed in float32, whatever it is stored in.

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

extern "C" {

// Columns in a panel of packed weights.
int64_t polygraft_panel() { return kPanel; }

// x [rows, in] and outs [modules][rows, width] in the base's type (0 float32, 1 bfloat16); segments [n] of
// (first row, last row, slot); scratch float32 [rows, kMaxModules * max_rank].
void polygraft_linear(int dtype, const void* group, const void* x, int64_t rows, void* const* outs,
                      const void* segments, int64_t num_segments, float* scratch, int64_t max_rank,
                      int threads) {
  const Group& g = *static_cast<const Group*>(group);
  const Segment* s = static_cast<const Segment*>(segments);
  if (dtype == 0)
    linear(g, static_cast<const float*>(x), rows, reinterpret_cast<float* const*>(outs), s, num_segments,
           scratch, max_rank, threads);
  else
    linear(g, static_cast<const bf16*>(x), rows, reinterpret_cast<bf16* const*>(outs), s, num_segments,
           scratch, max_rank, threads);
}

// q, k, v: the rows' projections, last dimension contiguous, strides in elements; their keys and values
// are written to the cache first. out [rows, heads, value_dim], contiguous.
void polygraft_paged_attention(int dtype, const void* layer, const void* plan, const void* q, int64_t q_row,
                               int64_t q_head, const void* k, int64_t k_row, int64_t k_head, const void* v,
                               int64_t v_row, int64_t v_head, void* out, int threads) {
  const Layer& l = *static_cast<const Layer*>(layer);
  const Plan& p = *static_cast<const Plan*>(plan);
  if (dtype == 0)
    paged_attention(l, p, static_cast<const float*>(q), Strides{q_row, q_head},
                    static_cast<const float*>(k), Strides{k_row, k_head}, static_cast<const float*>(v),
                    Strides{v_row, v_head}, static_cast<float*>(out), threads);
  else
    paged_attention(l, p, static_cast<const bf16*>(q), Strides{q_row, q_head}, static_cast<const bf16*>(k),
                    Strides{k_row, k_head}, static_cast<const bf16*>(v), Strides{v_row, v_head},
                    static_cast<bf16*>(out), threads);
}

// x and out [rows, width]; scale float32 [width].
void polygraft_rms_norm(int dtype, const void* x, int64_t rows, int64_t width, const float* scale, float eps,
                        void* out, int threads) {
  if (dtype == 0)
    rms_norm(static_cast<const float*>(x), rows, width, scale, eps, static_cast<float*>(out), threads);
  else
    rms_norm(static_cast<const bf16*>(x), rows, width, scale, eps, static_cast<bf16*>(out), threads);
}

// activation(x) * up, elementwise; activation 0 is silu, 1 gelu by tanh.
void polygraft_gate(int dtype, const void* x, const void* up, int64_t count, int activation, void* out,
                    int threads) {
  if (dtype == 0)
    gate(static_cast<const float*>(x), static_cast<const float*>(up), count, activation,
         static_cast<float*>(out), threads);
  else
    gate(static_cast<const bf16*>(x), static_cast<const bf16*>(up), count, activation,
         static_cast<bf16*>(out), threads);
}

// x [rows, heads, dim] by strides in elements, last dimension contiguous; cos and sin [rows, dim].
void polygraft_rotate(int dtype, const void* x, int64_t row_stride, int64_t head_stride, int64_t rows,
                      int64_t heads, int64_t dim, const void* cos, const void* sin, void* out, int threads) {
  if (dtype == 0)
    rotate(static_cast<const float*>(x), row_stride, head_stride, rows, heads, dim,
           static_cast<const float*>(cos), static_cast<const float*>(sin), static_cast<float*>(out), threads);
  else
    rotate(static_cast<const bf16*>(x), row_stride, head_stride, rows, heads, dim,
           static_cast<const bf16*>(cos), static_cast<const bf16*>(sin), static_cast<bf16*>(out), threads);
}
}
