// The Python module minisp._C. Each binding is one line of documentation and one call; the work is in the other files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "attention.h"
#include "build_info.h"
#include "device.h"
#include "elementwise.h"
#include "gram.h"
#include "tiles.h"

namespace py = pybind11;

namespace {

py::dict build_info_dict() {
  const minisp::BuildInfo info = minisp::build_info();
  py::dict result;
  result["version"] = info.version;
  result["compiler"] = info.compiler;
  result["cxx_standard"] = info.cxx_standard;
  result["cuda"] = info.cuda;
  result["cuda_archs"] = info.cuda_archs;
  result["instruction_sets"] = minisp::instruction_sets();
  return result;
}

// Addresses come from Tensor.data_ptr(); minisp/native.py, the only caller, has checked what lies behind them.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A (batch, heads, tokens, dim) tensor: its address and the strides of its first three dimensions, in elements.
using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

minisp::Heads heads(const Strided& tensor) {
  return {at<minisp::bf16>(std::get<0>(tensor)), std::get<1>(tensor), std::get<2>(tensor), std::get<3>(tensor)};
}

// batch, heads, kv_heads, tokens, dim, scale.
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, float>;

minisp::AttentionShape attention_shape(const ShapeTuple& shape) {
  const auto [batch, heads, kv_heads, tokens, dim, scale] = shape;
  return {batch, heads, kv_heads, tokens, dim, scale};
}

void bind_attention(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  module.def(
      "attention_forward",
      [](Strided query, Strided key, Strided value, Strided out, uintptr_t logsumexp, ShapeTuple shape, int threads) {
        minisp::attention_forward(heads(query), heads(key), heads(value), heads(out), at<float>(logsumexp),
                                  attention_shape(shape), threads);
      },
      released, "Causal attention and the log-sum-exp of its scores; see csrc/attention.h.");
  module.def(
      "attention_backward",
      [](std::array<Strided, 5> read, uintptr_t logsumexp, std::array<Strided, 3> written, ShapeTuple shape,
         int threads) {
        const minisp::AttentionRecord record{heads(read[0]), heads(read[1]), heads(read[2]),
                                             heads(read[3]), heads(read[4]), at<float>(logsumexp)};
        minisp::attention_backward(record, heads(written[0]), heads(written[1]), heads(written[2]),
                                   attention_shape(shape), threads);
      },
      released, "Gradients of query, key and value; see csrc/attention.h.");
}

void bind_cpu_kernels(py::module_& module) {
  using minisp::Activation;
  using minisp::Matrix;
  const py::call_guard<py::gil_scoped_release> released;
  module.def(
      "activation_backward",
      [](uintptr_t gate, uintptr_t up, uintptr_t grad_x, uintptr_t sums, int64_t rows, int64_t columns, bool is_bf16,
         int kind, int threads) {
        minisp::activation_backward(at<void>(gate), at<void>(up), at<void>(grad_x), at<float>(sums),
                                    Matrix{rows, columns, is_bf16}, static_cast<Activation>(kind), threads);
      },
      released, "Gradients in place and saliency sums; see csrc/elementwise.h.");
  module.def(
      "cross_entropy",
      [](uintptr_t logits, uintptr_t targets, uintptr_t gradient, int64_t rows, int64_t columns, bool is_bf16,
         int threads) {
        return minisp::cross_entropy(at<void>(logits), at<int64_t>(targets), at<void>(gradient),
                                     Matrix{rows, columns, is_bf16}, threads);
      },
      released, "Summed negative log likelihood and its gradient; see csrc/elementwise.h.");
  module.def("tiles_available", &minisp::tiles_available, "Whether this processor has what gram_update and attention need.");
  module.def(
      "gram_update",
      [](uintptr_t gram, uintptr_t x, int64_t num_tokens, int64_t width, int threads) {
        minisp::gram_update(at<float>(gram), at<uint16_t>(x), num_tokens, width, threads);
      },
      released, "gram += X^T X on the lower triangle; see csrc/gram.h.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "minisp's native code: how it was built, and what it can run on.";
  module.def("build_info", &build_info_dict,
             "Version, compiler, C++ standard, CUDA architectures, and the processor's instruction sets.");
  module.def("cuda_device_count", &minisp::cuda_device_count,
             "CUDA devices that can be used now; 0 without a driver or in a CPU-only build. Never raises.");
  bind_cpu_kernels(module);
  bind_attention(module);
}
