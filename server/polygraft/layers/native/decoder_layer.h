// Neighbouring decoder layers in one team of threads, each of them: norm, q k v, rotary positions, attention,
// o, norm, gate and up, activation, down, and what is added around them. layers/decoder_layer.py tells which
// of the base's layers it stands in for. Every part is the operator that would otherwise be called by itself,
// rounded in the same places, so the results are the same to the bit.

#pragma once

#include "attention.h"
#include "bottleneck.h"
#include "elementwise.h"
#include "linear.h"

namespace {

struct Norm {
  const float* scale;  // null: there is none
  float eps;
  const int64_t* table;  // by slot the address of an adapter's own scale, or 0
  int64_t slots;         // in the table; adapters in later ones have none
};

struct DecoderLayer {  // layers/decoder_layer.py fills it
  const Layer* attention;
  const Group *qkv, *o, *gate_up, *down;
  Norm before_attention, after_attention, before_mlp, after_mlp;
  Norm q, k;  // over a head
  int64_t hidden;
  int64_t activation;
  const Site *attention_site, *mlp_site;  // of bottleneck adapters, or null
};

struct Rows {             // the step's rows as a layer sees them; layers/decoder_layer.py fills it
  const void *cos, *sin;  // [rows, head_dim], in the base's type
  const Plan* plan;
  const Segment* segments;
  int64_t num_segments;
  float* scratch;  // [rows, kMaxModules * max_rank], and what bottleneck_share needs
  int64_t max_rank;
  int64_t max_width;  // the largest of a bottleneck
  void* buffer;  // of the base's type, for each row as many elements as the largest `buffer_width` of the
                 // layers
};

// Which products have side paths in this step, whether any norm has a scale of its own, and which sites have
// bottlenecks, a bit each.
enum Adapted { kQkv = 1, kO = 2, kGateUp = 4, kDown = 8, kNorms = 16, kAttentionSite = 32, kMlpSite = 64 };

inline int64_t outputs_of(const Group& group) {
  int64_t width = 0;
  for (int64_t m = 0; m < group.modules; m++) width += group.module[m].width;
  return width;
}

// Elements that a row needs between a layer's operators.
inline int64_t buffer_width(const DecoderLayer& layer) {
  const Layer& attention = *layer.attention;
  return layer.hidden + outputs_of(*layer.qkv) + attention.heads * attention.value_dim +
         outputs_of(*layer.gate_up);
}

// Rows [from, to) of `number` heads of `width` each, every run of rows by its adapter's own scale if it has
// one. `out` may be `x`.
template <typename T>
void norm_rows(const Norm& norm, const Segment* segments, int64_t num_segments, int64_t from, int64_t to,
               int64_t number, int64_t width, const T* x, T* out) {
  auto run = [&](int64_t until, const float* scale) {
    const int64_t at = from * number * width;
    if (until > from) rms_norm(x + at, (until - from) * number, width, scale, norm.eps, out + at);
    from = std::max(from, until);
  };
  for (int64_t s = 0; s < num_segments; s++) {
    const Segment& segment = segments[s];
    const auto* own =
        segment.slot < norm.slots ? reinterpret_cast<const float*>(norm.table[segment.slot]) : nullptr;
    if (!own || segment.last <= from || segment.first >= to) continue;
    run(segment.first, norm.scale);
    run(std::min<int64_t>(segment.last, to), own);
  }
  run(to, norm.scale);
}

// The calling thread's share of a layer; every thread of the team calls it. x and out [rows, hidden], out may
// be x. Of both a thread reads no rows but its own before the first barrier, and writes none but its own
// behind the last one: between two layers it needs none. `next` is the layer behind it or null, of which
// `next_adapted` is true.
template <typename T>
void decoder_layer_share(const DecoderLayer& layer, const Rows& step, int64_t adapted, const T* x, T* out,
                         const DecoderLayer* next, int64_t next_adapted) {
  const Layer& attention = *layer.attention;
  const int64_t rows = step.plan->num_rows, hidden = layer.hidden;
  const int64_t heads = attention.heads, kv_heads = attention.kv_heads, dim = attention.head_dim;
  const int64_t q_width = heads * dim, k_width = kv_heads * dim, v_width = kv_heads * attention.value_dim;
  const int64_t attended_width = heads * attention.value_dim, inner = layer.down->in_features;
  T* state = static_cast<T*>(step.buffer);  // what the next product reads, or the last one has given
  T* q = state + rows * hidden;
  T* k = q + rows * q_width;
  T* v = k + rows * k_width;
  T* attended = v + rows * v_width;
  T* gated = attended + rows * attended_width;
  T* up = gated + rows * inner;
  const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  const int64_t from = rows * thread / team, count = rows * (thread + 1) / team - from;
  const int64_t own = adapted & kNorms ? step.num_segments : 0;
  auto project = [&](const Group& group, Adapted bit, const T* in, std::initializer_list<T*> to,
                     const Group* following, bool follows) {
    linear_share(group, in, rows, to.begin(), step.segments, adapted & bit ? step.num_segments : 0,
                 step.scratch, step.max_rank, follows ? following : nullptr, step.num_segments);
  };
  auto normalise = [&](const Norm& norm, const T* in, T* to) {
    if (norm.scale) norm_rows(norm, step.segments, own, from, from + count, 1, hidden, in, to);
  };
  auto place = [&](const Norm& norm, T* in, int64_t number) {
    T* mine = in + from * number * dim;
    if (norm.scale) norm_rows(norm, step.segments, own, from, from + count, number, dim, in, in);
    rotate(mine, number * dim, dim, count, number, dim, static_cast<const T*>(step.cos) + from * dim,
           static_cast<const T*>(step.sin) + from * dim, mine);
  };
  // Adds h to r for the thread's own rows, once bottlenecks have changed their adapters' rows.
  auto add_to_stream = [&](const Site* site, Adapted bit, const T* r, T* h) {
    if (adapted & bit) {
#pragma omp barrier
      bottleneck_share(*site, step.segments, step.num_segments, r, h, h, rows, hidden, step.scratch,
                       step.max_width, 1);
#pragma omp barrier
    }
    add(r + from * hidden, h + from * hidden, count * hidden, out + from * hidden);
  };
  normalise(layer.before_attention, x, state);
#pragma omp barrier
  project(*layer.qkv, kQkv, state, {q, k, v}, layer.o, adapted & kO);
#pragma omp barrier
  place(layer.q, q, heads);
  place(layer.k, k, kv_heads);
  write_cache(attention, *step.plan, k, Strides{k_width, dim}, v, Strides{v_width, attention.value_dim}, from,
              from + count);
#pragma omp barrier
  attend_share(attention, *step.plan, q, Strides{q_width, dim}, attended);
  project(*layer.o, kO, attended, {state}, layer.gate_up, adapted & kGateUp);
#pragma omp barrier
  normalise(layer.after_attention, state, state);
  add_to_stream(layer.attention_site, kAttentionSite, x, state);
  normalise(layer.before_mlp, out, state);
#pragma omp barrier
  project(*layer.gate_up, kGateUp, state, {gated, up}, layer.down, adapted & kDown);
#pragma omp barrier
  gate(gated + from * inner, up + from * inner, count * inner, int(layer.activation), gated + from * inner);
#pragma omp barrier
  project(*layer.down, kDown, gated, {state}, next ? next->qkv : nullptr, next_adapted & kQkv);
#pragma omp barrier
  normalise(layer.after_mlp, state, state);
  add_to_stream(layer.mlp_site, kMlpSite, out, state);
}

// `count` layers, each reading what the one before it gives. adapted [count]; x and out [rows, hidden], not
// the same.
template <typename T>
void decoder_layers(const DecoderLayer* const* layers, const int64_t* adapted, int64_t count,
                    const Rows& step, const T* x, T* out, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t n = 0; n < count; n++) {
    const bool last = n + 1 == count;
    decoder_layer_share(*layers[n], step, adapted[n], n == 0 ? x : out, out, last ? nullptr : layers[n + 1],
                        last ? 0 : adapted[n + 1]);
  }
}

}  // namespace
