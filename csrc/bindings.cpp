// The Python module minisp._C. Each binding is one line of documentation and one call; the work is in the other files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "device.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "minisp's native code: how it was built, and what it can run on.";
  module.def("build_info", &build_info_dict,
             "Version, compiler, C++ standard, CUDA architectures, and the processor's instruction sets.");
  module.def("cuda_device_count", &minisp::cuda_device_count,
             "CUDA devices that can be used now; 0 without a driver or in a CPU-only build. Never raises.");
}
