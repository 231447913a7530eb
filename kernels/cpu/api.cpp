// The functions of fastokd.h: argument checks, the choice of the instruction set, and the split of rows over threads.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>

#include "plan.hpp"
#include "pool.hpp"

namespace fastokd {

#define FASTOKD_DECLARE(isa)      \
  namespace isa {                 \
  extern const Backend backend;   \
  }
FASTOKD_DECLARE(generic)
#ifdef FASTOKD_HAS_X86
FASTOKD_DECLARE(avx2)
FASTOKD_DECLARE(avx512)
#endif
#ifdef FASTOKD_HAS_NEON
FASTOKD_DECLARE(neon)
#endif

namespace {

// Best first. The generic one runs on every machine.
const Backend* usable(int index) {
  const Backend* all[4] = {};
  int count = 0;
#ifdef FASTOKD_HAS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all[count++] = &avx512::backend;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all[count++] = &avx2::backend;
#endif
#ifdef FASTOKD_HAS_NEON
  all[count++] = &neon::backend;  // part of every aarch64
#endif
  all[count++] = &generic::backend;
  return index >= 0 && index < count ? all[index] : nullptr;
}

const Backend* find_backend(const char* name) {
  if (!name) return usable(0);
  for (int i = 0; const Backend* backend = usable(i); ++i)
    if (!strcmp(backend->name, name)) return backend;
  return nullptr;
}

bool is_float(int32_t dtype) { return dtype >= FASTOKD_FLOAT32 && dtype <= FASTOKD_FLOAT16; }

bool fits(const Call& call) {
  const Program& program = *call.program;
  const int others = program.num_sources + program.num_externals;
  for (int i = 0; i <= program.num_logits + others; ++i) {
    const fastokd_tensor& tensor = call.tensors[i];
    const bool label = i == program.num_logits + others && tensor.dtype == FASTOKD_INT64;
    if (!label && !is_float(tensor.dtype)) return false;
    if (i < program.num_logits && tensor.dtype != call.tensors[0].dtype) return false;
    if (!tensor.data && call.batch > 0) return false;
  }
  return true;
}

constexpr int64_t kInlineElements = 1 << 16;  // nodes * rows * columns; below it, threads cost more than they save
constexpr int64_t kTaskElements = 1 << 14;

struct Work {
  const Call& call;
  RowsFunction function;
  char* scratch;
  size_t stride;
  int64_t rows;
};

void run_task(void* context, int worker, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const int64_t begin = task * work.rows;
  work.function(work.call, work.scratch + worker * work.stride, begin, std::min(begin + work.rows, work.call.batch));
}

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// Shared by the entry points; `kernel` is a member of Backend.
int32_t run(const fastokd_plan* plan, Call call, const RowKernel (Backend::*kernel)[2], int32_t num_threads) {
  const bool backward = kernel != &Backend::forward, forward = kernel != &Backend::backward;
  if (!plan || !call.tensors || call.batch < 0 || call.classes < 1) return FASTOKD_ARGUMENT;
  call.program = &plan->program;
  if (!fits(call)) return FASTOKD_ARGUMENT;
  const int real = call.tensors[0].dtype == FASTOKD_FLOAT64;
  const int32_t dtype = real ? FASTOKD_FLOAT64 : FASTOKD_FLOAT32;
  if (call.term_weights.dtype != dtype) return FASTOKD_ARGUMENT;
  if (backward && (!call.grads || call.grad_rows.dtype != dtype)) return FASTOKD_ARGUMENT;
  if (call.batch == 0) return FASTOKD_OK;
  if (!call.stats || !call.term_weights.data || (forward && (!call.rows || !call.terms))) return FASTOKD_ARGUMENT;
  if (backward && !call.grad_rows.data) return FASTOKD_ARGUMENT;
  const RowKernel& chosen = (plan->backend->*kernel)[real];
  const int64_t row = call.program->num_nodes * call.classes;
  int64_t threads = call.batch * row < kInlineElements ? 1 : std::max<int64_t>(1, num_threads);
  threads = std::min(threads, call.batch);
  const int64_t rows = std::min(std::max<int64_t>(1, kTaskElements / row), (call.batch + threads - 1) / threads);
  // Threads must not share a cache line or set.
  const size_t stride = (chosen.scratch(call) + 4095) / 4096 * 4096 + 64;
  std::unique_ptr<void, Free> memory(aligned_alloc(64, stride * threads));
  if (!memory) return FASTOKD_NO_MEMORY;
  Work work{call, chosen.rows, static_cast<char*>(memory.get()), stride, rows};
  parallel(static_cast<int>(threads), (call.batch + rows - 1) / rows, run_task, &work);
  return FASTOKD_OK;
}

}  // namespace
}  // namespace fastokd

