// The functions of one instruction set. Compiled once for each, with its flags.
#include "backward.hpp"
#include "forward.hpp"

namespace fastokd {
namespace FASTOKD_ISA {

// Forward and backward pass of a row while it is in the cache. A row of one chunk is evaluated once for both.
template <class Real>
struct ForwardBackward {
  Forward<Real> forward;
  Backward<Real> backward;
  ForwardBackward(const Call& call, Arena& arena)
      : forward(call, arena), backward(call, arena, forward.num_chunks == 1 ? &forward : nullptr) {
    if (forward.num_chunks == 1) forward.exponentials = backward.e;
  }
  void run(int64_t row) {
    forward.run(row);
    backward.run(row, forward.num_chunks == 1);
  }
};

template <class Rows>
static size_t scratch(const Call& call) {
  Arena arena{nullptr, 0};
  Rows rows(call, arena);
  return arena.used;
}

template <class Rows>
static void run(const Call& call, void* memory, int64_t begin, int64_t end) {
  Arena arena{static_cast<char*>(memory), 0};
  Rows rows(call, arena);
  for (int64_t row = begin; row < end; ++row) rows.run(row);
}

template <class Rows>
constexpr RowKernel kernel() {
  return {scratch<Rows>, run<Rows>};
}

template <class Real>
static void math(int function, const void* in, void* out, int64_t count) {
  constexpr int width = Lanes<Real>::width;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t here = count - i < width ? count - i : width;
    typename Lanes<Real>::Vec v = {};
    memcpy(&v, static_cast<const Real*>(in) + i, here * sizeof(Real));
    v = function == 0 ? vexp(v) : vlog(v);
    memcpy(static_cast<Real*>(out) + i, &v, here * sizeof(Real));
  }
}

#define FASTOKD_STRING_(x) #x
#define FASTOKD_STRING(x) FASTOKD_STRING_(x)
extern const Backend backend;
const Backend backend = {
    FASTOKD_STRING(FASTOKD_ISA),
    {kernel<Forward<float>>(), kernel<Forward<double>>()},
    {kernel<Backward<float>>(), kernel<Backward<double>>()},
    {kernel<ForwardBackward<float>>(), kernel<ForwardBackward<double>>()},
    {math<float>, math<double>},
};

}  // namespace FASTOKD_ISA
}  // namespace fastokd
