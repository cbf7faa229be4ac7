// One row of a cross entropy over the vocabulary, on a CPU: its statistics, and its gradient, which replaces the logits.
// The float versions are written such that the compiler vectorises them; sums run in a fixed order.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// Compiled for several instruction sets; the loader chooses the best one that the machine supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define GRAM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GRAM_CLONES
#endif

namespace gram {

constexpr int64_t kLanes = 32;
constexpr int64_t kBlock = 1024;  // elements converted to float at a time

struct RowStats {
  double largest = -std::numeric_limits<double>::infinity();
  double exponentials = 0;  // sum of exp(logit - largest)
  double total = 0;
};

// exp(x) for x up to about 1, relative error below 2e-7; 0 below -87.3; NaN stays NaN.
__attribute__((always_inline)) inline float fast_exp(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // the integer part in the low bits
  const float whole = shifted - 12582912.0f;
  const float rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  const int32_t exponent = (std::bit_cast<int32_t>(shifted) + 127) << 23;  // 12582912 = 0x4B400000: its low bits vanish
  const float power = std::bit_cast<float>(exponent);
  return x < -87.3f ? 0.0f : p * power;
}

template <typename T>
inline T lanes_sum(const T* lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return static_cast<T>(sum);
}

// Largest of n values; NaN if any is NaN.
GRAM_CLONES inline float block_largest(const float* z, int64_t n) {
  float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = z[i + lane];
      lanes[lane] = (value > lanes[lane]) | (value != value) ? value : lanes[lane];
    }
  float largest = -std::numeric_limits<float>::infinity();
  for (; i < n; ++i) largest = z[i] > largest || z[i] != z[i] ? z[i] : largest;
  for (int64_t lane = 0; lane < kLanes; ++lane)
    largest = lanes[lane] > largest || lanes[lane] != lanes[lane] ? lanes[lane] : largest;
  return largest;
}

GRAM_CLONES inline double block_exponentials(const float* z, int64_t n, float largest) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += fast_exp(z[i + lane] - largest);
  double sum = 0;
  for (; i < n; ++i) sum += fast_exp(z[i] - largest);
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

GRAM_CLONES inline double block_total(const float* z, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += z[i + lane];
  double sum = 0;
  for (; i < n; ++i) sum += z[i];
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// out <- exp(z - lse) - other_weight
GRAM_CLONES inline void block_gradient(const float* z, float* out, int64_t n, float lse, float other_weight) {
  for (int64_t i = 0; i < n; ++i) out[i] = fast_exp(z[i] - lse) - other_weight;
}

// Adds a block to the statistics of the blocks before it.
inline void add_block(RowStats& stats, const float* z, int64_t n) {
  const float largest = block_largest(z, n);
  if (largest == -std::numeric_limits<float>::infinity()) {
    stats.total += block_total(z, n);
    return;
  }
  const double exponentials = block_exponentials(z, n, largest);
  if (largest > stats.largest || largest != largest) {
    stats.exponentials = stats.exponentials * std::exp(stats.largest - largest) + exponentials;
    stats.largest = largest;
  } else {
    stats.exponentials += exponentials * std::exp(largest - stats.largest);
  }
  stats.total += block_total(z, n);
}

template <typename T>
RowStats row_stats(const T* z, int64_t n) {
  RowStats stats;
  float block[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    for (int64_t i = 0; i < count; ++i) block[i] = static_cast<float>(z[start + i]);
    add_block(stats, block, count);
  }
  return stats;
}

template <>
inline RowStats row_stats<double>(const double* z, int64_t n) {
  RowStats stats;
  for (int64_t i = 0; i < n; ++i) stats.largest = z[i] > stats.largest || z[i] != z[i] ? z[i] : stats.largest;
  for (int64_t i = 0; i < n; ++i) {
    stats.exponentials += std::exp(z[i] - stats.largest);
    stats.total += z[i];
  }
  return stats;
}

template <typename T, typename A>
void row_gradient(T* z, int64_t n, int64_t target, A lse, A target_weight, A other_weight) {
  float at_target = 0;
  if (target >= 0) at_target = static_cast<float>(z[target]);
  float block[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    for (int64_t i = 0; i < count; ++i) block[i] = static_cast<float>(z[start + i]);
    block_gradient(block, block, count, lse, other_weight);
    for (int64_t i = 0; i < count; ++i) z[start + i] = static_cast<T>(block[i]);
  }
  // Computed before rounding, because it is close to 0 when the model is confident.
  if (target >= 0) z[target] = static_cast<T>(std::exp(at_target - lse) - other_weight - target_weight);
}

template <>
inline void row_gradient<double, double>(
    double* z, int64_t n, int64_t target, double lse, double target_weight, double other_weight) {
  for (int64_t i = 0; i < n; ++i) z[i] = std::exp(z[i] - lse) - other_weight;
  if (target >= 0) z[target] -= target_weight;
}

}  // namespace gram
