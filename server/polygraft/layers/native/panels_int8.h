// Rows times one panel of int8 weights: weights by column and rows by row are whole numbers of at most 127
// times a scale, and their products are summed exactly (LLM.int8() without outliers, arXiv 2208.07339).
// Panels hold [inputs / 4, kPanel, 4], as unsigned bytes around 128.

#pragma once

#include "panels.h"
#include "rows_int8.h"

namespace {

// Rows of a tile. Without VNNI, what is between the products and their sums takes registers too.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kInt8Rows = kTileRows;
#else
constexpr int kInt8Rows = std::min(kTileRows, 4);
#endif

// acc [kVecs] += what was clipped off a row, times a panel.
inline void multiply_clips(const Clip* clip, const Clip* end, const uint8_t* panel, ivec* acc) {
  for (; clip < end; clip++) {
    const uint8_t* fours = panel + clip->input / 4 * kPanel * 4;
    const int shift = clip->input % 4 * 8;
    const shorts rest = shorts((clip->rest & 0xffff) + ivec{});
    for (int v = 0; v < kVecs; v++)
      acc[v] += multiply_pairs(shorts(ivec(load_fours(fours + v * kLanes * 4)) >> shift & 255), rest);
  }
}

// out [ROWS, kPanel] = rows [row, row + ROWS) times one panel, in float32 by the columns' and the rows'
// scales.
template <int ROWS, typename Dot>
void multiply_tile_int8(const Int8Rows& rows, int64_t row, const uint8_t* panel, const float* column_scale,
                        int64_t inputs, float* out, Ahead ahead) {
  const int8_t* x = rows.values.data() + row * inputs;
  const Clip* clips = rows.clips.data();
  const int32_t* clipped = rows.clipped.data() + row;
  ivec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++) {
    for (int v = 0; v < kVecs; v++) acc[r][v] = rows.start[row + r] + ivec{};
    multiply_clips(clips + clipped[r], clips + clipped[r + 1], panel, acc[r]);
  }
  const uint8_t* w = panel;
  for (int64_t i = 0; i < inputs; i += kInt8Inputs, w += kInt8Inputs * kPanel) {
    ahead.step();
    ahead.step();
    bytes first[kVecs], second[kVecs];
    for (int v = 0; v < kVecs; v++) {
      first[v] = load_fours(w + v * 4 * kLanes);
      second[v] = load_fours(w + 4 * kPanel + v * 4 * kLanes);
    }
    for (int r = 0; r < ROWS; r++) {
      const bytes x0 = splat_fours(x + r * inputs + i), x1 = splat_fours(x + r * inputs + i + 4);
      for (int v = 0; v < kVecs; v++) acc[r][v] = Dot::eight(acc[r][v], first[v], x0, second[v], x1);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) {
      const vec sums = __builtin_convertvector(acc[r][v], vec);
      store(out + r * kPanel + v * kLanes,
            sums * splat(rows.scale[row + r]) * load(column_scale + v * kLanes));
    }
}

template <typename Dot, int ROWS = kInt8Rows>
void multiply_int8(int64_t count, const Int8Rows& rows, int64_t row, const uint8_t* panel,
                   const float* column_scale, int64_t inputs, float* out, Ahead ahead) {
  if (count == ROWS) {
    multiply_tile_int8<ROWS, Dot>(rows, row, panel, column_scale, inputs, out, ahead);
  } else if constexpr (ROWS > 1) {
    multiply_int8<Dot, ROWS - 1>(count, rows, row, panel, column_scale, inputs, out, ahead);
  }
}

// out [count, kPanel] = the product of a block of rows with panel `p` of a module.
inline void multiply_panel_int8(const Int8Rows& rows, int64_t count, int64_t in, const void* weight,
                                const float* scale, int64_t p, float* out, Later& later) {
  const int64_t inputs = int8_inputs(in), bytes = inputs * kPanel;
  const int64_t tiles = (count + kInt8Rows - 1) / kInt8Rows;
  const uint8_t* panel = static_cast<const uint8_t*>(weight) + p * bytes;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t from = count * t / tiles, to = count * (t + 1) / tiles;
    const Ahead ahead = Ahead::of_tile(panel + bytes, bytes, t, tiles, inputs / 4, later);
    float* tile = out + from * kPanel;
#if POLYGRAFT_CLIPS_ROWS
    const SumOf sums = *std::max_element(rows.sums.data() + from, rows.sums.data() + to);
    if (sums == kFour) {
      multiply_int8<SumsOfFour>(to - from, rows, from, panel, scale + p * kPanel, inputs, tile, ahead);
      continue;
    }
    if (sums == kTwo) {
      multiply_int8<SumsOfTwo>(to - from, rows, from, panel, scale + p * kPanel, inputs, tile, ahead);
      continue;
    }
#endif
    multiply_int8<AnyRows>(to - from, rows, from, panel, scale + p * kPanel, inputs, tile, ahead);
  }
}

// One panel's weights in float32, wide [in, kPanel].
inline void widen_int8(const void* weight, const float* scale, int64_t p, int64_t in, float* wide) {
  const uint8_t* panel = static_cast<const uint8_t*>(weight) + p * int8_inputs(in) * kPanel;
  for (int64_t i = 0; i < in; i++)
    for (int64_t c = 0; c < kPanel; c++)
      wide[i * kPanel + c] = (panel[(i / 4 * kPanel + c) * 4 + i % 4] - 128) * scale[p * kPanel + c];
}

}  // namespace
