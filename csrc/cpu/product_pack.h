// Operands of a product in float32 as tiles of bfloat16: each number becomes three, each the nearest to what is left.
//
// A panel is 16 rows of a, or 16 columns of b, and a step 32 summands. Unit u of a step is the pair of its summands u
// and 16 + u. A step of a panel is three tiles, one for each part: [row][unit] for a, [unit][column] for b.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)  // GCC's own intrinsics begin with what is undefined, and it warns of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "amx.h"

#define VJEPA_AVX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define VJEPA_AVX_INLINE VJEPA_AVX inline __attribute__((always_inline))

namespace vjepa {
namespace {

constexpr int64_t kParts = 3;
constexpr int64_t kStep = 2 * kTile;                   // summands
constexpr int64_t kTileUnits = kTile * kTile;          // of a tile
constexpr int64_t kStepUnits = kParts * kTileUnits;    // of a step of a panel
constexpr int kUpper = static_cast<int>(0xffff0000u);  // the bits of a float32 that a bfloat16 has
constexpr int kHalf = 0x8000;

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

VJEPA_AVX_INLINE __m512 upper(__m512i bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(kUpper)));
}

VJEPA_AVX_INLINE __m512 nearest(__m512 x) {
  return upper(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(kHalf)));
}

// Pairs of bfloat16, the upper bits of both.
VJEPA_AVX_INLINE __m512 pair(__m512 low, __m512 high) {
  const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  constexpr int choose = 0xca;  // the bits of the second where the first has ones, those of the third elsewhere
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(kUpper), _mm512_castps_si512(high), below, choose));
}

// The parts of numbers that may be infinite or none, whose lower parts are 0, or so large that the nearest bfloat16 is
// infinite: those are cut off instead.
VJEPA_AVX inline bool split_any(__m512 x, __m512 (&parts)[kParts]) {
  __m512i bits = _mm512_castps_si512(x);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 rounds = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(0x7f7f8000));
  const __mmask16 finite = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(0x7f800000));
  const __mmask16 none = _mm512_cmpgt_epu32_mask(size, _mm512_set1_epi32(0x7f800000));
  bits = _mm512_mask_or_epi32(bits, none, bits, _mm512_set1_epi32(0x00400000));  // one that stays none when cut off
  parts[0] = upper(_mm512_mask_add_epi32(bits, rounds, bits, _mm512_set1_epi32(kHalf)));
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, parts[0]);
  parts[1] = nearest(rest);
  parts[2] = _mm512_sub_ps(rest, parts[1]);
  return finite != 0xffff;
}

// Writes one row of the three tiles. Whether a number is infinite or none.
VJEPA_AVX_INLINE bool split(__m512 low, __m512 high, float *to) {
  __m512 lows[kParts], highs[kParts];
  lows[0] = nearest(low), highs[0] = nearest(high);
  const __m512 low_rest = _mm512_sub_ps(low, lows[0]), high_rest = _mm512_sub_ps(high, highs[0]);
  lows[1] = nearest(low_rest), highs[1] = nearest(high_rest);
  lows[2] = _mm512_sub_ps(low_rest, lows[1]), highs[2] = _mm512_sub_ps(high_rest, highs[1]);
  bool special = false;
  // Whatever was infinite, none or rounded to infinity leaves inf - inf or worse.
  if (__builtin_expect(_mm512_cmp_ps_mask(lows[2], highs[2], _CMP_UNORD_Q) != 0, 0)) {
    special = split_any(low, lows);
    special = split_any(high, highs) || special;
  }
  for (int64_t part = 0; part < kParts; ++part) {
    _mm512_store_ps(to + part * kTileUnits, pair(lows[part], highs[part]));
  }
  return special;
}

VJEPA_AVX_INLINE void transpose(__m512 (&x)[kTile]) {
  __m512 y[kTile];
  for (int64_t i = 0; i < kTile; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int64_t i = 0; i < kTile; i += 4) {  // x[i + c]: column c of each quarter, four rows
    for (int64_t j = 0; j < 2; ++j) {
      const __m512d first = _mm512_castps_pd(y[i + j]), second = _mm512_castps_pd(y[i + 2 + j]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
      x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    }
  }
  for (int64_t c = 0; c < 4; ++c) {
    const __m512 p = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88), q = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
    const __m512 r = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd), s = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
    y[c] = _mm512_shuffle_f32x4(p, q, 0x88);
    y[8 + c] = _mm512_shuffle_f32x4(p, q, 0xdd);
    y[4 + c] = _mm512_shuffle_f32x4(r, s, 0x88);
    y[12 + c] = _mm512_shuffle_f32x4(r, s, 0xdd);
  }
  for (int64_t i = 0; i < kTile; ++i) x[i] = y[i];
}

