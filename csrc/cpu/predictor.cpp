// The predictor's input on a CPU, per set its context tokens, then its mask tokens, all plus positions; and its
// adjoint.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../capi_tokens.h"
#include "../include/vjepa/dtype.h"
#include "../include/vjepa/macros.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerThread = 1 << 15;  // elements; some ten microseconds
constexpr int64_t kBlock = 64;                  // rows whose sum is begun anew, so that sums do not depend on threads

// Where row `row` of the packed tokens comes from: its set, and its place among the context or the target tokens of
// all.
struct Place {
  int64_t set;
  int64_t token;
  bool of_context;
};

// Calls visit(row, place) for rows first .. last - 1.
template <class Visit>
void for_rows(const vjepa_halves &h, int64_t first, int64_t last, const Visit &visit) {
  int64_t set = 0;
  const auto start = [&](int64_t s) { return static_cast<int64_t>(h.context_offsets[s]) + h.target_offsets[s]; };
  int64_t high = h.sets;
  while (high - set > 1) {
    const int64_t middle = (set + high) / 2;
    (start(middle) <= first ? set : high) = middle;
  }
  for (int64_t row = first; row < last; ++row) {
    while (row >= start(set + 1)) ++set;
    const int64_t inside = row - start(set), context = h.context_offsets[set + 1] - h.context_offsets[set];
    if (inside < context) {
      visit(row, Place{set, h.context_offsets[set] + inside, true});
    } else {
      visit(row, Place{set, h.target_offsets[set] + inside - context, false});
    }
  }
}

template <class A, class B>
VJEPA_HOST_DEVICE void add_rows(const void *a, const void *b, int64_t features, void *out) {
  const A *first = static_cast<const A *>(a);
  const B *second = static_cast<const B *>(b);
  B *sum = static_cast<B *>(out);
  for (int64_t j = 0; j < features; ++j) sum[j] = from_float<B>(to_float(first[j]) + to_float(second[j]));
}

template <class A, class B>
VJEPA_HOST_DEVICE void convert_row(const void *from, int64_t features, void *to) {
  const B *values = static_cast<const B *>(from);
  A *out = static_cast<A *>(to);
  for (int64_t j = 0; j < features; ++j) out[j] = from_float<A>(to_float(values[j]));
}

template <class B>
VJEPA_HOST_DEVICE void accumulate_row(const void *from, int64_t features, float *to) {
  const B *values = static_cast<const B *>(from);
  for (int64_t j = 0; j < features; ++j) to[j] += to_float(values[j]);
}

// Macros, because a compiler clones functions, not templates. A: dtype of context, B: of all else.
#define VJEPA_PREDICTOR_CLONES(name, A, B)                                                        \
  VJEPA_MULTIVERSION void add_##name(const void *a, const void *b, int64_t features, void *out) { \
    add_rows<A, B>(a, b, features, out);                                                          \
  }                                                                                               \
  VJEPA_MULTIVERSION void convert_##name(const void *from, int64_t features, void *to) {          \
    convert_row<A, B>(from, features, to);                                                        \
  }
VJEPA_PREDICTOR_CLONES(f32_f32, float, float)
VJEPA_PREDICTOR_CLONES(bf16_f32, bfloat16, float)
VJEPA_PREDICTOR_CLONES(f16_f32, float16, float)
VJEPA_PREDICTOR_CLONES(bf16_bf16, bfloat16, bfloat16)
VJEPA_PREDICTOR_CLONES(f16_f16, float16, float16)
#undef VJEPA_PREDICTOR_CLONES

VJEPA_MULTIVERSION void accumulate_f32(const void *from, int64_t features, float *to) {
  accumulate_row<float>(from, features, to);
}
VJEPA_MULTIVERSION void accumulate_bf16(const void *from, int64_t features, float *to) {
  accumulate_row<bfloat16>(from, features, to);
}
VJEPA_MULTIVERSION void accumulate_f16(const void *from, int64_t features, float *to) {
  accumulate_row<float16>(from, features, to);
}

using Add = void (*)(const void *, const void *, int64_t, void *);
using Convert = void (*)(const void *, int64_t, void *);
// [dtype of context][whether all else is float32]
constexpr Add kAdds[3][2] = {{add_f32_f32, add_f32_f32}, {add_bf16_bf16, add_bf16_f32}, {add_f16_f16, add_f16_f32}};
constexpr Convert kConverts[3][2] = {
    {convert_f32_f32, convert_f32_f32}, {convert_bf16_bf16, convert_bf16_f32}, {convert_f16_f16, convert_f16_f32}};
constexpr void (*kAccumulates[3])(const void *, int64_t, float *) = {accumulate_f32, accumulate_bf16, accumulate_f16};

