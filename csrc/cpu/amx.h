// The tiles of AMX: registers of 16 rows of 16 units of four bytes, a unit being a float32 or a pair of bfloat16.
//
// A product takes a, 16 rows of 16 pairs along the sum, and b, 16 pairs along the sum of 16 columns:
//
//     sum[r][c] += sum_u a[r][u][0] b[u][c][0] + sum_u a[r][u][1] b[u][c][1]
//
// where the two sums on the right begin with 0, take their products one by one, each with one rounding to the nearest,
// and are added to one another first. What is below the smallest normal number counts as 0, also as a sum.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define VJEPA_HAS_AMX 1
#endif

namespace vjepa {

constexpr int64_t kTile = 16;  // rows and columns of a tile, and units of a row

// Whether this processor has tiles of bfloat16 and the system lets this process use them, for which it is asked.
bool amx_allowed();

#if defined(VJEPA_HAS_AMX)
// The tiles of the calling thread, as long as this object lives; nothing else that uses them may be called meanwhile.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int t = 0; t < 8; ++t) {
      layout.row_bytes[t] = 64;
      layout.rows[t] = kTile;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(layout) : "memory");
  }
  ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;

  template <int T>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // `stride` units from row to row.
  template <int T>
  void load(const float *from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(T) : "memory");
  }
  template <int T>
  void store(float *to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * stride), "i"(T) : "memory");
  }
  template <int Sum, int A, int B>
  void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
  }
};
#endif

// The same in software, for tests on other processors: the same numbers, hundreds of times slower.
class TilesInSoftware {
 public:
  template <int T>
  void zero() {
    for (int64_t i = 0; i < kTile * kTile; ++i) tiles_[T][i] = 0;
  }
  template <int T>
  void load(const float *from, int64_t stride) {
    for (int64_t r = 0; r < kTile; ++r) {
      __builtin_memcpy(tiles_[T] + r * kTile, from + r * stride, kTile * sizeof(float));
    }
  }
  template <int T>
  void store(float *to, int64_t stride) {
    for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(to + r * stride, tiles_[T] + r * kTile, kTile * sizeof(float));
  }
  // Inlined, so that it is compiled for a processor with FMA wherever its caller is.
  template <int Sum, int A, int B>
  __attribute__((always_inline)) inline void dot() {
    for (int64_t r = 0; r < kTile; ++r) {
      float sums[2][kTile] = {};
      for (int64_t u = 0; u < kTile; ++u) {
        for (int half = 0; half < 2; ++half) {
          const float x = part(tiles_[A][r * kTile + u], half);
          for (int64_t c = 0; c < kTile; ++c) {
            sums[half][c] = normal(__builtin_fmaf(x, part(tiles_[B][u * kTile + c], half), sums[half][c]));
          }
        }
      }
      for (int64_t c = 0; c < kTile; ++c) {
        float &sum = tiles_[Sum][r * kTile + c];
        sum = normal(normal(sum) + normal(sums[0][c] + sums[1][c]));
      }
    }
  }

 private:
  __attribute__((always_inline)) static float normal(float x) {
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
  }
  __attribute__((always_inline)) static float part(float unit, int half) {
    uint32_t bits;
    __builtin_memcpy(&bits, &unit, sizeof bits);
    bits = half ? bits & 0xffff0000u : bits << 16;
    __builtin_memcpy(&unit, &bits, sizeof bits);
    return normal(unit);
  }

  float tiles_[8][kTile * kTile];
};

}  // namespace vjepa
