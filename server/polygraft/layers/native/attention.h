// Attention over the paged cache; layers/attention.py holds the same in torch.

#pragma once

#include <omp.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "vectors.h"

namespace {

struct Plan {                   // one step; layers/attention.py fills it
  const int64_t* slot_mapping;  // [rows] where each row's key and value go: block * block_size + offset
  const int32_t* query_start;   // [sequences + 1] first row of each sequence
  const int32_t* context_lens;  // [sequences] keys visible to a sequence's last row, its prefix included
  const int32_t* prefix_lens;   // [sequences] keys in shared prefix blocks
  const int32_t* block_tables;  // [sequences, max_blocks] prefix blocks first, then the sequence's own
  int64_t max_blocks;
  int64_t num_sequences;
  int64_t num_rows;
  const uint8_t* bare;  // [sequences, layers] 1 where a layer has nothing of the sequence's prefix, or null
  int64_t num_layers;
};

struct Layer {        // one attention layer; layers/attention.py fills it
  void* key_cache;    // [blocks, kv_heads, head_dim, block_size]: keys lie side by side, so that a
                      // query's scores against a block are computed a vector of keys at a time
  void* value_cache;  // [blocks, kv_heads, block_size, value_dim]
  int64_t heads, kv_heads, head_dim, value_dim, block_size;
  int64_t window;      // keys visible to a row, itself included; 0: all
  const float* sinks;  // [heads] logits of a key with no value (gpt-oss), or null
  float scaling, softcap;
  int64_t index;  // among the attention layers
};

struct Strides {
  int64_t row, head;
};

// Sums of each score, taken in turn: a single one would wait for its own last addition where registers are
// many.
constexpr int kChains = kLanes == 16 ? 2 : 1;

// Scores of Q queries [Q, dim] against V vectors of neighbouring keys [dim, block_size].
template <int Q, int V, typename T>
inline void score_tile(const float* query, int64_t dim, const T* keys, int64_t block_size, float* scores,
                       int64_t stride, Ahead next, Ahead values) {
  vec acc[kChains][Q][V] = {};
  auto add = [&](int64_t d, vec (&sums)[Q][V]) {
    next.step();
    values.step();
    vec k[V];
    for (int v = 0; v < V; v++) k[v] = load(keys + d * block_size + v * kLanes);
    for (int n = 0; n < Q; n++) {
      const vec one = splat(query[n * dim + d]);
      for (int v = 0; v < V; v++) sums[n][v] += one * k[v];
    }
  };
  int64_t d = 0;
  for (; d + kChains <= dim; d += kChains)
    for (int c = 0; c < kChains; c++) add(d + c, acc[c]);
  for (; d < dim; d++) add(d, acc[0]);
  for (int n = 0; n < Q; n++)
    for (int v = 0; v < V; v++) {
      vec total = acc[0][n][v];
      for (int c = 1; c < kChains; c++) total += acc[c][n][v];
      store(scores + n * stride + v * kLanes, total);
    }
}

// result [Q, V vectors of vdim] += scores [Q, from:to] times values [from:to, vdim]
template <int Q, int V, typename T>
inline void value_tile(const float* scores, int64_t stride, const T* values, int64_t vdim, int64_t from,
                       int64_t to, float* result) {
  vec acc[Q][V];
  for (int n = 0; n < Q; n++)
    for (int v = 0; v < V; v++) acc[n][v] = load(result + n * vdim + v * kLanes);
  for (int64_t k = from; k < to; k++) {
    vec value[V];
    for (int v = 0; v < V; v++) value[v] = load(values + k * vdim + v * kLanes);
    for (int n = 0; n < Q; n++) {
      const vec one = splat(scores[n * stride + k]);
      for (int v = 0; v < V; v++) acc[n][v] += one * value[v];
    }
  }
  for (int n = 0; n < Q; n++)
    for (int v = 0; v < V; v++) store(result + n * vdim + v * kLanes, acc[n][v]);
}

// Calls visit(first, Q) with Q a constant, for queries in tiles of four and less.
template <typename Visit>
inline void for_tiles(int64_t queries, Visit&& visit) {
  int64_t i = 0;
  for (; i + 4 <= queries; i += 4) visit(i, std::integral_constant<int, 4>());
  if (queries - i == 3) visit(i, std::integral_constant<int, 3>());
  if (queries - i == 2) visit(i, std::integral_constant<int, 2>());
  if (queries - i == 1) visit(i, std::integral_constant<int, 1>());
}

// The largest of s[0:count], NaN if any is.
inline float largest(const float* s, int64_t count) {
  float top = s[0];
  int64_t k = 0;
  if (count >= kLanes) {
    vec tops = load(s);
    for (; k + kLanes <= count; k += kLanes) {
      const vec v = load(s + k);
      tops = (v > tops) | (v != v) ? v : tops;
    }
    for (int i = 0; i < kLanes; i++) top = tops[i] > top || tops[i] != tops[i] ? tops[i] : top;
  }
  for (; k < count; k++) top = s[k] > top || s[k] != s[k] ? s[k] : top;
  return top;
}

// Blocks of keys that are fetched ahead: one takes less time to multiply by than to come from memory.
constexpr int64_t kBlocksAhead = 2;

// Rows [first_row, last_row) of a sequence, for one head of the keys; fetches the blocks of keys `after` them
// as well.
template <typename T>
void attend(const Layer& layer, const Plan& plan, int64_t sequence, int64_t kv_head, int64_t first_row,
            int64_t last_row, const T* q, Strides qs, T* out, const T* const (&after)[kBlocksAhead],
            std::vector<float>& scratch) {
  const int64_t group = layer.heads / layer.kv_heads;
  const int64_t dim = layer.head_dim, vdim = layer.value_dim, bs = layer.block_size;
  const int64_t rows = last_row - first_row, queries = rows * group;
  const int64_t sequence_end = plan.query_start[sequence + 1];
  const int64_t context = plan.context_lens[sequence];
  const int64_t prefix = plan.prefix_lens[sequence];
  const int64_t prefix_blocks = (prefix + bs - 1) / bs;
  const int32_t* table = plan.block_tables + sequence * plan.max_blocks;
  const bool bare = plan.bare && plan.bare[sequence * plan.num_layers + layer.index];
  const int64_t first_key = bare ? prefix : 0;  // nobody has written the prefix's slots in a bare layer
  // Row r sees keys [low(r), high(r)); the last row of the sequence sees all of the context.
  auto high = [&](int64_t row) { return context - (sequence_end - 1 - row); };
  auto low = [&](int64_t row) {
    return layer.window > 0 ? std::max<int64_t>(first_key, high(row) - layer.window) : first_key;
  };
  const int64_t begin = low(first_row), end = high(last_row - 1);
  const int64_t stride = (end + 2 * bs + kLanes) / kLanes * kLanes;
  scratch.resize(queries * (stride + dim + vdim));
  float* scores = scratch.data();            // [queries, stride]
  float* query = scores + queries * stride;  // [queries, dim], scaled
  float* result = query + queries * dim;     // [queries, vdim]
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < group; g++) {
      const T* from = q + (first_row + r) * qs.row + (kv_head * group + g) * qs.head;
      float* to = query + (r * group + g) * dim;
      for (int64_t d = 0; d < dim; d++) to[d] = to_float(from[d]) * layer.scaling;
    }
  // The keys of block b are [start, start + count): the last prefix block may be part full, and the
  // sequence's own blocks start after it.
  auto for_blocks = [&](auto&& visit) {
    for (int64_t b = 0;; b++) {
      const bool shared = b < prefix_blocks;
      const int64_t start = shared ? b * bs : prefix + (b - prefix_blocks) * bs;
      if (start >= end) break;
      const int64_t count = std::min(shared ? std::min(bs, prefix - start) : bs, end - start);
      if (start + count > begin) visit(b, int64_t(table[b]), start, count);
    }
  };
  auto keys_of = [&](int64_t block) {
    return static_cast<const T*>(layer.key_cache) + (block * layer.kv_heads + kv_head) * dim * bs;
  };
  auto values_of = [&](int64_t block) {
    return static_cast<const T*>(layer.value_cache) + (block * layer.kv_heads + kv_head) * bs * vdim;
  };
  const int64_t blocks = prefix_blocks + std::max<int64_t>(0, end - prefix + bs - 1) / bs;
  for_blocks([&](int64_t b, int64_t block, int64_t start, int64_t count) {
    const T* keys = keys_of(block);
    // A later block's keys, and this one's values: every tile fetches them all, the first from memory.
    const int64_t then = b + kBlocksAhead;
    const Ahead ahead(then < blocks ? keys_of(table[then]) : after[std::min(then - blocks, kBlocksAhead - 1)],
                      bs * int64_t(sizeof(T)));
    const int64_t bytes = count * vdim * int64_t(sizeof(T));
    const Ahead behind = Ahead::of_tile(values_of(block), bytes, 0, 1, dim);
    if (bs % kLanes == 0) {
      int64_t lane = 0;
      for (; lane + kLanes < count && lane + 2 * kLanes <= bs; lane += 2 * kLanes)
        for_tiles(queries, [&](int64_t i, auto tile) {
          score_tile<tile.value, 2>(query + i * dim, dim, keys + lane, bs, scores + i * stride + start + lane,
                                    stride, ahead, behind);
        });
      for (; lane < count; lane += kLanes)
        for_tiles(queries, [&](int64_t i, auto tile) {
          score_tile<tile.value, 1>(query + i * dim, dim, keys + lane, bs, scores + i * stride + start + lane,
                                    stride, ahead, behind);
        });
    } else {
      for (int64_t i = 0; i < queries; i++)
        for (int64_t k = 0; k < count; k++) {
          float total = 0;
          for (int64_t d = 0; d < dim; d++) total += query[i * dim + d] * to_float(keys[d * bs + k]);
          scores[i * stride + start + k] = total;
        }
    }
  });
  for (int64_t i = 0; i < queries; i++) {
    float* s = scores + i * stride;
    const int64_t row = first_row + i / group, from = low(row), to = high(row);
    if (layer.softcap > 0)
      for (int64_t k = from; k < to; k++) s[k] = layer.softcap * std::tanh(s[k] / layer.softcap);
    float top = largest(s + from, to - from);
    float total = 0;
    if (layer.sinks) {
      const float sink = layer.sinks[kv_head * group + i % group];
      top = std::max(top, sink);
      total = std::exp(sink - top);
    }
    if (top != top || top - top != 0) {  // NaN or infinity: keep it visible
      for (int64_t k = from; k < to; k++) s[k] = NAN;
      total = NAN;
    } else {
      vec totals = {};
      int64_t k = from;
      for (; k + kLanes <= to; k += kLanes) {
        const vec e = exp_nonpositive(load(s + k) - top);
        store(s + k, e);
        totals += e;
      }
      total += sum(totals);
      if (k < to) {  // the row has room for a whole vector; what lies behind is never read
        const vec e = exp_nonpositive(load(s + k) - top);
        for (int64_t i = 0; k + i < to; i++) total += s[k + i] = e[i];
      }
    }
    const float scale = 1.0f / total;
    for (int64_t k = from; k < to; k++) s[k] *= scale;
    std::fill(s + begin, s + from, 0.0f);
    std::fill(s + to, s + end, 0.0f);
  }
  std::fill(result, result + queries * vdim, 0.0f);
  for_blocks([&](int64_t, int64_t block, int64_t start, int64_t count) {
    const T* values = values_of(block);
    const int64_t skip = std::max<int64_t>(0, begin - start);
    int64_t d = 0;
    for (; d + 2 * kLanes <= vdim; d += 2 * kLanes)
      for_tiles(queries, [&](int64_t i, auto tile) {
        value_tile<tile.value, 2>(scores + i * stride + start, stride, values + d, vdim, skip, count,
                                  result + i * vdim + d);
      });
    for (; d + kLanes <= vdim; d += kLanes)
      for_tiles(queries, [&](int64_t i, auto tile) {
        value_tile<tile.value, 1>(scores + i * stride + start, stride, values + d, vdim, skip, count,
                                  result + i * vdim + d);
      });
    for (; d < vdim; d++)
      for (int64_t i = 0; i < queries; i++)
        for (int64_t k = skip; k < count; k++)
          result[i * vdim + d] += scores[i * stride + start + k] * to_float(values[k * vdim + d]);
  });
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < group; g++) {
      const float* from = result + (r * group + g) * vdim;
      T* to = out + ((first_row + r) * layer.heads + kv_head * group + g) * vdim;
      int64_t d = 0;
      for (; d + kLanes <= vdim; d += kLanes) store(to + d, load(from + d));
      for (; d < vdim; d++) from_float(from[d], to + d);
    }
}

