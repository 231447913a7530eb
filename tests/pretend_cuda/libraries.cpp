// cuBLAS and cuDNN: a call that computes counts as one kernel. The build adds the other functions (stubs.py). Types are
// written here, because the libraries' headers include some that PyTorch's packages lack.
#include <cstdint>
#include <cstring>

#include "pretend.hpp"

using namespace pretend;
using Status = int;  // cublasStatus_t, cudnnStatus_t: 0 is success

struct Handle {
  cudaStream_t stream = nullptr;
};

// A function of either library whose first argument is a handle.
EXPORT void pretend_library_call(Handle* handle, const char* name) { launch(stream_of(handle->stream), name); }

EXPORT Status cublasCreate_v2(Handle** handle) {
  *handle = new Handle;
  return 0;
}

EXPORT Status cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}

EXPORT Status cudnnCreate(Handle** handle) { return cublasCreate_v2(handle); }
EXPORT Status cudnnSetStream(Handle* handle, cudaStream_t stream) { return cublasSetStream_v2(handle, stream); }

EXPORT Status cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                             int* count) {
  memset(results, 0, 96);  // sizeof(cublasLtMatmulHeuristicResult_t): success, without a workspace
  *count = 1;
  return 0;
}

EXPORT Status cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                             const void*, void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  launch(stream_of(stream), "cublasLtMatmul");
  return 0;
}

// PyTorch describes a convolution as a graph, asks for engines, takes the first, and executes its plan.
EXPORT Status cudnnBackendGetAttribute(void*, int, int type, int64_t, int64_t* count, void* values) {
  constexpr int type_int64 = 3;
  constexpr int type_descriptor = 15;
  if (count != nullptr) *count = type == type_int64 || type == type_descriptor ? 1 : 0;
  if (type == type_int64 && values != nullptr) *static_cast<int64_t*>(values) = 0;  // no workspace, engine 0
  return 0;
}

EXPORT Status cudnnBackendExecute(Handle* handle, void*, void*) {
  launch(stream_of(handle->stream), "cuDNN convolution");
  return 0;
}
