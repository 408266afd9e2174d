// The operators that a step runs beside the base's own modules: low-rank side paths by segments, and
// attention over the paged cache. layers/low_rank.py and layers/attention.py hold the same in torch,
// which is the reference in the tests and the fallback where no compiler is at hand.
//
// Plain C++ with GCC/Clang vector extensions and OpenMP, no torch headers: it builds in two seconds
// and doesn't depend on torch's ABI. Everything is computed in float32, whatever it is stored in.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;  // floats in a vector: one AVX-512 register, two AVX2 ones
typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t hvec __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float f, float* out) { *out = f; }
inline void from_float(float f, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  // Round to nearest even, as torch does; NaN stays NaN.
  if (f != f) {
    out->bits = 0x7fc0;
  } else {
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof(h));
  const uvec u = __builtin_convertvector(h, uvec) << 16;
  vec v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}
inline vec splat(float x) { return vec{} + x; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, vec v) {
  uvec bits;
  std::memcpy(&bits, &v, sizeof(v));
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec is_nan = uvec(v != v);
  const hvec h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), hvec);
  std::memcpy(p, &h, sizeof(h));
}

inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

// e^x for x <= 0, within 2 ulp; the compiler turns the loops that call it into vector code, which it
// can't do with expf. Range reduction and polynomial after Cephes' expf.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// ---------------------------------------------------------------------------------------------------
// Low-rank side path

struct Entry {  // one row of a module's table; layers/low_rank.py fills it
  int64_t a;      // address of A [rank, in]
  int64_t b;      // address of B transposed, scaling folded in [rank, out]
  int64_t bias;   // address of the bias [out] in float32, or 0
  int64_t rank;   // 0: this adapter leaves the module alone
  int64_t dtype;  // of A and B: 0 float32, 1 bfloat16
};

// Dot products of up to ROWS rows of x with up to 4 rows of A.
template <int ROWS, typename X, typename W>
inline void shrink_tile(const X* x, int64_t in, const W* a, int ranks, float* h, int64_t h_stride) {
  vec acc[ROWS][4] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    vec w[4];
    for (int j = 0; j < 4; j++) w[j] = load(a + (j < ranks ? j : 0) * in + i);
    for (int r = 0; r < ROWS; r++) {
      const vec v = load(x + r * in + i);
      for (int j = 0; j < 4; j++) acc[r][j] += v * w[j];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int j = 0; j < ranks; j++) {
      float total = sum(acc[r][j]);
      for (int64_t k = i; k < in; k++) total += to_float(x[r * in + k]) * to_float(a[j * in + k]);
      h[r * h_stride + j] = total;
    }
  }
}

template <typename X, typename W>
void shrink(const X* x, int64_t rows, int64_t in, const W* a, int ranks, float* h, int64_t h_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) shrink_tile<4>(x + r * in, in, a, ranks, h + r * h_stride, h_stride);
  for (; r + 2 <= rows; r += 2) shrink_tile<2>(x + r * in, in, a, ranks, h + r * h_stride, h_stride);
  for (; r < rows; r++) shrink_tile<1>(x + r * in, in, a, ranks, h + r * h_stride, h_stride);
}

// out[rows, first:last] += h[rows, rank] @ b[rank, first:last] + bias[first:last]
template <int ROWS, typename X, typename W>
inline void expand_tile(X* out, int64_t width, const W* b, const float* bias, const float* h,
                        int64_t rank, int64_t h_stride, int64_t first, int64_t last) {
  constexpr int kVecs = 4;
  int64_t c = first;
  for (; c + kVecs * kLanes <= last; c += kVecs * kLanes) {
    vec acc[ROWS][kVecs];
    for (int r = 0; r < ROWS; r++)
      for (int k = 0; k < kVecs; k++) acc[r][k] = bias ? load(bias + c + k * kLanes) : vec{};
    for (int64_t j = 0; j < rank; j++) {
      vec w[kVecs];
      for (int k = 0; k < kVecs; k++) w[k] = load(b + j * width + c + k * kLanes);
      for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < kVecs; k++) acc[r][k] += splat(h[r * h_stride + j]) * w[k];
    }
    for (int r = 0; r < ROWS; r++) {
      X* o = out + r * width + c;
      for (int k = 0; k < kVecs; k++) store(o + k * kLanes, acc[r][k] + load(o + k * kLanes));
    }
  }
  for (; c < last; c++) {
    for (int r = 0; r < ROWS; r++) {
      float total = bias ? bias[c] : 0.0f;
      for (int64_t j = 0; j < rank; j++) total += h[r * h_stride + j] * to_float(b[j * width + c]);
      X* o = out + r * width + c;
      from_float(to_float(*o) + total, o);
    }
  }
}

