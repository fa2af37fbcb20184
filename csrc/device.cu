#include "device.h"

#include <cuda_runtime_api.h>

namespace minisp {

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  // A missing driver leaves an error behind that the next CUDA call would report as its own.
  cudaGetLastError();
  return 0;
}

}  // namespace minisp
