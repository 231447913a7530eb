// The CUDA driver: Triton, and Inductor's launcher, load and launch their kernels by it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "pretend.hpp"

using namespace pretend;

int pretend::attribute(int which) {
  static const std::map<int, int> values = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrL2CacheSize, 60 << 20},
  };
  auto found = values.find(which);
  return found == values.end() ? 1 : found->second;  // others are features, which the device has
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  *static_cast<CUdeviceptr*>(value) = address;
  const void* pointer = reinterpret_cast<const void*>(address);
  bool known = address == 0 || is_device(pointer) || is_pinned(pointer);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// --- modules and kernels; a function's handle is its name

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
  if (unsafe("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = reinterpret_cast<CUmodule>(0x2000);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new std::string(std::string("triton ") + name));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

static CUresult launch_function(CUfunction function, CUstream stream) {
  launch(stream_of(stream), *reinterpret_cast<std::string*>(function));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               unsigned, CUstream stream, void**, void**) {
  return launch_function(function, stream);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  return launch_function(function, config->hStream);
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned,
                                          unsigned, unsigned, CUstream stream, void**) {
  return launch_function(function, stream);
}
