// Shared by the forward and the backward pass: the values of all nodes in one chunk of a row.
//
// A row is processed in chunks of columns, so the values of all nodes stay in the cache. Unused lanes after the last
// column contain -max, whose exponential is 0.
#pragma once

#include "convert.hpp"

namespace fastokd {
namespace FASTOKD_ISA {

// Allocates aligned pieces of the scratch memory; without memory it only counts bytes.
struct Arena {
  char* base;
  size_t used;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// Vectors per loop iteration, to hide latencies; fewer on machines with 16 registers.
constexpr int kUnroll = FASTOKD_VECTOR_BYTES == 64 ? 4 : 2;

// Calls body(Count<k>, i) for k vectors from column i on, until `count` columns are covered.
template <class Real, class Body>
FASTOKD_INLINE void for_vectors(int64_t count, Body body) {
  constexpr int width = Lanes<Real>::width;
  int64_t i = 0;
  for (; i + kUnroll * width <= count; i += kUnroll * width) body(Count<kUnroll>{}, i);
  for (; i < count; i += width) body(Count<1>{}, i);
}

// Stands for -inf in logits, and the value above which a term is infinite; as in fastokd/ops/reference.py.
constexpr double kMasked = -1e37, kMaskedLoss = 1e30;

template <class Real>
struct Rows {
  using Lane = Lanes<Real>;
  using Vec = typename Lane::Vec;
  using Int = typename Lane::Int;
  static constexpr int width = Lane::width;
  static constexpr int64_t kChunk = 4096 / sizeof(Real);  // measured: 2 KB and 1 KB are slower
  static constexpr double kLog2E = 1.44269504088896341;
  static constexpr Real kFloor = static_cast<Real>(1e-30);  // PROBABILITY_FLOOR of the reference

  const Call& call;
  const Program& program;
  const fastokd_tensor& target;
  const bool soft;
  int64_t chunk;      // columns per chunk
  int64_t num_chunks;
  Real* values;       // [N, chunk]; logarithms for rows of probabilities
  Real* probs;        // [N, chunk], rows of probabilities only
  Real* alive;        // [N, chunk], probability mixtures only: 0 where the floor removes the gradient
  Real* soft_target;  // [chunk]
  Real* weights;
  Real* maxima;       // per node
  Real* label_logit;  // per node
  int* chosen;        // per node
  Real* sums;         // per softmax
  Real* logs;
  int64_t row = 0;
  int64_t label = -1;
  Real mass = 1;
  // The current chunk: its first column, its number of columns, and the same with unused lanes.
  int64_t start = 0;
  int64_t count = 0;
  int64_t padded = 0;

  // With `other`, the chunk's values are in its memory.
  Rows(const Call& c, Arena& arena, const Rows* other = nullptr)
      : call(c),
        program(*c.program),
        target(c.tensors[program.num_logits + program.num_sources + program.num_externals]),
        soft(target.dtype != FASTOKD_INT64) {
    const int64_t whole = round_up(call.classes);
    chunk = whole < kChunk ? whole : kChunk;
    num_chunks = (call.classes + chunk - 1) / chunk;
    values = other ? other->values : arena.take<Real>(program.num_nodes * chunk);
    soft_target = other ? other->soft_target : arena.take<Real>(chunk);
    weights = arena.take<Real>(program.num_weights);
    maxima = arena.take<Real>(program.num_nodes);
    label_logit = arena.take<Real>(program.num_nodes);
    chosen = arena.take<int>(program.num_nodes);
    sums = arena.take<Real>(round_up(program.num_softmaxes));
    logs = arena.take<Real>(round_up(program.num_softmaxes));
    probs = other ? other->probs : arena.take<Real>(program.num_nodes * chunk);
    alive = other ? other->alive : arena.take<Real>(program.num_nodes * chunk);
    if (arena.base)
      for (int s = 0; s < round_up(program.num_softmaxes); ++s) sums[s] = 1;  // the unused lanes of take_logs
  }

  static int64_t round_up(int64_t n) { return (n + width - 1) / width * width; }

  Real* value(int node) const { return values + node * chunk; }
  Real* prob(int node) const { return probs + node * chunk; }
  const fastokd_tensor& weight(int source) const { return call.tensors[program.num_logits + source]; }

  // The weight of a term in this row.
  Real term_weight(int term) const {
    const fastokd_tensor& all = call.term_weights;
    return static_cast<const Real*>(all.data)[row * all.row_stride + term * all.column_stride];
  }

