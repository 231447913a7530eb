// Stream capture: each function states a rule of CUDA's programming guide, and records where it is broken.
#include <cxxabi.h>

#include <cstdlib>
#include <tuple>
#include <vector>

#include "pretend.hpp"

namespace pretend {

std::recursive_mutex mutex;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

namespace {

Stream legacy_stream;
int streams_made = 0;
unsigned long long captures_made = 0;
std::set<Capture*> under_way;

// The record, which pretend_report returns. A phase is a name that the test program has set.
std::string phase;
std::map<std::tuple<std::string, bool, std::string>, size_t> work;  // phase, captured, name
std::map<std::pair<std::string, std::string>, size_t> synchronizations;
std::vector<std::string> violations;
std::vector<std::string> captures;  // of each, the numbers of nodes of its streams

std::string demangled(const std::string& name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : name;
  free(readable);
  return result;
}

std::string title(const Stream* stream) {
  return stream->number == 0 ? "the legacy stream" : "stream " + std::to_string(stream->number);
}

}  // namespace

Stream* stream_of(cudaStream_t handle) {
  // 0, 1 and 2 are CUDA's names of the default streams.
  return reinterpret_cast<size_t>(handle) <= 2 ? &legacy_stream : reinterpret_cast<Stream*>(handle);
}

Stream* new_stream() {
  Lock lock(mutex);
  Stream* stream = new Stream;
  stream->number = ++streams_made;
  return stream;
}

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(Stream* stream, const std::string& name) {
  Lock lock(mutex);
  ++work[{phase, stream->capture != nullptr, name}];
  if (stream->capture != nullptr) {
    ++stream->capture->nodes;
    stream->preceding[stream] = ++stream->nodes;
  } else if (!under_way.empty()) {
    // CUDA permits this, but the work is not in the graph, so a replay would not repeat it.
    violation(nullptr, cudaSuccess, "escaped", demangled(name) + " on " + title(stream));
  }
  return cudaSuccess;
}

void synchronization(const std::string& call) {
  Lock lock(mutex);
  ++synchronizations[{phase, call}];
}

cudaError_t violation(Capture* capture, cudaError_t error, const std::string& rule, const std::string& detail) {
  Lock lock(mutex);
  if (capture != nullptr) capture->valid = false;
  violations.push_back(rule + ": " + detail);
  return failed(error);
}

bool unsafe(const std::string& call) {
  Lock lock(mutex);
  bool found = false;
  for (Capture* capture : under_way) {
    if (thread_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool same_thread = capture->thread == std::this_thread::get_id();
    bool both_global = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (!same_thread && !both_global) continue;
    violation(capture, cudaErrorStreamCaptureUnsupported, "unsafe call", call);
    found = true;
  }
  return found;
}

bool captured(const Event* event) { return event->capture != nullptr && under_way.count(event->capture) > 0; }

cudaError_t record(Event* event, Stream* stream) {
  Lock lock(mutex);
  event->recorded = true;
  event->capture = stream->capture;
  event->preceding = stream->capture == nullptr ? Preceding() : stream->preceding;
  return cudaSuccess;
}

cudaError_t wait(Stream* stream, Event* event) {
  Lock lock(mutex);
  if (!event->recorded) return cudaSuccess;
  if (stream->capture == nullptr) {
    if (!captured(event)) return cudaSuccess;
    if (stream == &legacy_stream) {
      return violation(event->capture, cudaErrorStreamCaptureImplicit, "legacy stream",
                       "it waits for a captured event");
    }
    // The wait makes the stream a part of the capture.
    stream->capture = event->capture;
    stream->capture->members.insert(stream);
    stream->preceding = event->preceding;
    stream->nodes = 0;
    return cudaSuccess;
  }
  if (!captured(event)) {
    return violation(stream->capture, cudaErrorStreamCaptureIsolation, "isolation",
                     title(stream) + " waits for an event of uncaptured work");
  }
  if (event->capture != stream->capture) {
    return violation(stream->capture, cudaErrorStreamCaptureMerge, "merge",
                     title(stream) + " waits for an event of another capture");
  }
  for (auto [other, nodes] : event->preceding) {
    size_t& known = stream->preceding[other];
    if (known < nodes) known = nodes;
  }
  return cudaSuccess;
}

cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  stream->capture = new Capture{stream, mode, std::this_thread::get_id(), ++captures_made};
  stream->capture->members.insert(stream);
  stream->nodes = 0;
  stream->preceding.clear();
  under_way.insert(stream->capture);
  return cudaSuccess;
}

cudaError_t end_capture(Stream* stream, Capture** graph) {
  Lock lock(mutex);
  *graph = nullptr;
  Capture* capture = stream->capture;
  if (capture == nullptr) return failed(cudaErrorIllegalState);
  under_way.erase(capture);
  bool joined = true;
  std::string nodes;
  for (Stream* member : capture->members) {
    size_t missing = member->nodes - stream->preceding[member];
    if (missing > 0) {
      joined = false;
      violation(capture, cudaErrorStreamCaptureUnjoined, "unjoined",
                std::to_string(missing) + " of " + std::to_string(member->nodes) + " nodes of " + title(member));
    }
    nodes += "\t" + std::to_string(member->nodes);
    member->capture = nullptr;
  }
  captures.push_back(nodes);
  if (!joined) return failed(cudaErrorStreamCaptureUnjoined);
  if (!capture->valid) return failed(cudaErrorStreamCaptureInvalidated);
  *graph = capture;
  return cudaSuccess;
}

}  // namespace pretend

// The interface for test programs (device.py).

EXPORT void pretend_set_phase(const char* name) {
  pretend::Lock lock(pretend::mutex);
  pretend::phase = name;
}

// The number of nodes of a stream's capture that need not precede the next node of that stream.
EXPORT size_t pretend_unordered_nodes(cudaStream_t handle) {
  pretend::Lock lock(pretend::mutex);
  pretend::Stream* stream = pretend::stream_of(handle);
  size_t count = 0;
  if (stream->capture == nullptr) return count;
  for (pretend::Stream* member : stream->capture->members) count += member->nodes - stream->preceding[member];
  return count;
}

EXPORT void pretend_reset() {
  pretend::Lock lock(pretend::mutex);
  pretend::work.clear();
  pretend::synchronizations.clear();
  pretend::violations.clear();
  pretend::captures.clear();
}

// The record as lines of fields separated by tabs; valid until the next call.
EXPORT const char* pretend_report() {
  pretend::Lock lock(pretend::mutex);
  static std::string text;
  text.clear();
  for (const auto& [key, count] : pretend::work) {
    const auto& [phase, captured, name] = key;
    text += "work\t" + phase + "\t" + (captured ? "captured" : "eager") + "\t" + std::to_string(count) + "\t" +
            pretend::demangled(name) + "\n";
  }
  for (const auto& [key, count] : pretend::synchronizations) {
    text += "synchronization\t" + key.first + "\t" + key.second + "\t" + std::to_string(count) + "\n";
  }
  for (const std::string& each : pretend::violations) text += "violation\t" + each + "\n";
  for (const std::string& each : pretend::captures) text += "capture" + each + "\n";
  return text.c_str();
}
