// What a table of tensors must satisfy before any of it is touched. Host only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../capi.h"
#include "pack.h"

namespace vjepa {

inline bool is_float_dtype(int64_t dtype) { return dtype >= VJEPA_FLOAT32 && dtype <= VJEPA_FLOAT16; }

inline bool is_copy_dtype(int64_t dtype) { return dtype == VJEPA_BFLOAT16 || dtype == VJEPA_FLOAT16; }

inline int32_t check_momentum(double momentum) {
  return momentum >= 0.0 && momentum <= 1.0 ? VJEPA_OK : VJEPA_ERROR_MOMENTUM;
}

constexpr int64_t kMaximumNumel = int64_t{1} << 60;  // its bytes fit in 64 bits

// The memory that one pointer of a table stands for.
struct Span {
  uintptr_t begin;
  uintptr_t end;
  bool written;
};

// Collects the memory of a table's tensors, then says what is wrong with it.
class Spans {
 public:
  void add(const void *pointer, int64_t numel, int64_t bytes, bool written) {
    if (numel == 0 || status_) return;
    if (numel < 0 || numel > kMaximumNumel) status_ = VJEPA_ERROR_NEGATIVE_SIZE;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
    if (!status_ && !pointer) {
      status_ = VJEPA_ERROR_NULL_POINTER;
    } else if (!status_ && begin % static_cast<uintptr_t>(bytes)) {
      status_ = VJEPA_ERROR_ALIGNMENT;
    }
    spans_.push_back(Span{begin, begin + static_cast<uintptr_t>(numel) * static_cast<uintptr_t>(bytes), written});
  }

  int32_t status() {
    if (status_) return status_;
    std::sort(spans_.begin(), spans_.end(), [](const Span &a, const Span &b) { return a.begin < b.begin; });
    uintptr_t written_until = 0, read_until = 0;
    for (const Span &span : spans_) {
      if (span.begin < written_until || (span.written && span.begin < read_until)) return VJEPA_ERROR_OVERLAP;
      uintptr_t &until = span.written ? written_until : read_until;
      until = std::max(until, span.end);
    }
    return VJEPA_OK;
  }

 private:
  std::vector<Span> spans_;
  int32_t status_ = VJEPA_OK;
};

}  // namespace vjepa
