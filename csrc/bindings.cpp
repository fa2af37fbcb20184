// The Python module minisp._C. Each binding is one line of documentation and one call; the work is in the other files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "attention.h"
#include "build_info.h"
#include "cholesky_count.h"
#include "cholesky_cpu.h"
#include "cholesky_cuda.h"
#include "device.h"
#include "elementwise.h"
#include "gram.h"
#include "level.h"
#include "norms.h"

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
  result["levels"] = minisp::built_levels();
  result["machine_level"] = minisp::name_of(minisp::machine_level());
  return result;
}

// Addresses come from Tensor.data_ptr(); minisp/ops/native.py, the only caller, has checked what lies behind them.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A (batch, heads, tokens, dim) tensor: its address and the strides of its first three dimensions, in elements.
using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

minisp::Heads heads(const Strided& tensor) {
  return {at<void>(std::get<0>(tensor)), std::get<1>(tensor), std::get<2>(tensor), std::get<3>(tensor)};
}

// batch, heads, kv_heads, tokens, dim, scale, is_bf16.
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, float, bool>;

minisp::AttentionShape attention_shape(const ShapeTuple& shape) {
  const auto [batch, heads, kv_heads, tokens, dim, scale, is_bf16] = shape;
  return {batch, heads, kv_heads, tokens, dim, scale, is_bf16};
}

