// Storage types and their exact conversions to and from float32, in integer arithmetic that compilers vectorise.
// Rounding is to nearest even; NaN stays NaN; float16 subnormals are kept. Same bits on the host and on a device.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace vjepa {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

VJEPA_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VJEPA_HOST_DEVICE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VJEPA_HOST_DEVICE float to_float(float value) { return value; }

VJEPA_HOST_DEVICE float to_float(bfloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

VJEPA_HOST_DEVICE float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Infinity and NaN (exponent 31) take exponent 255; every other number is rescaled by 2^(127 - 15), exactly, which
  // turns subnormals into normal numbers on the way.
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000u);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : bits_from_float(scaled)));
}

template <class T>
VJEPA_HOST_DEVICE T from_float(float value);

template <>
VJEPA_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
VJEPA_HOST_DEVICE bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return bfloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
VJEPA_HOST_DEVICE float16 from_float<float16>(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round the 13 bits that go. Overflow carries into infinity.
  const uint32_t rebiased = magnitude - 0x38000000u;
  const uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  // Subnormal results (below 2^-14): adding 0.5 makes the hardware round at 2^-24, the last bit of a subnormal.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  // At 65520 and above everything rounds to infinity; a NaN keeps the top of its payload and is quiet.
  const uint32_t large = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return float16{static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite))};
}

}  // namespace vjepa
