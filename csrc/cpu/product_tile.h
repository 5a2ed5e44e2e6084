// Products of packed panels: at most two by two tiles of sums at a time. Tiles compute by themselves; between the
// instructions that feed them, the processor finishes the sums before these and packs the rows that come next.
#pragma once

#include "product_pack.h"

namespace vjepa {
namespace {

constexpr int64_t kPair = 2;              // panels whose tiles of sums stay in registers together
constexpr int64_t kSums = kPair * kTile;  // rows and columns of those sums

// What becomes of sums.
struct Finish {
  float *out;
  int64_t out_stride;
  int64_t rows, columns;  // of out, from here on
  const float *bias;      // of these columns, or null
  bool add;               // to what is there
  bool special;           // infinities or NaN may be among the operands
};

// What one thread does meanwhile.
class Meanwhile {
 public:
  // Packs `packing` in the course of `steps` steps of products.
  void pack(const Packing &packing, int64_t steps) {
    packing_ = packing;
    packing_steps_ = packing.all();
    product_steps_ = std::max<int64_t>(1, steps);
    credit_ = 0;
  }
  void rest_of_packing() {
    packing_.rest();
    packing_steps_ = 0;
  }

  // Sums that were stored to sums(), and to first_parts() if they are special.
  void finish(const Finish &how) {
    how_ = how;
    how_.rows = std::min(how.rows, kSums);
    row_ = 0;
  }
  void rest_of_sums() { finish_rows(kSums); }
  float *sums() { return sums_; }
  float *first_parts() { return first_parts_; }

  // One step of `steps` of the present product.
  void step(int64_t steps) {
    if (row_ < how_.rows) finish_rows(1 + kSums / steps);
    for (credit_ += packing_steps_; credit_ >= product_steps_ && !packing_.done(); credit_ -= product_steps_) {
      packing_.step();
    }
  }

 private:
  VJEPA_AVX void finish_rows(int64_t some) {
    const __m512 largest = _mm512_set1_ps(3.4028235e38f);
    for (const int64_t end = std::min(row_ + some, how_.rows); row_ < end; ++row_) {
      for (int64_t c = 0; c < kSums && c < how_.columns; c += kTile) {
        const __mmask16 lanes = first_lanes(how_.columns - c);
        float *out = how_.out + row_ * how_.out_stride + c;
        __m512 sum = _mm512_load_ps(sums_ + row_ * kSums + c);
        if (how_.special) {
          const __m512 first = _mm512_load_ps(first_parts_ + row_ * kSums + c);
          const __mmask16 decided = _mm512_cmp_ps_mask(_mm512_abs_ps(first), largest, _CMP_NLE_UQ);
          sum = _mm512_mask_mov_ps(sum, decided, first);
        }
        if (how_.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, how_.bias + c));
        if (how_.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, out), sum);
        _mm512_mask_storeu_ps(out, lanes, sum);
      }
    }
  }

  alignas(64) float sums_[kSums * kSums];
  alignas(64) float first_parts_[kSums * kSums];
  Finish how_ = {};
  int64_t row_ = 0;  // of how_, the next
  Packing packing_;
  int64_t packing_steps_ = 0, product_steps_ = 1, credit_ = 0;
};

// The sums of R panels of a and C panels of b in tiles 0, 1 (of the first panel of a), 2, 3; not yet stored. The
// smallest parts come first, so that each is loaded once, b's largest twice.
template <class T, int R, int C>
void sum_parts(T &tiles, const float *a, int64_t a_panel, const float *b, int64_t b_panel, int64_t steps,
               Meanwhile &meanwhile) {
  tiles.template zero<0>();
  if constexpr (C > 1) tiles.template zero<1>();
  if constexpr (R > 1) tiles.template zero<2>();
  if constexpr (R > 1 && C > 1) tiles.template zero<3>();
  const auto load_a = [&](int64_t part) {
    tiles.template load<4>(a + part * kTileUnits, kTile);
    if constexpr (R > 1) tiles.template load<5>(a + a_panel + part * kTileUnits, kTile);
  };
  const auto load_b = [&](int64_t part) {
    tiles.template load<6>(b + part * kTileUnits, kTile);
    if constexpr (C > 1) tiles.template load<7>(b + b_panel + part * kTileUnits, kTile);
  };
  const auto dot = [&] {
    tiles.template dot<0, 4, 6>();
    if constexpr (C > 1) tiles.template dot<1, 4, 7>();
    if constexpr (R > 1) tiles.template dot<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tiles.template dot<3, 5, 7>();
  };
  for (int64_t n = 0; n < steps; ++n, a += kStepUnits, b += kStepUnits) {
    load_a(2), load_b(0), dot();
    load_a(1), dot();
    load_b(1), dot();
    load_a(0), dot();
    load_b(2), dot();
    load_b(0), dot();
    meanwhile.step(steps);
  }
}

// A number that is not finite among the operands decides the sum, but times the lower parts of another, which may be 0
// or of the other sign, it is NaN. The products of the first parts have what float32's product has there.
template <class T>
void sum_first_parts(T &tiles, const float *a, const float *b, int64_t steps, float *to) {
  tiles.template zero<0>();
  for (; steps > 0; --steps, a += kStepUnits, b += kStepUnits) {
    tiles.template load<4>(a, kTile);
    tiles.template load<6>(b, kTile);
    tiles.template dot<0, 4, 6>();
  }
  tiles.template store<0>(to, kSums);
}

template <class T, int R, int C>
void product_of_panels(T &tiles, const float *a, int64_t a_panel, const float *b, int64_t b_panel, int64_t steps,
                       const Finish &how, Meanwhile &meanwhile) {
  sum_parts<T, R, C>(tiles, a, a_panel, b, b_panel, steps, meanwhile);
  meanwhile.rest_of_sums();
  float *const sums = meanwhile.sums();
  tiles.template store<0>(sums, kSums);
  if constexpr (C > 1) tiles.template store<1>(sums + kTile, kSums);
  if constexpr (R > 1) tiles.template store<2>(sums + kTile * kSums, kSums);
  if constexpr (R > 1 && C > 1) tiles.template store<3>(sums + kTile * kSums + kTile, kSums);
  for (int64_t n = 0; how.special && n < R * C; ++n) {
    const int64_t r = n / C, c = n % C;
    float *const to = meanwhile.first_parts() + kTile * (r * kSums + c);
    sum_first_parts(tiles, a + r * a_panel, b + c * b_panel, steps, to);
  }
  meanwhile.finish(how);
}

}  // namespace
}  // namespace vjepa