int64_t size_of(int32_t dtype) { return dtype == VJEPA_FLOAT32 ? 4 : 2; }

int32_t check(const vjepa_halves *h, int64_t features, int32_t dtype, int32_t others, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (features < 1 || h->sets < 1 || h->kinds < 1) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (dtype < VJEPA_FLOAT32 || dtype > VJEPA_FLOAT16) return VJEPA_ERROR_DTYPE;
  if (others != VJEPA_FLOAT32 && others != dtype) return VJEPA_ERROR_DTYPE;
  const struct {
    const int64_t *indices;
    const int32_t *offsets;
  } halves[2] = {{h->context_indices, h->context_offsets}, {h->target_indices, h->target_offsets}};
  for (const auto &half : halves) {
    if (half.offsets[0]) return VJEPA_ERROR_INDEX;
    for (int64_t s = 0; s < h->sets; ++s) {
      if (half.offsets[s] > half.offsets[s + 1]) return VJEPA_ERROR_INDEX;
    }
    for (int64_t i = 0; i < half.offsets[h->sets]; ++i) {
      if (half.indices[i] < 0 || half.indices[i] >= h->length) return VJEPA_ERROR_INDEX;
    }
  }
  return VJEPA_OK;
}

int64_t kind_of(const vjepa_halves &h, int64_t set) { return (h.kind[set] % h.kinds + h.kinds) % h.kinds; }

int64_t rows_of(const vjepa_halves &h) {
  return static_cast<int64_t>(h.context_offsets[h.sets]) + h.target_offsets[h.sets];
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_predictor_tokens_cpu(const vjepa_halves *h, const void *context, int64_t context_stride,
                                              int32_t dtype, const void *mask_tokens, const void *positions,
                                              int64_t position_stride, int32_t others, int64_t features, void *out,
                                              int64_t *out_indices, int32_t *out_offsets, int32_t threads) {
  if (const int32_t status = check(h, features, dtype, others, threads)) return status;
  const int64_t size = size_of(dtype), other_size = size_of(others);
  const Add add = kAdds[dtype][others == VJEPA_FLOAT32], add_others = kAdds[others][others == VJEPA_FLOAT32];
  const char *masks = static_cast<const char *>(mask_tokens);
  for (int64_t s = 0; s <= h->sets; ++s) out_offsets[s] = h->context_offsets[s] + h->target_offsets[s];
  parallel_for(rows_of(*h), 1 + kMinimumPerThread / features, threads, [&](int64_t first, int64_t last) {
    for_rows(*h, first, last, [&](int64_t row, const Place &place) {
      const int64_t id = (place.of_context ? h->context_indices : h->target_indices)[place.token];
      const void *position = static_cast<const char *>(positions) + id * position_stride * other_size;
      void *to = static_cast<char *>(out) + row * features * other_size;
      out_indices[row] = id;
      if (place.of_context) {
        add(static_cast<const char *>(context) + place.token * context_stride * size, position, features, to);
      } else {
        add_others(masks + kind_of(*h, place.set) * features * other_size, position, features, to);
      }
    });
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_predictor_tokens_backward_cpu(const vjepa_halves *h, const void *grad, int64_t grad_stride,
                                                       int32_t others, int64_t features, void *grad_context,
                                                       int32_t dtype, float *grad_mask_tokens, int32_t threads) {
  if (const int32_t status = check(h, features, dtype, others, threads)) return status;
  const int64_t size = size_of(dtype), rows = rows_of(*h), blocks = (rows + kBlock - 1) / kBlock;
  const int64_t kinds = grad_mask_tokens ? h->kinds : 0;
  const Convert convert = kConverts[dtype][others == VJEPA_FLOAT32];
  std::vector<float> sums(static_cast<size_t>(blocks * kinds * features), 0.0f);
  parallel_for(blocks, 1 + kMinimumPerThread / (features * kBlock), threads, [&](int64_t first, int64_t last) {
    for_rows(*h, first * kBlock, std::min(last * kBlock, rows), [&](int64_t row, const Place &place) {
      const char *own = static_cast<const char *>(grad) + row * grad_stride * size_of(others);
      if (place.of_context) {
        if (grad_context) convert(own, features, static_cast<char *>(grad_context) + place.token * features * size);
      } else if (kinds) {
        kAccumulates[others](own, features, sums.data() + (row / kBlock * kinds + kind_of(*h, place.set)) * features);
      }
    });
  });
  if (kinds) std::memset(grad_mask_tokens, 0, kinds * features * sizeof(float));
  for (int64_t block = 0; block < blocks && kinds; ++block) {
    accumulate_f32(sums.data() + block * kinds * features, kinds * features, grad_mask_tokens);
  }
  return VJEPA_OK;
}