  void fill_unused(Real* to, Real with) const {
    for (int64_t i = count; i < padded; ++i) to[i] = with;
  }

  // The vector with its unused lanes set to 0.
  Vec only_used(Vec v, int64_t i) const {
    if (i + width <= count) return v;
    const Int used = indices(Real{}) < Int{} + static_cast<decltype(Int{}[0] + 0)>(count - i);
    return used ? v : Vec{};
  }

  void begin_row(int64_t b) {
    row = b;
    label = -1;
    mass = 1;
    if (!soft) {
      label = static_cast<const int64_t*>(target.data)[b * target.row_stride];
      if (label < 0 || label >= call.classes) {
        label = -1;
        mass = static_cast<Real>(__builtin_nan(""));
      }
    }
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      if (node.kind != kMixture && node.kind != kProbabilityMixture && node.kind != kNonTarget) continue;
      if (node.source >= 0)
        load_row(weight(node.source), b, 0, node.num_inputs, weights + node.first_weight);
      else
        for (int k = 0; k < node.num_inputs; ++k) weights[node.first_weight + k] = static_cast<Real>(node.constants[k]);
    }
  }

  void begin_chunk(int64_t t) {
    start = t * chunk;
    count = call.classes - start < chunk ? call.classes - start : chunk;
    padded = round_up(count);
  }

  void load_target() {
    load_row(target, row, start, count, soft_target);
    fill_unused(soft_target, 0);
  }

  // Computes the values in the current chunk of the nodes that are read in one of `passes` and in none of `done`.
  void evaluate(unsigned passes, unsigned done) {
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      if (!(node.read_in & passes) || (node.read_in & done)) continue;
      switch (node.kind) {
        case kLogits:
          load_row(call.tensors[n], row, start, count, value(n));
          // A class at -inf in two rows: their difference must be 0, not NaN.
          for (int64_t i = 0; i < padded; i += width) {
            const Vec v = load(value(n) + i);
            store(value(n) + i, v < Vec{} - Lane::max ? Vec{} + static_cast<Real>(kMasked) : v);
          }
          fill_unused(value(n), -Lane::max);
          break;
        case kExternal: external(n); break;
        case kMixture: mixture(n); break;
        case kProbabilityMixture: probability_mixture(n); break;
        case kMinimum: minimum(n); break;
        case kNonTarget:
          memcpy(value(n), value(node.inputs[0]), padded * sizeof(Real));
          if (label >= start && label < start + count) value(n)[label - start] = static_cast<Real>(kMasked);
          break;
        default: memcpy(value(n), value(node.inputs[chosen[n]]), padded * sizeof(Real));
      }
    }
  }

  void external(int n) {
    load_row(call.tensors[program.num_sources + n], row, start, count, prob(n));
    fill_unused(prob(n), 0);
    for (int64_t i = 0; i < padded; i += width) {
      const Vec p = load(prob(n) + i);
      store(value(n) + i, vlog(p < kFloor ? Vec{} + kFloor : p));
    }
  }

  void mixture(int n) {
    const Node& node = program.nodes[n];
    const Real* mixing = weights + node.first_weight;
    Real* to = value(n);
    for_vectors<Real>(padded, [&](auto k, int64_t i) __attribute__((always_inline)) {
      constexpr int unroll = decltype(k)::value;
      Vec total[unroll] = {};
      for (int j = 0; j < node.num_inputs; ++j) {
        const Real* from = value(node.inputs[j]) + i;
        for (int u = 0; u < unroll; ++u) total[u] += mixing[j] * load(from + u * width);
      }
      for (int u = 0; u < unroll; ++u) store(to + i + u * width, total[u]);
    });
    fill_unused(to, -Lane::max);
  }

  // log p_T of an input of a probability mixture; for an external row its logarithm.
  Vec log_input(const Node& node, int k, int64_t i) const {
    const int input = node.inputs[k];
    const Vec v = load(value(input) + i);
    if (program.nodes[input].kind == kExternal) return v;
    return (v - maxima[input]) / static_cast<Real>(node.temperature) - logs[node.input_softmaxes[k]];
  }