using namespace fastokd;

int32_t fastokd_abi_version(void) { return FASTOKD_ABI_VERSION; }

const char* fastokd_status_message(int32_t status) {
  switch (status) {
    case FASTOKD_OK: return "no error";
    case FASTOKD_PLAN_VERSION: return "the plan was encoded by another version of fastokd";
    case FASTOKD_PLAN_LENGTH: return "the plan's arrays are cut short or too long";
    case FASTOKD_PLAN_COUNT: return "a count in the plan is out of range";
    case FASTOKD_PLAN_NODE: return "a node of the plan has an unknown kind, or inputs or weights that do not fit";
    case FASTOKD_PLAN_TERM: return "a term of the plan has an unknown kind, or nodes or flags that do not fit";
    case FASTOKD_PLAN_NUMBER: return "a temperature, weight, eps or label smoothing of the plan is out of range";
    case FASTOKD_ARGUMENT: return "a pointer is null, a size negative, or a dtype does not fit";
    case FASTOKD_NO_MEMORY: return "out of memory";
    case FASTOKD_UNKNOWN_ISA: return "this build does not have that instruction set, or this machine cannot run it";
    default: return "unknown status";
  }
}

const char* fastokd_isa(int32_t index) {
  const Backend* backend = usable(index);
  return backend ? backend->name : nullptr;
}

int32_t fastokd_plan_create(const int64_t* ints, int64_t num_ints, const double* floats, int64_t num_floats, const char* isa,
                            fastokd_plan** plan) {
  if (!plan) return FASTOKD_ARGUMENT;
  *plan = nullptr;
  if (!ints || !floats || num_ints < 0 || num_floats < 0) return FASTOKD_ARGUMENT;
  try {
    auto made = std::make_unique<fastokd_plan>();
    made->backend = find_backend(isa);
    if (!made->backend) return FASTOKD_UNKNOWN_ISA;
    const int32_t status = decode(ints, num_ints, floats, num_floats, *made);
    if (status == FASTOKD_OK) *plan = made.release();
    return status;
  } catch (const std::bad_alloc&) {
    return FASTOKD_NO_MEMORY;
  }
}

void fastokd_plan_destroy(fastokd_plan* plan) { delete plan; }

int64_t fastokd_plan_num_stats(const fastokd_plan* plan) { return plan ? plan->program.num_stats : 0; }

int32_t fastokd_forward(const fastokd_plan* plan, int64_t batch, int64_t classes, const fastokd_tensor* tensors,
                        const fastokd_tensor* term_weights, void* rows, void* terms, void* stats, int32_t num_threads) {
  if (!term_weights) return FASTOKD_ARGUMENT;
  const Call call{nullptr, batch, classes, tensors, *term_weights, rows, terms, stats, {}, nullptr};
  return run(plan, call, &Backend::forward, num_threads);
}

int32_t fastokd_backward(const fastokd_plan* plan, int64_t batch, int64_t classes, const fastokd_tensor* tensors,
                         const fastokd_tensor* term_weights, const void* stats, const fastokd_tensor* grad_rows,
                         void* const* grads, int32_t num_threads) {
  if (!term_weights || !grad_rows) return FASTOKD_ARGUMENT;
  const Call call{nullptr, batch, classes, tensors, *term_weights, nullptr, nullptr, const_cast<void*>(stats), *grad_rows, grads};
  return run(plan, call, &Backend::backward, num_threads);
}

int32_t fastokd_forward_backward(const fastokd_plan* plan, int64_t batch, int64_t classes, const fastokd_tensor* tensors,
                                 const fastokd_tensor* term_weights, void* rows, void* terms, void* stats,
                                 const fastokd_tensor* grad_rows, void* const* grads, int32_t num_threads) {
  if (!term_weights || !grad_rows) return FASTOKD_ARGUMENT;
  const Call call{nullptr, batch, classes, tensors, *term_weights, rows, terms, stats, *grad_rows, grads};
  return run(plan, call, &Backend::forward_backward, num_threads);
}

int32_t fastokd_math(const char* isa, int32_t function, int32_t dtype, const void* in, void* out, int64_t count) {
  const Backend* backend = find_backend(isa);
  if (!backend) return FASTOKD_UNKNOWN_ISA;
  if (!in || !out || count < 0 || function < 0 || function > 1 || dtype < 0 || dtype > FASTOKD_FLOAT64) return FASTOKD_ARGUMENT;
  backend->math[dtype](function, in, out, count);
  return FASTOKD_OK;
}