// Write rows [from, to) of keys and values to the cache.
template <typename T>
void write_cache(const Layer& layer, const Plan& plan, const T* k, Strides ks, const T* v, Strides vs,
                 int64_t from, int64_t to) {
  const int64_t bs = layer.block_size, dim = layer.head_dim, vdim = layer.value_dim;
  for (int64_t row = from; row < to; row++) {
    const int64_t slot = plan.slot_mapping[row], block = slot / bs, offset = slot % bs;
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      T* keys = static_cast<T*>(layer.key_cache) + (block * layer.kv_heads + h) * dim * bs + offset;
      const T* key = k + row * ks.row + h * ks.head;
      for (int64_t d = 0; d < dim; d++) keys[d * bs] = key[d];
      T* values = static_cast<T*>(layer.value_cache) + ((block * layer.kv_heads + h) * bs + offset) * vdim;
      std::memcpy(values, v + row * vs.row + h * vs.head, vdim * sizeof(T));
    }
  }
}

// The calling thread's share of all rows' attention, with a barrier behind it; the cache must be written.
template <typename T>
void attend_share(const Layer& layer, const Plan& plan, const T* q, Strides qs, T* out) {
  constexpr int64_t kRows = 16;
  struct Task {
    int64_t sequence, first_row, last_row;
  };
  static thread_local std::vector<Task> tasks;
  static thread_local std::vector<float> scratch;
  tasks.clear();
  for (int64_t s = 0; s < plan.num_sequences; s++)
    // The longest first, so that the threads end together.
    for (int64_t last = plan.query_start[s + 1]; last > plan.query_start[s]; last -= kRows)
      tasks.push_back({s, std::max<int64_t>(plan.query_start[s], last - kRows), last});
  const int64_t count = int64_t(tasks.size()), team = omp_get_num_threads();
  // By head and only then by sequence: a head's keys in blocks that sequences share are read from memory
  // for the first of them, and from the cores' own caches for the others.
#pragma omp for schedule(dynamic)
  for (int64_t t = 0; t < count * layer.kv_heads; t++) {
    const Task task = tasks[t % count];
    // The first keys of what this thread may do next.
    const int64_t next = (t + team) % (count * layer.kv_heads);
    const int32_t* table = plan.block_tables + tasks[next % count].sequence * plan.max_blocks;
    const T* after[kBlocksAhead];
    for (int64_t b = 0; b < kBlocksAhead; b++)
      after[b] = static_cast<const T*>(layer.key_cache) +
                 (table[std::min(b, plan.max_blocks - 1)] * layer.kv_heads + next / count) * layer.head_dim *
                     layer.block_size;
    attend(layer, plan, task.sequence, t / count, task.first_row, task.last_row, q, qs, out, after, scratch);
  }
}

template <typename T>
void paged_attention(const Layer& layer, const Plan& plan, const T* q, Strides qs, const T* k, Strides ks,
                     const T* v, Strides vs, T* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), rows = plan.num_rows;
    write_cache(layer, plan, k, ks, v, vs, rows * thread / team, rows * (thread + 1) / team);
#pragma omp barrier
    attend_share(layer, plan, q, qs, out);
  }
}

}  // namespace
