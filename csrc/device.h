// The CUDA device as the host code sees it; a build without CUDA has the same functions and no device.
#pragma once

namespace minisp {

#ifdef MINISP_WITH_CUDA
// Devices that can be used now: 0 without a driver, never an error.
int cuda_device_count();
#else
inline int cuda_device_count() { return 0; }
#endif

}  // namespace minisp
