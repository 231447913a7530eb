// A small pool of threads: made at first need, grown to what callers ask for, made anew in a forked child.
#pragma once

#include <stdint.h>

namespace fastokd {

using ChunkFunction = void (*)(void* context, int worker, int64_t chunk);

// Calls function(context, worker, chunk) for every chunk, on up to `workers` threads of which the caller is number 0.
// Runs inline if another caller has the pool, or no thread can be had.
void parallel(int workers, int64_t chunks, ChunkFunction function, void* context);

}  // namespace fastokd
