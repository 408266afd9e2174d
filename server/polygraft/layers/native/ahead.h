#pragma once

#include <cstdint>

namespace {

// What is read next, fetched from memory while something else is computed. The processor's own prefetching follows what
// is read: a panel of weights is read once from memory and then by every tile of rows from the cache, and blocks of the
// paged cache lie anywhere. Without this, memory and products would take turns.
struct Ahead {
  const char* from;  // may lie behind the last panel: nothing is read there
  int64_t pace;      // bytes in each step of a tile's loop

  // The part of `bytes` from `next` on that a tile fetches in `steps`.
  static Ahead of_tile(const void* next, int64_t bytes, int64_t tile, int64_t tiles, int64_t steps) {
    return {static_cast<const char*>(next) + bytes * tile / tiles, (bytes + tiles * steps - 1) / (tiles * steps)};
  }
  void step() {
    __builtin_prefetch(from, 0, 2);
    from += pace;
  }
};

}  // namespace