template <typename X, typename W>
void expand(X* out, int64_t rows, int64_t width, const W* b, const float* bias, const float* h,
            int64_t rank, int64_t h_stride, int64_t first, int64_t last) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    expand_tile<4>(out + r * width, width, b, bias, h + r * h_stride, rank, h_stride, first, last);
  for (; r < rows; r++)
    expand_tile<1>(out + r * width, width, b, bias, h + r * h_stride, rank, h_stride, first, last);
}

template <typename X>
void low_rank(const X* x, X* out, int64_t in, int64_t width, const int32_t* segments,
              int64_t num_segments, const Entry* table, float* h, int64_t h_stride, int threads) {
  // A task is a piece of one segment, so that one long segment and many short ones both fill all
  // threads: shrink by 4 ranks and 64 rows, expand by 256 columns and 64 rows.
  constexpr int64_t kRows = 64, kRanks = 4, kColumns = 256;
  struct Task {
    int64_t row, rows, at;
    const Entry* entry;
  };
  static thread_local std::vector<Task> shrinks, expands;
  shrinks.clear();
  expands.clear();
  for (int64_t s = 0; s < num_segments; s++) {
    const int32_t* segment = segments + 3 * s;
    const Entry* entry = table + segment[2];
    if (entry->rank == 0 && entry->bias == 0) continue;
    for (int64_t row = segment[0]; row < segment[1]; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, segment[1] - row);
      for (int64_t j = 0; j < entry->rank; j += kRanks) shrinks.push_back({row, rows, j, entry});
      for (int64_t c = 0; c < width; c += kColumns) expands.push_back({row, rows, c, entry});
    }
  }
  const Task* shrink_tasks = shrinks.data();
  const Task* expand_tasks = expands.data();
  const int64_t num_shrinks = int64_t(shrinks.size()), num_expands = int64_t(expands.size());
  if (num_expands == 0) return;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < num_shrinks; t++) {
      const Task task = shrink_tasks[t];
      const int ranks = int(std::min<int64_t>(kRanks, task.entry->rank - task.at));
      float* to = h + task.row * h_stride + task.at;
      if (task.entry->dtype == 0)
        shrink(x + task.row * in, task.rows, in,
               reinterpret_cast<const float*>(task.entry->a) + task.at * in, ranks, to, h_stride);
      else
        shrink(x + task.row * in, task.rows, in,
               reinterpret_cast<const bf16*>(task.entry->a) + task.at * in, ranks, to, h_stride);
    }
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < num_expands; t++) {
      const Task task = expand_tasks[t];
      const float* bias = reinterpret_cast<const float*>(task.entry->bias);
      const float* from = h + task.row * h_stride;
      const int64_t last = std::min<int64_t>(width, task.at + kColumns);
      if (task.entry->dtype == 0)
        expand(out + task.row * width, task.rows, width,
               reinterpret_cast<const float*>(task.entry->b), bias, from, task.entry->rank, h_stride,
               task.at, last);
      else
        expand(out + task.row * width, task.rows, width,
               reinterpret_cast<const bf16*>(task.entry->b), bias, from, task.entry->rank, h_stride,
               task.at, last);
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Attention over the paged cache

struct Plan {  // one step; layers/attention.py fills it
  const int64_t* slot_mapping;  // [rows] where each row's key and value go: block * block_size + offset
  const int32_t* query_start;   // [sequences + 1] first row of each sequence
  const int32_t* context_lens;  // [sequences] keys visible to a sequence's last row, its prefix included
  const int32_t* prefix_lens;   // [sequences] keys in shared prefix blocks
  const int32_t* block_tables;  // [sequences, max_blocks] prefix blocks first, then the sequence's own
  int64_t max_blocks;
  int64_t num_sequences;
  int64_t num_rows;
};

struct Layer {  // one attention layer; layers/attention.py fills it
  void* key_cache;    // [blocks, kv_heads, head_dim, block_size]: keys lie side by side, so that a
                      // query's scores against a block are computed a vector of keys at a time
  void* value_cache;  // [blocks, kv_heads, block_size, value_dim]
  int64_t heads, kv_heads, head_dim, value_dim, block_size;
  int64_t window;     // keys visible to a row, itself included; 0: all
  const float* sinks; // [heads] logits of a key with no value (gpt-oss), or null
  float scaling, softcap;
};

struct Strides {
  int64_t row, head;
};

template <typename T>
void attend(const Layer& layer, const Plan& plan, int64_t sequence, int64_t kv_head, int64_t first_row,
            int64_t last_row, const T* q, Strides qs, T* out, std::vector<float>& scratch) {
  const int64_t group = layer.heads / layer.kv_heads;
  const int64_t dim = layer.head_dim, vdim = layer.value_dim, bs = layer.block_size;
  const int64_t rows = last_row - first_row, queries = rows * group;
  const int64_t sequence_end = plan.query_start[sequence + 1];
  const int64_t context = plan.context_lens[sequence];
  const int64_t prefix = plan.prefix_lens[sequence];
  const int64_t prefix_blocks = (prefix + bs - 1) / bs;
  const int32_t* table = plan.block_tables + sequence * plan.max_blocks;
  // Row r sees keys [low(r), high(r)); the last row of the sequence sees all of the context.
  auto high = [&](int64_t row) { return context - (sequence_end - 1 - row); };
  auto low = [&](int64_t row) {
    return layer.window > 0 ? std::max<int64_t>(0, high(row) - layer.window) : int64_t(0);
  };
  const int64_t begin = low(first_row), end = high(last_row - 1);
  const int64_t stride = (end + 2 * bs + kLanes) / kLanes * kLanes;
  scratch.resize(queries * (stride + dim + vdim));
  float* scores = scratch.data();                // [queries, stride]
  float* query = scores + queries * stride;      // [queries, dim], scaled
  float* result = query + queries * dim;         // [queries, vdim]
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
      if (start + count > begin) visit(int64_t(table[b]), start, count);
    }
  };
  for_blocks([&](int64_t block, int64_t start, int64_t count) {
    const T* keys = static_cast<const T*>(layer.key_cache) + (block * layer.kv_heads + kv_head) * dim * bs;
    if (bs % kLanes == 0) {
      for (int64_t lane = 0; lane < count; lane += kLanes) {
        int64_t i = 0;
        for (; i + 4 <= queries; i += 4) {
          vec acc[4] = {};
          for (int64_t d = 0; d < dim; d++) {
            const vec k = load(keys + d * bs + lane);
            for (int n = 0; n < 4; n++) acc[n] += splat(query[(i + n) * dim + d]) * k;
          }
          for (int n = 0; n < 4; n++) store(scores + (i + n) * stride + start + lane, acc[n]);
        }
        for (; i < queries; i++) {
          vec acc = {};
          for (int64_t d = 0; d < dim; d++) acc += splat(query[i * dim + d]) * load(keys + d * bs + lane);
          store(scores + i * stride + start + lane, acc);
        }
      }
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
    float top = s[from];
    for (int64_t k = from + 1; k < to; k++) top = s[k] > top || s[k] != s[k] ? s[k] : top;
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
      for (int64_t k = from; k < to; k++) s[k] = exp_nonpositive(s[k] - top);
      vec totals = {};
      int64_t k = from;
      for (; k + kLanes <= to; k += kLanes) totals += load(s + k);
      total += sum(totals);
      for (; k < to; k++) total += s[k];
    }
    const float scale = 1.0f / total;
    for (int64_t k = from; k < to; k++) s[k] *= scale;
    std::fill(s + begin, s + from, 0.0f);
    std::fill(s + to, s + end, 0.0f);
  }
  std::fill(result, result + queries * vdim, 0.0f);
  for_blocks([&](int64_t block, int64_t start, int64_t count) {
    const T* values =
        static_cast<const T*>(layer.value_cache) + (block * layer.kv_heads + kv_head) * bs * vdim;
    const int64_t skip = std::max<int64_t>(0, begin - start);
    int64_t d = 0;
    for (; d + kLanes <= vdim; d += kLanes) {
      int64_t i = 0;
      for (; i + 4 <= queries; i += 4) {
        vec acc[4];
        for (int n = 0; n < 4; n++) acc[n] = load(result + (i + n) * vdim + d);
        for (int64_t k = skip; k < count; k++) {
          const vec v = load(values + k * vdim + d);
          for (int n = 0; n < 4; n++) acc[n] += splat(scores[(i + n) * stride + start + k]) * v;
        }
        for (int n = 0; n < 4; n++) store(result + (i + n) * vdim + d, acc[n]);
      }
      for (; i < queries; i++) {
        vec acc = load(result + i * vdim + d);
        for (int64_t k = skip; k < count; k++)
          acc += splat(scores[i * stride + start + k]) * load(values + k * vdim + d);
        store(result + i * vdim + d, acc);
      }
    }
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

template <typename T>
void paged_attention(const Layer& layer, const Plan& plan, const T* q, Strides qs, const T* k, Strides ks,
                     const T* v, Strides vs, T* out, int threads) {
  constexpr int64_t kRows = 16;
  struct Task {
    int64_t sequence, first_row, last_row;
  };
  static thread_local std::vector<Task> tasks_of_caller;
  std::vector<Task>& tasks = tasks_of_caller;
  tasks.clear();
  for (int64_t s = 0; s < plan.num_sequences; s++)
    // The longest first, so that the threads end together.
    for (int64_t last = plan.query_start[s + 1]; last > plan.query_start[s]; last -= kRows)
      tasks.push_back({s, std::max<int64_t>(plan.query_start[s], last - kRows), last});
  const Task* all = tasks.data();
  const int64_t num_tasks = int64_t(tasks.size()) * layer.kv_heads;
  const int64_t bs = layer.block_size, dim = layer.head_dim, vdim = layer.value_dim;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < plan.num_rows; row++) {
      const int64_t slot = plan.slot_mapping[row], block = slot / bs, offset = slot % bs;
      for (int64_t h = 0; h < layer.kv_heads; h++) {
        T* keys = static_cast<T*>(layer.key_cache) + (block * layer.kv_heads + h) * dim * bs + offset;
        const T* key = k + row * ks.row + h * ks.head;
        for (int64_t d = 0; d < dim; d++) keys[d * bs] = key[d];
        T* values = static_cast<T*>(layer.value_cache) + ((block * layer.kv_heads + h) * bs + offset) * vdim;
        std::memcpy(values, v + row * vs.row + h * vs.head, vdim * sizeof(T));
      }
    }
    static thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < num_tasks; t++) {
      const Task task = all[t / layer.kv_heads];
      attend(layer, plan, task.sequence, t % layer.kv_heads, task.first_row, task.last_row, q, qs, out,
             scratch);
    }
  }
}

}  // namespace

extern "C" {

// x [rows, in], out [rows, width] in the base's type (0 float32, 1 bfloat16); segments [n, 3] of
// (first row, last row, slot); scratch float32 [rows, h_stride], h_stride >= the largest rank.
void polygraft_low_rank(int dtype, const void* x, void* out, int64_t in, int64_t width,
                        const int32_t* segments, int64_t num_segments, const void* table, float* scratch,
                        int64_t h_stride, int threads) {
  const Entry* entries = static_cast<const Entry*>(table);
  if (dtype == 0)
    low_rank(static_cast<const float*>(x), static_cast<float*>(out), in, width, segments, num_segments,
             entries, scratch, h_stride, threads);
  else
    low_rank(static_cast<const bf16*>(x), static_cast<bf16*>(out), in, width, segments, num_segments,
             entries, scratch, h_stride, threads);
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
}
