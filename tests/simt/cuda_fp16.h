// float16 of a CUDA source on the CPU: sign, 5 bits of exponent, 10 bits of fraction.  See cuda_runtime.h.
#pragma once
#include <math.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = ldexpf(1024 + fraction, exponent - 25);
  if (exponent == 0) size = ldexpf(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return value.bits >> 15 ? -size : size;
}

// To nearest even.
inline __half __float2half_rn(float value) {
  const int sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (value != value) return {0x7fff};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const int fraction = static_cast<int>(nearbyintf(ldexpf(size, 10 - exponent)));  // with the leading 1, so may carry
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction))};
}
