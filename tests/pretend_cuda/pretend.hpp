// The state of the pretend device: streams, events, captures and the record of everything that ran (capture.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

// Functions that replace those of the CUDA libraries.
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace pretend {

// One lock for all state: autograd launches kernels from its threads.
using Lock = std::lock_guard<std::recursive_mutex>;
extern std::recursive_mutex mutex;

struct Stream;

// A capture that is under way, and later its graph.
struct Capture {
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  unsigned long long number;
  bool valid = true;
  std::set<Stream*> members;
  size_t nodes = 0;
};

// For each stream of a capture, the number of its nodes that precede a point.
using Preceding = std::map<Stream*, size_t>;

struct Stream {
  int number = 0;  // 0 is the legacy default stream
  Capture* capture = nullptr;
  size_t nodes = 0;  // in this capture
  Preceding preceding;
};

struct Event {
  bool recorded = false;
  Capture* capture = nullptr;
  Preceding preceding;
};

Stream* stream_of(cudaStream_t handle);
Stream* new_stream();
Event* event_of(cudaEvent_t handle);

// Error of the last call in this thread, for cudaGetLastError.
extern thread_local cudaError_t last_error;
extern thread_local cudaStreamCaptureMode thread_mode;
cudaError_t failed(cudaError_t error);

template <class Value>
cudaError_t answer(Value* place, Value value) {
  *place = value;
  return cudaSuccess;
}

// Record work in a stream: a kernel, a copy or the launch of a graph. In a captured stream it becomes a node.
cudaError_t launch(Stream* stream, const std::string& name);

// Record that the host waits for the device.
void synchronization(const std::string& call);

// Record a broken rule, and invalidate the capture (nullptr: it stays valid).
cudaError_t violation(Capture* capture, cudaError_t error, const std::string& rule, const std::string& detail);

// True if a call such as cudaMalloc breaks a capture that is under way; see cudaThreadExchangeStreamCaptureMode.
bool unsafe(const std::string& call);

cudaError_t record(Event* event, Stream* stream);
cudaError_t wait(Stream* stream, Event* event);
bool captured(const Event* event);

cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream* stream, Capture** graph);

// An attribute of the device, which is an H200; runtime and driver number them alike (driver.cpp).
int attribute(int which);

// True for memory of cudaMalloc, and of cudaHostAlloc or cudaHostRegister (runtime.cpp).
bool is_device(const void* address);
bool is_pinned(const void* address);

}  // namespace pretend
