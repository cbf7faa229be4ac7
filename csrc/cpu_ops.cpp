// CPU kernels as PyTorch operators, on LibTorch's stable ABI.  The callers, kernels/pair_loss.py and kernels/cross_entropy.py,
// describe the arguments, check their shapes and dtypes, and allocate the outputs.  Each row is computed by one thread in a
// fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "cross_entropy.h"
#include "pair_loss.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 1 << 14;  // with fewer, starting a thread costs more than it saves

// Calls f with a null pointer to the element type and a zero of the compute type.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr), float{});
    case ScalarType::Double: return f(static_cast<double*>(nullptr), double{});
    case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(nullptr), float{});
    case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(nullptr), float{});
    default: STD_TORCH_CHECK(false, "gram_engine CPU kernels: fp32, bf16, fp16 or float64 is needed");
  }
}

template <typename F>
void for_rows(int64_t rows, int64_t elements_in_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_in_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The row of label b in hidden, or -1.
int64_t position(const std::optional<Tensor>& rows, int64_t b) {
  return rows ? static_cast<const int64_t*>(rows->const_data_ptr())[b] : b;
}

template <typename T, typename A>
void dot_products(const T* x, const A* u, int64_t n, A* squares, A* products) {
  A square[gram::kLanes] = {}, product[gram::kLanes] = {};
  int64_t i = 0;
  for (; i + gram::kLanes <= n; i += gram::kLanes)
    for (int64_t lane = 0; lane < gram::kLanes; ++lane) {
      const A value = static_cast<A>(x[i + lane]);
      square[lane] += value * value;
      product[lane] += value * u[i + lane];
    }
  for (; i < n; ++i) {
    const A value = static_cast<A>(x[i]);
    square[0] += value * value;
    product[0] += value * u[i];
  }
  *squares = gram::lanes_sum(square);
  *products = gram::lanes_sum(product);
}

// norm_eps < 0: no norm.
void pair_loss_forward(
    const Tensor hidden, const std::optional<Tensor> rows, const Tensor direction, const Tensor preference,
    double label_smoothing, double norm_eps, Tensor loss_out, Tensor margin_out, Tensor rstd_out, Tensor dloss_dmargin_out) {
  const int64_t labels = preference.numel(), size = direction.numel(), stride = hidden.stride(0);
  dispatch(hidden.scalar_type(), [&](auto* element, auto zero) {
    using T = std::remove_pointer_t<decltype(element)>;
    using A = decltype(zero);
    for_rows(labels, size, [&](int64_t b) {
      A loss = 0, margin = 0, rstd = 0, dloss_dmargin = 0;
      if (const int64_t row = position(rows, b); row >= 0) {
        A squares, products;
        dot_products(data<T>(hidden) + row * stride, data<A>(direction), size, &squares, &products);
        rstd = norm_eps < 0 ? A(1) : A(1) / std::sqrt(squares / static_cast<A>(size) + static_cast<A>(norm_eps));
        margin = rstd * products;
        const auto result = gram::pair_loss<A>(margin, data<A>(preference)[b], static_cast<A>(label_smoothing));
        loss = result.loss;
        dloss_dmargin = result.dloss_dmargin;
      }
      data<A>(loss_out)[b] = loss;
      data<A>(margin_out)[b] = margin;
      data<A>(rstd_out)[b] = rstd;
      data<A>(dloss_dmargin_out)[b] = dloss_dmargin;
    });
  });
}

void pair_loss_backward(
    const Tensor hidden, const std::optional<Tensor> rows, const Tensor direction, const Tensor margin, const Tensor rstd,
    const Tensor grad_margin, bool has_norm, Tensor grad_rows, Tensor grad_direction) {
  const int64_t labels = margin.numel(), size = direction.numel(), stride = hidden.stride(0);
  dispatch(hidden.scalar_type(), [&](auto* element, auto zero) {
    using T = std::remove_pointer_t<decltype(element)>;
    using A = decltype(zero);
    const T* x = data<T>(hidden);
    const A *u = data<A>(direction), *r = data<A>(rstd), *d = data<A>(margin), *g = data<A>(grad_margin);
    for_rows(labels, size, [&](int64_t b) {
      const int64_t row = position(rows, b);
      T* out = data<T>(grad_rows) + b * size;
      const A along = row < 0 ? A(0) : g[b] * r[b];
      if (row < 0) {
        std::fill(out, out + size, static_cast<T>(0.0f));
      } else if (!has_norm) {
        for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(along * u[i]);
      } else {
        const T* from = x + row * stride;
        const A back = along * r[b] * d[b] / static_cast<A>(size);
        for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(along * u[i] - back * static_cast<A>(from[i]));
      }
    });
    // Threads share the columns, and each adds the labels in order: the sum does not depend on the number of threads.
    A* s = data<A>(grad_direction);
    const int64_t grain = kElementsPerThread / std::max<int64_t>(1, labels) + 1;
    torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
      std::fill(s + begin, s + end, A(0));
      for (int64_t b = 0; b < labels; ++b)
        if (const int64_t row = position(rows, b); row >= 0)
          for (int64_t i = begin; i < end; ++i) s[i] += g[b] * r[b] * static_cast<A>(x[row * stride + i]);
    });
  });
}

