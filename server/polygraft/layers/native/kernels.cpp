// The operators that a step runs: products with the adapters' side paths, attention over the paged cache, the
// small operations between them, and whole decoder layers of these. layers/ holds each in torch as well,
// which is the reference in the tests and the fallback where no compiler is at hand.
//
// Plain C++ with GCC/Clang vector extensions and OpenMP, no torch headers: it builds in seconds and doesn't
// depend on torch's ABI. Everything is computed in float32, whatever it is stored in.

#include "decoder_layer.h"
#include "layouts.h"
#include "likeliest.h"
#include "merge.h"

namespace {

// Calls run with a null pointer of the base's type (0 float32, 1 bfloat16).
template <typename Run>
void by_type(int dtype, Run&& run) {
  if (dtype == 0)
    run(static_cast<float*>(nullptr));
  else
    run(static_cast<bf16*>(nullptr));
}

}  // namespace

extern "C" {

// Columns in a panel of packed weights.
int64_t polygraft_panel() { return kPanel; }

// How the structures that Python fills lie in memory.
const char* polygraft_layouts() {
  static const std::string text = describe_layouts();
  return text.c_str();
}

// x [rows, in] in the base's type; outs [modules][rows, width] in `out_dtype`, which is the base's, or
// float32 for the head, whose sums aren't rounded; segments [n] of `Segment`; scratch float32 [rows,
// kMaxModules * max_rank].
void polygraft_linear(int dtype, int out_dtype, const void* group, const void* x, int64_t rows,
                      void* const* outs, const void* segments, int64_t num_segments, float* scratch,
                      int64_t max_rank, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto out_type) {
      using O = std::remove_pointer_t<decltype(out_type)>;
      linear(*static_cast<const Group*>(group), static_cast<const T*>(x), rows,
             reinterpret_cast<O* const*>(outs), static_cast<const Segment*>(segments), num_segments, scratch,
             max_rank, threads);
    };
    if (out_dtype == dtype)
      run(type);
    else
      run(static_cast<float*>(nullptr));
  });
}

// Panels [first, last) of one module's weights with the low-rank weights in `slot` folded in; out: all panels
// of the module, in the base's type.
void polygraft_merge(int dtype, const void* group, int64_t member, int64_t slot, int64_t first, int64_t last,
                     void* out, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    merge<T>(*static_cast<const Group*>(group), member, slot, first, last, out, threads);
  });
}

// r, h and out [rows, hidden] as `bottleneck_share` has them; scratch float32 [rows, 2 * hidden + max_width].
void polygraft_bottleneck(int dtype, const void* site, const void* segments, int64_t num_segments,
                          const void* r, const void* h, void* out, int64_t rows, int64_t hidden,
                          float* scratch, int64_t max_width, int64_t minus, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bottleneck(*static_cast<const Site*>(site), static_cast<const Segment*>(segments), num_segments,
               static_cast<const T*>(r), static_cast<const T*>(h), static_cast<T*>(out), rows, hidden,
               scratch, max_width, minus, threads);
  });
}

// q, k, v: the rows' projections, last dimension contiguous, strides in elements; their keys and values
// are written to the cache first. out [rows, heads, value_dim], contiguous.
void polygraft_paged_attention(int dtype, const void* layer, const void* plan, const void* q, int64_t q_row,
                               int64_t q_head, const void* k, int64_t k_row, int64_t k_head, const void* v,
                               int64_t v_row, int64_t v_head, void* out, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    paged_attention(*static_cast<const Layer*>(layer), *static_cast<const Plan*>(plan),
                    static_cast<const T*>(q), Strides{q_row, q_head}, static_cast<const T*>(k),
                    Strides{k_row, k_head}, static_cast<const T*>(v), Strides{v_row, v_head},
                    static_cast<T*>(out), threads);
  });
}

// x and out [rows, width]; scale float32 [width].
void polygraft_rms_norm(int dtype, const void* x, int64_t rows, int64_t width, const float* scale, float eps,
                        void* out, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, width, threads, [&](int64_t from, int64_t to) {
      const int64_t at = from * width;
      rms_norm(static_cast<const T*>(x) + at, to - from, width, scale, eps, static_cast<T*>(out) + at);
    });
  });
}

// activation(x) * up, elementwise; activation 0 is silu, 1 gelu by tanh.
void polygraft_gate(int dtype, const void* x, const void* up, int64_t count, int activation, void* out,
                    int threads) {
  constexpr int64_t kPiece = 1024;
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows((count + kPiece - 1) / kPiece, kPiece, threads, [&](int64_t from, int64_t to) {
      const int64_t at = from * kPiece, end = std::min(count, to * kPiece);
      gate(static_cast<const T*>(x) + at, static_cast<const T*>(up) + at, end - at, activation,
           static_cast<T*>(out) + at);
    });
  });
}

// x [rows, heads, dim] by strides in elements, last dimension contiguous; cos and sin [rows, dim].
void polygraft_rotate(int dtype, const void* x, int64_t row_stride, int64_t head_stride, int64_t rows,
                      int64_t heads, int64_t dim, const void* cos, const void* sin, void* out, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, heads * dim, threads, [&](int64_t from, int64_t to) {
      rotate(static_cast<const T*>(x) + from * row_stride, row_stride, head_stride, to - from, heads, dim,
             static_cast<const T*>(cos) + from * dim, static_cast<const T*>(sin) + from * dim,
             static_cast<T*>(out) + from * heads * dim);
    });
  });
}

// logits [rows, width]; out [rows]: the first of the largest in each, or -1.
void polygraft_likeliest(int dtype, const void* logits, int64_t rows, int64_t width, int64_t* out,
                         int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, width, threads, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; r++)
        out[r] = likeliest(static_cast<const T*>(logits) + r * width, width);
    });
  });
}

// Elements of the base's type that a decoder layer needs in the step's buffer for a row.
int64_t polygraft_decoder_layer_buffer(const void* layer) {
  return buffer_width(*static_cast<const DecoderLayer*>(layer));
}

// x and out [rows, hidden], not the same. layers: addresses of `DecoderLayer`s; adapted, for each of them: a
// bit for each of `Adapted` that has something to do in this step.
void polygraft_decoder_layers(int dtype, const void* const* layers, const int64_t* adapted, int64_t count,
                              const void* rows, const void* x, void* out, int threads) {
  by_type(dtype, [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    decoder_layers(reinterpret_cast<const DecoderLayer* const*>(layers), adapted, count,
                   *static_cast<const Rows*>(rows), static_cast<const T*>(x), static_cast<T*>(out), threads);
  });
}
}
