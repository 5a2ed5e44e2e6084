// Layer norm of the named rows, and their L1 distance from a prediction, on a CPU: one pass over the rows in each
// direction.
#include <vector>

#include "../capi_tokens.h"
#include "lanes.h"
#include "parallel.h"
#include "sets.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerThread = 1 << 15;  // elements; some ten microseconds

// The row in float32.
template <class T>
VJEPA_HOST_DEVICE Moments read_row(const T *row, int64_t features, float *wide, double eps) {
  float sums[kLanes] = {};
  for_lanes(features, [&](int64_t lane, int64_t i) {
    wide[i] = to_float(row[i]);
    sums[lane] += wide[i];
  });
  return moments(wide, features, sum_lanes(sums) / static_cast<float>(features), eps);
}

template <class T, class P>
VJEPA_HOST_DEVICE void distance_rows(const vjepa_sets &sets, const vjepa_rows &table, const void *prediction,
                                     int64_t stride, int64_t features, double eps, float *distances, float *statistics,
                                     int64_t first, int64_t last) {
  std::vector<float> wide(static_cast<size_t>(features));
  for_tokens(sets, first, last, [&](int64_t i, int64_t clip, int64_t token) {
    const T *row = static_cast<const T *>(table.data) + clip * table.clip_stride + token * table.token_stride;
    const P *own = static_cast<const P *>(prediction) + i * stride;
    float *values = wide.data();
    const Moments m = read_row(row, features, values, eps);
    const float mean = m.mean, missed = m.missed, rstd = m.rstd;
    float sums[kLanes] = {};
    for_lanes(features, [&](int64_t lane, int64_t j) {
      sums[lane] += __builtin_fabsf((values[j] - mean - missed) * rstd - to_float(own[j]));
    });
    distances[i] = sum_lanes(sums) / static_cast<float>(features);
    statistics[2 * i] = mean + missed;
    statistics[2 * i + 1] = rstd;
  });
}

template <class T, class P>
VJEPA_HOST_DEVICE void sign_rows(const vjepa_sets &sets, const vjepa_rows &table, const void *prediction,
                                 int64_t stride, int64_t features, const float *statistics, const float *shares,
                                 void *grad, int64_t first, int64_t last) {
  for_tokens(sets, first, last, [&](int64_t i, int64_t clip, int64_t token) {
    const T *row = static_cast<const T *>(table.data) + clip * table.clip_stride + token * table.token_stride;
    const P *own = static_cast<const P *>(prediction) + i * stride;
    P *out = static_cast<P *>(grad) + i * features;
    const float mean = statistics[2 * i], rstd = statistics[2 * i + 1];
    const float share = shares[i] / static_cast<float>(features);
    for (int64_t j = 0; j < features; ++j) {
      const float apart = to_float(own[j]) - (to_float(row[j]) - mean) * rstd;
      out[j] = from_float<P>((apart > 0 ? share : 0.0f) - (apart < 0 ? share : 0.0f));
    }
  });
}

#define VJEPA_LOSS_CLONES(name, T, P)                                                                                \
  VJEPA_MULTIVERSION void distance_##name(const vjepa_sets &s, const vjepa_rows &t, const void *p, int64_t stride,   \
                                          int64_t features, double eps, float *d, float *st, int64_t a, int64_t b) { \
    distance_rows<T, P>(s, t, p, stride, features, eps, d, st, a, b);                                                \
  }                                                                                                                  \
  VJEPA_MULTIVERSION void sign_##name(const vjepa_sets &s, const vjepa_rows &t, const void *p, int64_t stride,       \
                                      int64_t features, const float *st, const float *sh, void *g, int64_t a,        \
                                      int64_t b) {                                                                   \
    sign_rows<T, P>(s, t, p, stride, features, st, sh, g, a, b);                                                     \
  }
VJEPA_LOSS_CLONES(f32_f32, float, float)
VJEPA_LOSS_CLONES(f32_bf16, float, bfloat16)
VJEPA_LOSS_CLONES(bf16_f32, bfloat16, float)
VJEPA_LOSS_CLONES(bf16_bf16, bfloat16, bfloat16)
#undef VJEPA_LOSS_CLONES

using Distance = void (*)(const vjepa_sets &, const vjepa_rows &, const void *, int64_t, int64_t, double, float *,
                          float *, int64_t, int64_t);
using Sign = void (*)(const vjepa_sets &, const vjepa_rows &, const void *, int64_t, int64_t, const float *,
                      const float *, void *, int64_t, int64_t);
constexpr Distance kDistances[2][2] = {{distance_f32_f32, distance_f32_bf16}, {distance_bf16_f32, distance_bf16_bf16}};
constexpr Sign kSigns[2][2] = {{sign_f32_f32, sign_f32_bf16}, {sign_bf16_f32, sign_bf16_bf16}};

bool is_served(int32_t dtype) { return dtype == VJEPA_FLOAT32 || dtype == VJEPA_BFLOAT16; }

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_l1_cpu(const vjepa_sets *sets, const vjepa_rows *table, const void *prediction, int64_t stride,
                                int32_t dtype, int64_t features, double eps, float *distances, float *statistics,
                                int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_served(dtype) || !is_served(table->dtype)) return VJEPA_ERROR_DTYPE;
  if (const int32_t status = check_sets(*sets)) return status;
  const Distance distance = kDistances[table->dtype][dtype];
  parallel_for(sets->total, 1 + kMinimumPerThread / features, threads, [&](int64_t first, int64_t last) {
    distance(*sets, *table, prediction, stride, features, eps, distances, statistics, first, last);
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_l1_backward_cpu(const vjepa_sets *sets, const vjepa_rows *table, const void *prediction,
                                         int64_t stride, int32_t dtype, int64_t features, const float *statistics,
                                         const float *shares, void *grad, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_served(dtype) || !is_served(table->dtype)) return VJEPA_ERROR_DTYPE;
  if (const int32_t status = check_sets(*sets)) return status;
  const Sign sign = kSigns[table->dtype][dtype];
  parallel_for(sets->total, 1 + kMinimumPerThread / features, threads, [&](int64_t first, int64_t last) {
    sign(*sets, *table, prediction, stride, features, statistics, shares, grad, first, last);
  });
  return VJEPA_OK;
}
