// A small thread pool: created at first use, grown on demand, and created again in a forked child.
#pragma once

#include <stdint.h>

namespace fastokd {

using TaskFunction = void (*)(void* context, int worker, int64_t task);

// Calls function(context, worker, task) for every task, on up to `workers` threads of which the caller is number 0.
// Runs inline if another caller uses the pool or no thread can be started.
void parallel(int workers, int64_t tasks, TaskFunction function, void* context);

}  // namespace fastokd
