// The two-token pair loss of one sample (paper, Eq. 6-8): scalar arithmetic shared by the CPU and the CUDA kernels.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define GRAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRAM_HOST_DEVICE inline
#endif

namespace gram {

template <typename T>
struct PairLoss {
  T loss;
  T dloss_dmargin;
};

// margin = Z_A - Z_B; preference = probability that A is preferred (1, 0, 1/2 for a tie); label_smoothing = eps.
// With v = margin if A is preferred and -margin otherwise: loss = softplus(-v) + eps v.  Swapping A and B (-margin and
// 1 - preference) gives the same loss and the opposite derivative, bit for bit.  Finite for any finite margin.
template <typename T>
GRAM_HOST_DEVICE PairLoss<T> pair_loss(T margin, T preference, T label_smoothing) {
  const bool prefers_a = preference >= T(0.5);
  const T sign = prefers_a ? T(1) : T(-1);
  const T certainty = prefers_a ? preference : T(1) - preference;
  const T eps = label_smoothing + (T(1) - T(2) * label_smoothing) * (T(1) - certainty);
  const T towards = sign * margin;
  const T exponential = std::exp(-std::fabs(towards));
  const T other = (towards >= T(0) ? exponential : T(1)) / (T(1) + exponential);  // sigmoid(-towards)
  const T softplus = std::log1p(exponential) + (towards < T(0) ? -towards : T(0));
  return {softplus + eps * towards, sign * (eps - other)};
}

}  // namespace gram