VJEPA_AVX_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kTile)) - 1);
}

// One step of a panel of `width` rows or columns, of which `depth` summands are left. Whether a number of it is
// infinite or none.
//   Along      summands lie side by side, and `stride` is from row to row or from column to column;
//              else rows or columns do, and it is from summand to summand
//   Transpose  the tiles have summands side by side where the matrix has not, or the other way round
template <bool Along, bool Transpose>
VJEPA_AVX bool pack_step(const float *from, int64_t stride, int64_t width, int64_t depth, float *to) {
  __m512 halves[2][kTile];
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = kTile * half, some = depth - first;
    const __mmask16 lanes = first_lanes(Along ? some : width);
    const int64_t lines = Along ? width : some;
    const float *line = Along ? from + first : from + first * stride;
    for (int64_t i = 0; i < kTile; ++i, line += stride) {
      halves[half][i] = i < lines ? _mm512_maskz_loadu_ps(lanes, line) : _mm512_setzero_ps();
    }
    if (Transpose) transpose(halves[half]);
  }
  bool special = false;
  for (int64_t i = 0; i < kTile; ++i) special = split(halves[0][i], halves[1][i], to + kTile * i) || special;
  return special;
}

constexpr int64_t kAhead = 3;  // steps of panels from the one that is packed to the one that memory is asked for

// Some summands of some rows of a, or of some columns of b, as panels; step by step, whenever there is time, in the
// order in which they lie in memory.
class Packing {
 public:
  Packing() = default;
  // Of `count` rows or columns that are `across` apart, summands `along` apart. special[p]: whether a number of panel p
  // is infinite or none.
  Packing(const float *from, int64_t across, int64_t along, int64_t count, int64_t depth, bool of_b, float *to,
          bool *special)
      : from_(from), to_(to), special_(special), across_(across), along_(along), count_(count), depth_(depth) {
    side_by_side_ = along == 1 || depth == 1;
    if (side_by_side_) {
      pack_ = of_b ? pack_step<true, true> : pack_step<true, false>;
    } else {
      pack_ = of_b ? pack_step<false, false> : pack_step<false, true>;
    }
    panels_ = (count + kTile - 1) / kTile;
    steps_ = (depth + kStep - 1) / kStep;
    std::fill(special, special + panels_, false);
  }

  int64_t all() const { return panels_ * steps_; }  // calls of step(), in all
  bool done() const { return next_ >= all(); }

  void step() {
    ask_for(next_ + kAhead);
    const Place at = place(next_++);
    const float *from = from_ + at.panel * kTile * across_ + at.step * kStep * along_;
    const int64_t stride = side_by_side_ ? across_ : along_, width = std::min(kTile, count_ - at.panel * kTile);
    float *const to = to_ + (at.panel * steps_ + at.step) * kStepUnits;
    const bool special = pack_(from, stride, width, depth_ - at.step * kStep, to);
    special_[at.panel] = special_[at.panel] || special;
  }
  void rest() {
    while (!done()) step();
  }

 private:
  struct Place {
    int64_t panel, step;
  };
  Place place(int64_t n) const {
    return side_by_side_ ? Place{n / steps_, n % steps_} : Place{n % panels_, n / panels_};
  }

  void ask_for(int64_t n) const {
    if (n >= all()) return;
    const Place at = place(n);
    const float *line = from_ + at.panel * kTile * across_ + at.step * kStep * along_;
    if (side_by_side_) {
      const int64_t lines = std::min(kTile, count_ - at.panel * kTile);
      for (int64_t i = 0; i < lines; ++i, line += across_) {
        __builtin_prefetch(line);
        __builtin_prefetch(line + kTile);
      }
    } else {
      const int64_t lines = std::min(kStep, depth_ - at.step * kStep);
      for (int64_t i = 0; i < lines; ++i, line += along_) __builtin_prefetch(line);
    }
  }

  bool (*pack_)(const float *, int64_t, int64_t, int64_t, float *) = nullptr;
  const float *from_ = nullptr;
  float *to_ = nullptr;
  bool *special_ = nullptr;
  int64_t across_ = 0, along_ = 0, count_ = 0, depth_ = 0;
  bool side_by_side_ = false;
  int64_t panels_ = 0, steps_ = 0;
  int64_t next_ = 0;
};

}  // namespace
}  // namespace vjepa
