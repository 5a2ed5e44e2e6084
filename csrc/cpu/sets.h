// Walks over the tokens of ragged sets.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../capi_tokens.h"
#include "../include/vjepa/macros.h"

namespace vjepa {

// VJEPA_OK if every token exists.
inline int32_t check_sets(const vjepa_sets &sets) {
  if (sets.total < 0 || sets.sets < 0 || sets.batch < 0 || sets.length < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (sets.sets && (sets.offsets[0] != 0 || sets.offsets[sets.sets] != sets.total)) return VJEPA_ERROR_INDEX;
  for (int64_t s = 0; s < sets.sets; ++s) {
    if (sets.offsets[s] > sets.offsets[s + 1] || sets.clips[s] < 0 || sets.clips[s] >= sets.batch)
      return VJEPA_ERROR_INDEX;
  }
  bool inside = true;
  for (int64_t i = 0; i < sets.total; ++i) inside &= sets.indices[i] >= 0 && sets.indices[i] < sets.length;
  return inside ? VJEPA_OK : VJEPA_ERROR_INDEX;
}

// Calls visit(i, clip, token) for tokens first .. last - 1.
template <class Visit>
VJEPA_HOST_DEVICE void for_tokens(const vjepa_sets &sets, int64_t first, int64_t last, const Visit &visit) {
  if (first >= last) return;
  int64_t set = std::upper_bound(sets.offsets, sets.offsets + sets.sets + 1, first) - sets.offsets - 1;
  for (int64_t i = first; i < last; ++i) {
    while (i >= sets.offsets[set + 1]) ++set;
    visit(i, sets.clips[set], sets.indices[i]);
  }
}

}  // namespace vjepa