void bind_attention(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  module.def(
      "attention_forward",
      [](Strided query, Strided key, Strided value, Strided out, uintptr_t logsumexp, ShapeTuple shape, int threads) {
        minisp::attention_forward({heads(query), heads(key), heads(value)}, heads(out), at<float>(logsumexp),
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
  module.def(
      "gram_update",
      [](uintptr_t gram, uintptr_t x, int64_t num_tokens, int64_t width, bool is_bf16, int threads) {
        minisp::gram_update(at<float>(gram), at<void>(x), Matrix{num_tokens, width, is_bf16}, threads);
      },
      released, "gram += X^T X on the lower triangle; see csrc/gram.h.");
}

// rows, columns, whether bfloat16, and what is added to the weight.
using NormTuple = std::tuple<int64_t, int64_t, bool, float>;

minisp::NormShape norm_shape(const NormTuple& shape) {
  const auto [rows, columns, is_bf16, offset] = shape;
  return {rows, columns, is_bf16, offset};
}

minisp::Rotated rotated(const Strided& in, const Strided& out, int64_t heads) {
  return {at<void>(std::get<0>(in)), at<void>(std::get<0>(out)), heads,
          std::get<1>(in),           std::get<2>(in),            std::get<3>(in),
          std::get<1>(out),          std::get<2>(out),           std::get<3>(out)};
}

// Address, and strides of windows and tokens in elements.
using AnglesTuple = std::tuple<uintptr_t, int64_t, int64_t>;

minisp::Angles angles(const AnglesTuple& table) {
  return {at<void>(std::get<0>(table)), std::get<1>(table), std::get<2>(table)};
}

void bind_norms(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  module.def(
      "rms_norm",
      [](uintptr_t hidden, uintptr_t weight, float eps, uintptr_t out, uintptr_t inverse, NormTuple shape,
         int threads) {
        minisp::rms_norm(at<void>(hidden), at<void>(weight), eps, at<void>(out), at<float>(inverse), norm_shape(shape),
                         threads);
      },
      released, "RMSNorm and its reciprocal root mean squares; see csrc/norms.h.");
  module.def(
      "rms_norm_backward",
      [](uintptr_t grad, uintptr_t hidden, uintptr_t weight, uintptr_t inverse, uintptr_t grad_hidden, NormTuple shape,
         int threads) {
        minisp::rms_norm_backward(at<void>(grad), at<void>(hidden), at<void>(weight), at<float>(inverse),
                                  at<void>(grad_hidden), norm_shape(shape), threads);
      },
      released, "Gradient of RMSNorm; see csrc/norms.h.");
  module.def(
      "rotate",
      [](std::array<Strided, 2> query, std::array<Strided, 2> key, std::array<int64_t, 2> heads, AnglesTuple cosine,
         AnglesTuple sine, std::tuple<int64_t, int64_t, int64_t, bool, bool> shape, int threads) {
        const auto [batch, tokens, dim, is_bf16, is_backward] = shape;
        minisp::rotate(rotated(query[0], query[1], heads[0]), rotated(key[0], key[1], heads[1]), angles(cosine),
                       angles(sine), {batch, tokens, dim, is_bf16, is_backward}, threads);
      },
      released, "Rotary embedding of queries and keys, or its transpose; see csrc/norms.h.");
}

// Address and stride of a row-major matrix.
using PlaceTuple = std::tuple<uintptr_t, int64_t>;

// matrix, size, is_double, panel, workspace, work_rows, gemm, large_gemm.
using CholeskyTuple = std::tuple<PlaceTuple, int64_t, bool, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t>;

minisp::Place place(const PlaceTuple& matrix) { return {at<void>(std::get<0>(matrix)), std::get<1>(matrix)}; }

minisp::CholeskyCall cholesky_call(const CholeskyTuple& call) {
  const auto& [matrix, size, is_double, panel, workspace, work_rows, gemm, large_gemm] = call;
  return {place(matrix), size, is_double, panel, at<void>(workspace), work_rows, at<void>(gemm), at<void>(large_gemm)};
}

py::dict cholesky_count(int64_t size, int64_t count, bool is_double, bool pieces) {
  const minisp::CholeskyCount found = minisp::count_cuda(size, count, is_double, pieces);
  py::dict result;
  result["products"] = found.products;
  result["inversions"] = found.inversions;
  result["copies"] = found.copies;
  result["flops"] = found.flops;
  result["large_flops"] = found.large_flops;
  return result;
}

void bind_cholesky(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  module.attr("cholesky_piece_columns") = minisp::kPieceColumns;
  module.def("cholesky_workspace", &minisp::workspace_bytes, "Bytes of workspace; see csrc/cholesky.h.");
  module.def(
      "cholesky_factor", [](const CholeskyTuple& call) { return minisp::factor_cpu(cholesky_call(call)); }, released,
      "Factors in place; 0 or the first bad pivot; see csrc/cholesky_cpu.h.");
  module.def(
      "cholesky_solve",
      [](const CholeskyTuple& call, const PlaceTuple& right, int64_t count) {
        minisp::solve_cpu(cholesky_call(call), place(right), count);
      },
      released, "Right-hand sides become solutions in place; see csrc/cholesky_cpu.h.");
  module.def("cholesky_count", &cholesky_count, "What the CUDA solver would launch; see csrc/cholesky_count.h.");
#ifdef MINISP_WITH_CUDA
  // handle, stream, pivot, pieces.
  using Device = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
  const auto cuda_call = [](const CholeskyTuple& call, const Device& device) {
    const auto [handle, stream, pivot, pieces] = device;
    return minisp::CudaCall{cholesky_call(call), at<void>(handle), at<void>(stream), at<int64_t>(pivot), at<void>(pieces)};
  };
  module.def(
      "cholesky_factor_cuda",
      [=](const CholeskyTuple& call, const Device& device) { minisp::factor_cuda(cuda_call(call, device)); }, released,
      "Queues the factorisation; see csrc/cholesky_cuda.h.");
  module.def(
      "cholesky_solve_cuda",
      [=](const CholeskyTuple& call, const Device& device, const PlaceTuple& right, int64_t count) {
        minisp::solve_cuda(cuda_call(call, device), place(right), count);
      },
      released, "Queues the solution; see csrc/cholesky_cuda.h.");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "minisp's native code: how it was built, and what it can run on.";
  module.def("build_info", &build_info_dict,
             "Version, compiler, C++ standard, CUDA architectures, and the processor's instruction sets.");
  module.def("active_level", [] { return minisp::name_of(minisp::active_level()); },
             "The level that the CPU kernels use; ValueError where MINISP_MAX_CPU_ISA names none. See csrc/level.h.");
  module.def("cuda_device_count", &minisp::cuda_device_count,
             "CUDA devices that can be used now; 0 without a driver or in a CPU-only build. Never raises.");
  bind_cpu_kernels(module);
  bind_attention(module);
  bind_norms(module);
  bind_cholesky(module);
}