// out: [rows, 4], see kernels/cross_entropy.py.
void cross_entropy_stats(const Tensor logits, const Tensor targets, int64_t valid, Tensor out) {
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  dispatch(logits.scalar_type(), [&](auto* element, auto zero) {
    using T = std::remove_pointer_t<decltype(element)>;
    using A = decltype(zero);
    for_rows(rows, valid, [&](int64_t row) {
      const T* z = data<T>(logits) + row * stride;
      const gram::RowStats stats = gram::row_stats<T>(z, valid);
      A* result = data<A>(out) + 4 * row;
      result[0] = static_cast<A>(stats.largest);
      result[1] = static_cast<A>(stats.exponentials);
      result[2] = target[row] >= 0 && target[row] < valid ? static_cast<A>(z[target[row]]) : A(0);
      result[3] = static_cast<A>(stats.total);
    });
  });
}

void cross_entropy_grad_(
    Tensor logits, const Tensor targets, const Tensor lse, int64_t valid, double target_weight,
    double other_weight) {
  const int64_t rows = logits.size(0), columns = logits.size(1), stride = logits.stride(0);
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  dispatch(logits.scalar_type(), [&](auto* element, auto zero) {
    using T = std::remove_pointer_t<decltype(element)>;
    using A = decltype(zero);
    for_rows(rows, columns, [&](int64_t row) {
      T* z = data<T>(logits) + row * stride;
      const int64_t here = target[row] < valid ? target[row] : -1;
      gram::row_gradient<T, A>(
          z, valid, here, data<A>(lse)[row], static_cast<A>(target_weight), static_cast<A>(other_weight));
      std::fill(z + valid, z + columns, static_cast<T>(0.0f));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(gram_engine_cpu, m) {
  m.def(
      "pair_loss_forward(Tensor hidden, Tensor? rows, Tensor direction, Tensor preference, float label_smoothing, "
      "float norm_eps, Tensor(a!) loss, Tensor(b!) margin, Tensor(c!) rstd, Tensor(d!) dloss_dmargin) -> ()");
  m.def(
      "pair_loss_backward(Tensor hidden, Tensor? rows, Tensor direction, Tensor margin, Tensor rstd, Tensor grad_margin, "
      "bool has_norm, Tensor(a!) grad_rows, Tensor(b!) grad_direction) -> ()");
  m.def("cross_entropy_stats(Tensor logits, Tensor targets, int valid, Tensor(a!) out) -> ()");
  m.def(
      "cross_entropy_grad_(Tensor(a!) logits, Tensor targets, Tensor lse, int valid, float target_weight, "
      "float other_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gram_engine_cpu, CPU, m) {
  m.impl("pair_loss_forward", TORCH_BOX(&pair_loss_forward));
  m.impl("pair_loss_backward", TORCH_BOX(&pair_loss_backward));
  m.impl("cross_entropy_stats", TORCH_BOX(&cross_entropy_stats));
  m.impl("cross_entropy_grad_", TORCH_BOX(&cross_entropy_grad_));
}
