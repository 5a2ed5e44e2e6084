// Words that travel to a CUDA device as arguments of a launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../capi.h"
#include "macros.h"
#include "pack.h"

namespace vjepa {

constexpr int64_t kWords = 500;  // of one launch, whose arguments are at most 4096 bytes

struct Words {
  int64_t values[kWords];
};

// What thread `lane` of `lanes` does with the first `count` words.
VJEPA_HOST_DEVICE void write_words(int64_t *to, const Words &words, int64_t count, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < count; i += lanes) to[i] = words.values[i];
}

// Calls launch(to, words, count) for each piece of the words; returns the first status that is not VJEPA_OK.
template <class Launch>
int32_t write_in_pieces(int64_t *to, const int64_t *from, int64_t count, const Launch &launch) {
  if (count < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count > 0 && (!to || !from)) return VJEPA_ERROR_NULL_POINTER;
  for (int64_t done = 0; done < count; done += kWords) {
    const int64_t some = std::min(kWords, count - done);
    Words words{};
    std::copy(from + done, from + done + some, words.values);
    if (const int32_t status = launch(to + done, words, some)) return status;
  }
  return VJEPA_OK;
}

}  // namespace vjepa
