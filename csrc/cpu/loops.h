// The vectorised inner loops of the CPU launchers, and the blocks in which these run them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../include/vjepa/adamw.h"
#include "../include/vjepa/ema.h"

namespace vjepa {

// Elements; what one loop hands on to the next stays in the first-level cache. One loop over all arrays of an update
// would defeat compilers and prefetchers.
constexpr int64_t kBlock = 1024;

// Elements of an update from which copies are written past the caches: they would be read from memory first only to be
// overwritten, and evict what the next operation needs. Below, the caches hold all.
constexpr int64_t kStreamed = 1 << 22;

using EmaLoop = void (*)(const vjepa_ema_tensor &, int64_t begin, int64_t end, EmaStep);
using AdamwLoop = void (*)(const vjepa_adamw_tensor &, int64_t begin, int64_t end, const AdamwStep &);

// For dtypes that were checked.
EmaLoop ema_loop(int64_t source_dtype);
AdamwLoop adamw_loop(int64_t grad_dtype);

// to[begin, end) <- from[begin, end), rounded; end - begin <= kBlock; `streamed`: past the caches.
void copy_block(const float *from, void *to, int64_t dtype, int64_t begin, int64_t end, bool streamed);

// After streamed copies, before another thread is told that the work is done.
void finish_streams();

// Calls block(first, last) on [begin, end).
template <class Block>
void for_blocks(int64_t begin, int64_t end, const Block &block) {
  for (int64_t first = begin; first < end; first += kBlock) block(first, std::min(first + kBlock, end));
}

}  // namespace vjepa
