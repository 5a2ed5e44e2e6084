// What a table of tensors must satisfy before any of it is touched, and its division into chunks. Host only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../capi.h"
#include "pack.h"

namespace vjepa {

inline bool is_float_dtype(int64_t dtype) { return dtype >= VJEPA_FLOAT32 && dtype <= VJEPA_FLOAT16; }

inline bool is_copy_dtype(int64_t dtype) { return dtype == VJEPA_BFLOAT16 || dtype == VJEPA_FLOAT16; }

inline int64_t dtype_bytes(int64_t dtype) { return dtype == VJEPA_FLOAT32 ? 4 : 2; }

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

inline bool packable(const void *pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(kPack * bytes) == 0;
}

// Divides `count` checked tensors into chunks; ema_plan and adamw_plan of capi.h. Chunks begin at multiples of a pack.
template <class Tensor, class Packable>
int32_t plan_chunks(const Tensor *tensors, int64_t count, int64_t chunk_elements, vjepa_chunk *chunks, int64_t capacity,
                    int64_t *num_chunks, const Packable &all_packable) {
  if (!num_chunks) return VJEPA_ERROR_NULL_POINTER;
  if (chunk_elements <= 0 || chunk_elements % kPack) return VJEPA_ERROR_NEGATIVE_SIZE;
  int64_t used = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t packed = all_packable(tensors[k]) ? 1 : 0;
    for (int64_t begin = 0; begin < tensors[k].numel; begin += chunk_elements) {
      if (chunks) {
        if (used >= capacity) return VJEPA_ERROR_CAPACITY;
        chunks[used] = vjepa_chunk{k, begin, std::min(begin + chunk_elements, tensors[k].numel), packed};
      }
      ++used;
    }
  }
  *num_chunks = used;
  return VJEPA_OK;
}

}  // namespace vjepa