  void probability_mixture(int n) {
    const Node& node = program.nodes[n];
    const Real* mixing = weights + node.first_weight;
    for (int64_t i = 0; i < padded; i += width) {
      // Relative to the largest log p_k, so the result is finite even if every p_k underflows.
      Vec peak = log_input(node, 0, i);
      for (int k = 1; k < node.num_inputs; ++k) {
        const Vec other = log_input(node, k, i);
        peak = other > peak ? other : peak;
      }
      Vec total{};
      for (int k = 0; k < node.num_inputs; ++k) total += mixing[k] * vexp(log_input(node, k, i) - peak);
      const Vec one = Vec{} + 1;
      store(alive + n * chunk + i, total < kFloor ? Vec{} : one);
      const Vec log_p = peak + vlog(total < kFloor ? Vec{} + kFloor : total);
      store(value(n) + i, log_p);
      store(prob(n) + i, vexp(log_p));
    }
  }

  // d log h / d log p_k for input k of probability mixture `n`, without its weight.
  Vec share(int n, int k, int64_t i) const {
    return vexp(log_input(program.nodes[n], k, i) - load(value(n) + i)) * load(alive + n * chunk + i);
  }

  // log p of a row of logits.
  Vec log_softmax(int node, int softmax, int64_t i) const {
    return (load(value(node) + i) - maxima[node]) / static_cast<Real>(program.softmaxes[softmax].temperature) - logs[softmax];
  }

  void take_logs() {
    for (int s = 0; s < program.num_softmaxes; s += width) store(logs + s, vlog(load(sums + s)));
  }

  void minimum(int n) {
    const Node& node = program.nodes[n];
    for (int64_t i = 0; i < padded; i += width) {
      Vec least = load(value(node.inputs[0]) + i) - label_logit[node.inputs[0]];
      for (int k = 1; k < node.num_inputs; ++k) {
        const Vec other = load(value(node.inputs[k]) + i) - label_logit[node.inputs[k]];
        least = other < least ? other : least;
      }
      store(value(n) + i, least);
    }
    fill_unused(value(n), -Lane::max);
  }
};

// The columns of a normalized edge.
template <class Real>
struct NormalizedEdge {
  using Vec = typename Lanes<Real>::Vec;
  struct Column {
    Vec log_p, p, log_q, q, with_eps, log_with_eps;  // `with_eps` is p + eps
    Vec of_teacher, of_student;                      // the two parts of a Jensen-Shannon divergence
  };
  const Rows<Real>& rows;
  const Term& term;
  const int teacher_softmax;
  const int student_softmax;
  const Real eps;

  NormalizedEdge(const Rows<Real>& r, const Term& t)
      : rows(r),
        term(t),
        teacher_softmax(t.direction == kStudentFirst ? t.second_softmax : t.first_softmax),
        student_softmax(t.direction == kStudentFirst ? t.first_softmax : t.second_softmax),
        eps(t.eps_mode == kEpsExact ? static_cast<Real>(t.eps) : 0) {}

  Column at(int64_t i) const {
    Column c;
    if (teacher_softmax >= 0) {
      c.log_p = rows.log_softmax(term.teacher, teacher_softmax, i);
      c.p = vexp(c.log_p);
    } else {
      c.log_p = load(rows.value(term.teacher) + i);
      c.p = load(rows.prob(term.teacher) + i);
    }
    c.log_with_eps = term.eps_mode == kEpsExact ? vlog(c.p + eps) : c.log_p;
    c.log_q = rows.log_softmax(term.student, student_softmax, i);
    // A class that both rows mask: it has no share in the value, and eps is for those that exist.
    const auto absent = (c.p <= Rows<Real>::kFloor) & (c.log_q < Vec{} - static_cast<Real>(kMaskedLoss));
    c.with_eps = absent ? Vec{} : c.p + eps;
    c.p = absent ? Vec{} : c.p;
    c.q = vexp(c.log_q);
    if (term.direction == kJensenShannon) {
      const Real beta = static_cast<Real>(term.beta), rest = static_cast<Real>(1 - term.beta);
      const Vec m = beta * c.p + rest * c.q;
      const Vec log_m = vlog(m < Rows<Real>::kFloor ? Vec{} + Rows<Real>::kFloor : m);
      c.of_teacher = beta * c.p * (c.log_p - log_m);
      c.of_student = rest * c.q * (c.log_q - log_m);
    }
    return c;
  }

  // d term / d log p for a teacher that is a probability mixture.
  Vec teacher_slope(const Column& c) const {
    if (term.direction == kJensenShannon) return c.of_teacher;  // the parts through log m add up to 0
    return term.direction == kStudentFirst ? -c.q : c.p * (c.log_with_eps - c.log_q + 1);
  }
};

}  // namespace FASTOKD_ISA
}  // namespace fastokd
