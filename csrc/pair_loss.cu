// CUDA kernels of the two-token pair loss; kernels/pair_loss.py describes the arguments.  There are no torch headers: the
// launchers take plain pointers (kernels/cuda.py calls them through ctypes) and return a cudaError.  There are no float
// atomics: sums run in a fixed order, so that the results are the same in every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "pair_loss.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

template <typename A, typename T>
__device__ __forceinline__ A load(T value) {
  return static_cast<A>(value);
}
template <>
__device__ __forceinline__ float load<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float load<float, __half>(__half value) {
  return __half2float(value);
}

template <typename T, typename A>
__device__ __forceinline__ T store(A value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half store<__half, float>(float value) {
  return __float2half_rn(value);
}

// Sums of two numbers over the block, in thread 0.
template <typename A>
__device__ __forceinline__ void block_sums(A& first, A& second) {
  __shared__ A partial[2][kWarps];
  for (int step = 16; step > 0; step >>= 1) {
    first += __shfl_down_sync(0xffffffffu, first, step);
    second += __shfl_down_sync(0xffffffffu, second, step);
  }
  if (threadIdx.x % 32 == 0) {
    partial[0][threadIdx.x / 32] = first;
    partial[1][threadIdx.x / 32] = second;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) {
      first += partial[0][warp];
      second += partial[1][warp];
    }
}

// What the forward pass writes, each [labels].
template <typename A>
struct Results {
  A *loss, *margin, *rstd, *dloss_dmargin;
};

// One block per label.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* __restrict__ hidden, int64_t stride, const int64_t* __restrict__ rows, const A* __restrict__ direction,
    const A* __restrict__ preference, A label_smoothing, A norm_eps, int64_t size, Results<A> results) {
  const int64_t label = blockIdx.x;
  const int64_t row = rows ? rows[label] : label;
  A squares = 0, products = 0;
  if (row >= 0) {
    const T* x = hidden + row * stride;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const A value = load<A>(x[i]);
      squares += value * value;
      products += value * direction[i];
    }
  }
  block_sums(squares, products);
  if (threadIdx.x != 0) return;
  A rstd = 0, margin = 0;
  gram::PairLoss<A> result{0, 0};
  if (row >= 0) {
    rstd = norm_eps < A(0) ? A(1) : A(1) / sqrt(squares / static_cast<A>(size) + norm_eps);
    margin = rstd * products;
    result = gram::pair_loss<A>(margin, preference[label], label_smoothing);
  }
  results.loss[label] = result.loss;
  results.margin[label] = margin;
  results.rstd[label] = rstd;
  results.dloss_dmargin[label] = result.dloss_dmargin;
}

// The first `labels` blocks write the gradient of one label row each.  Each of the other blocks sums 256 columns of the
// gradient of direction, label by label.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const T* __restrict__ hidden, int64_t stride, const int64_t* __restrict__ rows, const A* __restrict__ direction,
    const A* __restrict__ margin, const A* __restrict__ rstd, const A* __restrict__ grad_margin, bool has_norm,
    int64_t labels, int64_t size, T* __restrict__ grad_rows, A* __restrict__ grad_direction) {
  if (blockIdx.x < labels) {
    const int64_t label = blockIdx.x, row = rows ? rows[label] : label;
    const A along = row < 0 ? A(0) : grad_margin[label] * rstd[label];
    const bool with_norm = row >= 0 && has_norm;
    const A back = with_norm ? along * rstd[label] * margin[label] / static_cast<A>(size) : A(0);
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      A value = row < 0 ? A(0) : along * direction[i];
      if (with_norm) value -= back * load<A>(hidden[row * stride + i]);
      grad_rows[label * size + i] = store<T>(value);
    }
    return;
  }
  const int64_t column = (blockIdx.x - labels) * kThreads + threadIdx.x;
  if (column >= size) return;
  A sum = 0;
  for (int64_t label = 0; label < labels; ++label) {
    const int64_t row = rows ? rows[label] : label;
    if (row >= 0) sum += grad_margin[label] * rstd[label] * load<A>(hidden[row * stride + column]);
  }
  grad_direction[column] = sum;
}

template <typename T, typename A>
int launch_forward(
    const void* hidden, int64_t stride, const int64_t* rows, const void* direction, const void* preference,
    double label_smoothing, double norm_eps, int64_t labels, int64_t size, void* const (&out)[4], cudaStream_t stream) {
  const Results<A> results{
      static_cast<A*>(out[0]), static_cast<A*>(out[1]), static_cast<A*>(out[2]), static_cast<A*>(out[3])};
  forward_kernel<T, A><<<static_cast<unsigned>(labels), kThreads, 0, stream>>>(
      static_cast<const T*>(hidden), stride, rows, static_cast<const A*>(direction), static_cast<const A*>(preference),
      static_cast<A>(label_smoothing), static_cast<A>(norm_eps), size, results);
  return cudaGetLastError();
}

template <typename T, typename A>
int launch_backward(
    const void* hidden, int64_t stride, const int64_t* rows, const void* direction, const void* margin, const void* rstd,
    const void* grad_margin, bool has_norm, int64_t labels, int64_t size, void* grad_rows, void* grad_direction,
    cudaStream_t stream) {
  const int64_t blocks = labels + (size + kThreads - 1) / kThreads;
  backward_kernel<T, A><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(hidden), stride, rows, static_cast<const A*>(direction), static_cast<const A*>(margin),
      static_cast<const A*>(rstd), static_cast<const A*>(grad_margin), has_norm, labels, size, static_cast<T*>(grad_rows),
      static_cast<A*>(grad_direction));
  return cudaGetLastError();
}

}  // namespace

// labels >= 1.  norm_eps < 0: no norm.  rows may be null: label b is row b.
extern "C" int gram_pair_loss_forward(
    int dtype, const void* hidden, int64_t stride, const int64_t* rows, const void* direction, const void* preference,
    double label_smoothing, double norm_eps, int64_t labels, int64_t size, void* loss, void* margin, void* rstd,
    void* dloss_dmargin, void* stream) {
  void* const out[4] = {loss, margin, rstd, dloss_dmargin};
  const auto launch = [&](auto* function) {
    return function(hidden, stride, rows, direction, preference, label_smoothing, norm_eps, labels, size, out,
                    static_cast<cudaStream_t>(stream));
  };
  switch (dtype) {
    case kFloat32: return launch(launch_forward<float, float>);
    case kFloat64: return launch(launch_forward<double, double>);
    case kBFloat16: return launch(launch_forward<__nv_bfloat16, float>);
    case kFloat16: return launch(launch_forward<__half, float>);
    default: return cudaErrorInvalidValue;
  }
}

extern "C" int gram_pair_loss_backward(
    int dtype, const void* hidden, int64_t stride, const int64_t* rows, const void* direction, const void* margin,
    const void* rstd, const void* grad_margin, int has_norm, int64_t labels, int64_t size, void* grad_rows,
    void* grad_direction, void* stream) {
  const auto launch = [&](auto* function) {
    return function(hidden, stride, rows, direction, margin, rstd, grad_margin, has_norm != 0, labels, size, grad_rows,
                    grad_direction, static_cast<cudaStream_t>(stream));
  };
  switch (dtype) {
    case kFloat32: return launch(launch_backward<float, float>);
    case kFloat64: return launch(launch_backward<double, double>);
    case kBFloat16: return launch(launch_backward<__nv_bfloat16, float>);
    case kFloat16: return launch(launch_backward<__half, float>);
    default: return cudaErrorInvalidValue;
  }
}

extern "C" const char* gram_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
