// The inner loops of the CPU launchers, one clone for each instruction set.
#include "loops.h"

#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace vjepa {
namespace {

// A macro, because a compiler clones functions, not templates.
#define VJEPA_CLONES(suffix, T)                                                                                    \
  VJEPA_MULTIVERSION void ema_##suffix(const vjepa_ema_tensor &tensor, int64_t begin, int64_t end, EmaStep step) { \
    ema_range<T>(tensor, begin, end, step);                                                                        \
  }                                                                                                                \
  VJEPA_MULTIVERSION void adamw_##suffix(const vjepa_adamw_tensor &tensor, int64_t begin, int64_t end,             \
                                         const AdamwStep &step) {                                                  \
    adamw_range<T>(tensor, begin, end, step);                                                                      \
  }
VJEPA_CLONES(f32, float)
VJEPA_CLONES(bf16, bfloat16)
VJEPA_CLONES(f16, float16)
#undef VJEPA_CLONES

VJEPA_MULTIVERSION void round_bf16(const float *__restrict from, bfloat16 *__restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<bfloat16>(from[i]);
}

VJEPA_MULTIVERSION void round_f16(const float *__restrict from, float16 *__restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<float16>(from[i]);
}

#if defined(__x86_64__)
// memcpy past the caches, 16 bytes at a time, which every x86-64 can.
void stream(void *to, const void *from, size_t bytes) {
  char *target = static_cast<char *>(to);
  const char *source = static_cast<const char *>(from);
  const size_t before = std::min<size_t>(bytes, -reinterpret_cast<uintptr_t>(target) % sizeof(__m128i));
  memcpy(target, source, before);
  size_t done = before;
  for (; done + sizeof(__m128i) <= bytes; done += sizeof(__m128i)) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + done));
    _mm_stream_si128(reinterpret_cast<__m128i *>(target + done), value);
  }
  memcpy(target + done, source + done, bytes - done);
}
#else
void stream(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
#endif

// T: bfloat16 or float16.
template <class T>
void copy_rounded(void (*round)(const float *, T *, int64_t), const float *from, T *to, int64_t count, bool streamed) {
  if (!streamed) return round(from, to, count);
  T rounded[kBlock];
  round(from, rounded, count);
  stream(to, rounded, static_cast<size_t>(count) * sizeof(T));
}

// In the order of vjepa_dtype.
constexpr EmaLoop kEmaLoops[3] = {ema_f32, ema_bf16, ema_f16};
constexpr AdamwLoop kAdamwLoops[3] = {adamw_f32, adamw_bf16, adamw_f16};

}  // namespace

EmaLoop ema_loop(int64_t source_dtype) { return kEmaLoops[source_dtype]; }

AdamwLoop adamw_loop(int64_t grad_dtype) { return kAdamwLoops[grad_dtype]; }

void copy_block(const float *from, void *to, int64_t dtype, int64_t begin, int64_t end, bool streamed) {
  const int64_t count = end - begin;
  if (dtype == VJEPA_BFLOAT16) {
    copy_rounded(round_bf16, from + begin, static_cast<bfloat16 *>(to) + begin, count, streamed);
  } else if (dtype == VJEPA_FLOAT16) {
    copy_rounded(round_f16, from + begin, static_cast<float16 *>(to) + begin, count, streamed);
  }
}

void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace vjepa
