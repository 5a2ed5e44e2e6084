// Sums of a row in an order that every instruction set shares: LANES partial sums, added pairwise at the end.
#pragma once

#include <cstdint>

#include "../include/vjepa/dtype.h"

namespace vjepa {

constexpr int64_t kLanes = 32;  // two AVX-512 or four AVX2 registers hide the latency of an addition

// Calls add(lane, i) for i = 0 .. count - 1, lane = i % kLanes, whole groups of lanes in a loop that vectorises.
template <class Add>
VJEPA_HOST_DEVICE void for_lanes(int64_t count, const Add &add) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
  }
  for (int64_t lane = 0; i + lane < count; ++lane) add(lane, i + lane);
}

VJEPA_HOST_DEVICE float sum_lanes(float *lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// A row's mean in two parts, the second what rounding took from a large first one, and 1 / sqrt(variance + eps).
struct Moments {
  float mean;
  float missed;
  float rstd;
};

VJEPA_HOST_DEVICE Moments moments(const float *row, int64_t count, float mean, double eps) {
  float sums[kLanes] = {}, squares[kLanes] = {};
  for_lanes(count, [&](int64_t lane, int64_t i) {
    const float apart = row[i] - mean;
    sums[lane] += apart;
    squares[lane] += apart * apart;
  });
  const double missed = static_cast<double>(sum_lanes(sums)) / static_cast<double>(count);
  const double variance = static_cast<double>(sum_lanes(squares)) / static_cast<double>(count) - missed * missed;
  const double positive = variance < 0 ? 0 : variance;  // NaN stays
  return Moments{mean, static_cast<float>(missed), static_cast<float>(1.0 / __builtin_sqrt(positive + eps))};
}

}  // namespace vjepa
