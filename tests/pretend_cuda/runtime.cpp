// The CUDA runtime: device, memory, streams and events, capture, kernels.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "pretend.hpp"

using namespace pretend;

// --- the device

constexpr size_t device_bytes = size_t(140) << 30;

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "pretend H200");
  properties->totalGlobalMem = device_bytes;
  properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->warpSize = attribute(cudaDevAttrWarpSize);
  properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  for (int axis = 0; axis < 3; ++axis) {
    properties->maxThreadsDim[axis] = attribute(cudaDevAttrMaxBlockDimX + axis);
    properties->maxGridSize[axis] = attribute(cudaDevAttrMaxGridDimX + axis);
  }
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return answer(value, attribute(which));
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  synchronization("cudaDeviceSynchronize");
  return unsafe("cudaDeviceSynchronize") ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "error of the pretend device";
  }
}

EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// --- memory

using Ranges = std::map<const char*, size_t>;  // bytes by first address
static Ranges device_ranges;
static Ranges pinned_ranges;
static size_t used_bytes = 0;

static bool contains(const Ranges& ranges, const void* address) {
  Lock lock(mutex);
  const char* wanted = static_cast<const char*>(address);
  auto next = ranges.upper_bound(wanted);
  if (next == ranges.begin()) return false;
  auto [start, bytes] = *std::prev(next);
  return wanted < start + bytes;
}

bool pretend::is_device(const void* address) { return contains(device_ranges, address); }
bool pretend::is_pinned(const void* address) { return contains(pinned_ranges, address); }

static cudaError_t allocate(Ranges& ranges, void** address, size_t bytes) {
  Lock lock(mutex);
  if (used_bytes + bytes > device_bytes) return failed(cudaErrorMemoryAllocation);
  // Untouched pages take no memory, so a test may allocate as much as a real run. They are zero.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (*address == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  ranges[static_cast<char*>(*address)] = bytes;
  if (&ranges == &device_ranges) used_bytes += bytes;
  return cudaSuccess;
}

static cudaError_t release(Ranges& ranges, void* address) {
  Lock lock(mutex);
  auto found = ranges.find(static_cast<char*>(address));
  if (found == ranges.end()) return cudaSuccess;
  if (&ranges == &device_ranges) used_bytes -= found->second;
  munmap(address, found->second);
  ranges.erase(found);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (unsafe("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
  return allocate(device_ranges, address, bytes);
}

EXPORT cudaError_t cudaFree(void* address) {
  if (unsafe("cudaFree")) return cudaErrorStreamCaptureUnsupported;
  return release(device_ranges, address);
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  if (unsafe("cudaHostAlloc")) return cudaErrorStreamCaptureUnsupported;
  return allocate(pinned_ranges, address, bytes);
}

EXPORT cudaError_t cudaFreeHost(void* address) { return release(pinned_ranges, address); }

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof *attributes);
  bool pinned = is_pinned(address);
  bool device = is_device(address);
  attributes->type = device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  attributes->devicePointer = device || pinned ? const_cast<void*>(address) : nullptr;
  attributes->hostPointer = pinned ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = device_bytes - used_bytes;
  *total = device_bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
  static const char* const names[] = {"HtoH", "HtoD", "DtoH", "DtoD", "default"};
  std::string name = std::string("memcpy ") + names[kind];
  Stream* stream = stream_of(handle);
  bool pageable =
      (kind == cudaMemcpyHostToDevice && !is_pinned(from)) || (kind == cudaMemcpyDeviceToHost && !is_pinned(to));
  if (pageable) {
    name += " pageable";
    // A replay would use host memory that may be gone.
    if (stream->capture != nullptr) violation(nullptr, cudaSuccess, "pageable copy", name);
    if (stream->capture == nullptr) synchronization(name);
  }
  launch(stream, name);
  memmove(to, from, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  launch(stream_of(stream), "memset");
  // Large tensors stay untouched, so that they take no memory.
  if (bytes < (1 << 20)) memset(address, value, bytes);
  return cudaSuccess;
}

// --- streams and events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return answer(stream, reinterpret_cast<cudaStream_t>(new_stream()));
}

// A call that asks for the state of a stream, which a captured one does not have.
static cudaError_t ask(cudaStream_t handle, const char* call) {
  Stream* stream = stream_of(handle);
  if (stream->capture != nullptr) {
    return violation(stream->capture, cudaErrorStreamCaptureUnsupported, "captured stream", call);
  }
  return unsafe(call) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) { return ask(stream, "cudaStreamQuery"); }

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  synchronization("cudaStreamSynchronize");
  return ask(stream, "cudaStreamSynchronize");
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return wait(stream_of(stream), event_of(event));
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return answer(event, reinterpret_cast<cudaEvent_t>(new Event));
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return record(event_of(event), stream_of(stream));
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t ask(cudaEvent_t handle, const char* call) {
  Event* event = event_of(handle);
  if (captured(event)) return violation(event->capture, cudaErrorCapturedEvent, "captured event", call);
  return unsafe(call) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return ask(event, "cudaEventQuery"); }

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  synchronization("cudaEventSynchronize");
  return ask(event, "cudaEventSynchronize");
}

// --- capture and graphs

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return begin_capture(stream_of(stream), mode);
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return end_capture(stream_of(stream), reinterpret_cast<Capture**>(graph));
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Capture* capture = stream_of(handle)->capture;
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->valid   ? cudaStreamCaptureStatusActive
                               : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* number, cudaGraph_t* graph,
                                            const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  Capture* capture = stream_of(handle)->capture;
  if (capture != nullptr && number != nullptr) *number = capture->number;
  if (capture != nullptr && graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return answer(count, reinterpret_cast<Capture*>(graph)->nodes);
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return answer(executable, reinterpret_cast<cudaGraphExec_t>(graph));
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  return launch(stream_of(stream), "graph launch");
}

// --- kernels: nvcc's code registers each with its name and launches it by the address of a host function

static std::map<const void*, std::string> kernel_names;

EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
  Lock lock(mutex);
  kernel_names[function] = name;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return answer(kernel, static_cast<cudaKernel_t>(const_cast<void*>(function)));
}

EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  Lock lock(mutex);
  auto found = kernel_names.find(function);
  return launch(stream_of(stream), found == kernel_names.end() ? "unknown kernel" : found->second);
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, 0, config->stream);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = 49152;
  attributes->numRegs = 32;
  attributes->binaryVersion = 90;
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

// --- access to the driver

static int succeed() { return 0; }

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) *function = reinterpret_cast<void*>(succeed);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
