// The forward pass of a range of rows.
//
// One pass over the columns takes all softmax sums of a row and the moments of its KL edges. Sums are relative to the
// largest value so far, and are rescaled if a later chunk contains a larger one.
#pragma once

#include "rows.hpp"

namespace fastokd {
namespace FASTOKD_ISA {

template <class Real>
struct Forward : Rows<Real> {
  using Base = Rows<Real>;
  using typename Base::Lane;
  using typename Base::Vec;
  using Base::call, Base::chosen, Base::count, Base::label, Base::label_logit, Base::logs, Base::mass,
      Base::maxima, Base::num_chunks, Base::padded, Base::program, Base::row, Base::soft, Base::soft_target, Base::start,
      Base::sums, Base::value, Base::width;

  // A KL edge whose moment is summed together with the exponentials of its first node.
  struct Edge {
    const Real* second;
    Real shift;
    Vec* moment;
  };

  Vec* sum_lanes;      // per softmax
  Vec* moment_lanes;   // per term: the moment, or the value of a normalized edge
  Vec* inner_lanes;    // per term: the inner sum of a normalized edge
  Vec* mixture_lanes;  // sums for the inputs of probability mixtures
  Vec* product_lanes;  // per node: sum of target times (value - maximum)
  Vec mass_lanes;
  Real* shifted_sums;  // per node: the sum of its values minus its maximum
  Real* summed;        // per node: the number of columns in that sum
  Real* products;      // per node
  Real* losses;        // per node: the cross-entropy
  Real* deltas;        // per node: increase of the maximum
  Real* rescales;      // per softmax
  Real* values_of_terms;
  Real* inner;         // per term
  Real* of_teacher;    // per term: the teacher's counterpart of `inner`
  Edge* edges;
  Real* exponentials = nullptr;  // [S, chunk], of the current chunk, where the backward pass uses them; or null

  Forward(const Call& c, Arena& arena) : Base(c, arena) {
    sum_lanes = arena.take<Vec>(program.num_softmaxes);
    moment_lanes = arena.take<Vec>(program.num_terms);
    inner_lanes = arena.take<Vec>(program.num_terms);
    mixture_lanes = arena.take<Vec>(program.num_mixture_sums);
    product_lanes = arena.take<Vec>(program.num_nodes);
    shifted_sums = arena.take<Real>(program.num_nodes);
    summed = arena.take<Real>(program.num_nodes);
    products = arena.take<Real>(program.num_nodes);
    losses = arena.take<Real>(program.num_nodes);
    deltas = arena.take<Real>(program.num_nodes);
    rescales = arena.take<Real>(Base::round_up(program.num_softmaxes));
    values_of_terms = arena.take<Real>(program.num_terms);
    inner = arena.take<Real>(program.num_terms);
    of_teacher = arena.take<Real>(program.num_terms);
    edges = arena.take<Edge>(program.num_terms);
  }

  static Real real(double x) { return static_cast<Real>(x); }

  bool summed_in(const Softmax& softmax, int pass) const { return softmax.base < 0 && (softmax.passes >> pass & 1u); }

  void run(int64_t b) {
    Base::begin_row(b);
    for (int pass = 0; pass < program.num_passes; ++pass) {
      clear(pass);
      for (int64_t t = 0; t < num_chunks; ++t) {
        Base::begin_chunk(t);
        if (pass == 0 && soft) Base::load_target();
        // If a row is a single chunk, the values of earlier passes are still there.
        Base::evaluate(1u << pass, num_chunks == 1 ? (1u << pass) - 1 : 0);
        raise_maxima(pass, t == 0);
        if (pass == 0) multiply_target();
        for (int s = 0; s < program.num_softmaxes; ++s)
          if (summed_in(program.softmaxes[s], pass)) sum_softmax(s, pass);
        for (int i = 0; i < program.num_terms; ++i) {
          const Term& term = program.terms[i];
          if (term.kind == kKL && !term.moment && term.pass == pass) normalized_edge(i);
          if (term.kind >= kSquaredError && pass == 0) error(i);
        }
      }
      finish(pass);
    }
    write();
  }

  void clear(int pass) {
    for (int s = 0; s < program.num_softmaxes; ++s) sum_lanes[s] = Vec{};
    for (int i = 0; i < program.num_terms; ++i)
      if (program.terms[i].pass == pass) moment_lanes[i] = inner_lanes[i] = Vec{};
    if (pass != 0) return;
    for (int i = 0; i < program.num_mixture_sums; ++i) mixture_lanes[i] = Vec{};
    for (int n = 0; n < program.num_nodes; ++n) {
      product_lanes[n] = Vec{};
      shifted_sums[n] = summed[n] = 0;
    }
    mass_lanes = Vec{};
  }

  Real row_maximum(const Real* v) const {
    Vec largest[kUnroll];
    for (int u = 0; u < kUnroll; ++u) largest[u] = load(v);
    for_vectors<Real>(padded, [&](auto k, int64_t i) __attribute__((always_inline)) {
      for (int u = 0; u < decltype(k)::value; ++u) largest[u] = vmax(load(v + i + u * width), largest[u]);
    });
    for (int u = 1; u < kUnroll; ++u) largest[0] = vmax(largest[u], largest[0]);
    return maximum(largest[0]);
  }

  // Updates the maxima, and rescales all sums to them.
  void raise_maxima(int pass, bool first_chunk) {
    bool raised = false;
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      deltas[n] = 0;
      if (node.max_stat < 0 || node.sum_pass != pass) continue;
      // Above masked classes, so that a chunk of these alone has sums of 0.
      const Real lowest = -static_cast<Real>(kMaskedLoss), largest = row_maximum(value(n));
      const Real here = largest < lowest && node.kind != kNonTarget ? lowest : largest;
      if (first_chunk) {
        maxima[n] = here;
      } else if (here > maxima[n]) {
        deltas[n] = here - maxima[n];
        maxima[n] = here;
        raised = true;
      }
      if (node.wants_sum) {
        shifted_sums[n] -= deltas[n] * summed[n];
        add_shifted(n);
      }
    }
    if (!raised) return;
    for (int s = 0; s < program.num_softmaxes; ++s)
      rescales[s] = -deltas[program.softmaxes[s].node] / real(program.softmaxes[s].temperature);
    for (int s = 0; s < program.num_softmaxes; s += width) store(rescales + s, vexp(load(rescales + s)));
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      if (!term.moment || term.pass != pass) continue;
      const Real apart = deltas[term.first] - deltas[term.second];
      moment_lanes[i] = (moment_lanes[i] - sum_lanes[term.first_softmax] * apart) * rescales[term.first_softmax];
    }
    for (int s = 0; s < program.num_softmaxes; ++s) sum_lanes[s] *= rescales[s];
    if (pass == 0 && soft)
      for (int n = 0; n < program.num_nodes; ++n) product_lanes[n] -= mass_lanes * deltas[n];
  }

  // Without label smoothing, these sums serve the first-order eps, which is for the classes that exist.
  void add_shifted(int n) {
    const Vec least = Vec{} - (program.label_smoothing != 0 ? Lane::max : static_cast<Real>(kMaskedLoss));
    const Real maximum = maxima[n];
    Vec total{}, number{};
    for (int64_t i = 0; i < padded; i += width) {
      const Vec v = load(value(n) + i);
      const auto exists = v > least;
      total += Base::only_used(exists ? v - maximum : Vec{}, i);
      number += Base::only_used(exists ? Vec{} + 1 : Vec{}, i);
    }
    shifted_sums[n] += sum(total);
    summed[n] += sum(number);
  }

  void multiply_target() {
    if (soft)
      for (int64_t i = 0; i < padded; i += width) mass_lanes += load(soft_target + i);
    for (int n = 0; n < program.num_nodes; ++n) {
      if (!program.nodes[n].wants_target) continue;
      const Real* v = value(n);
      if (soft) {
        // Unused lanes: 0 times a finite number.
        for (int64_t i = 0; i < padded; i += width)
          product_lanes[n] += load(soft_target + i) * Base::only_used(load(v + i) - maxima[n], i);
      } else if (label >= start && label < start + count) {
        label_logit[n] = v[label - start];
      }
    }
  }

  void sum_softmax(int s, int pass) {
    const Softmax& softmax = program.softmaxes[s];
    int num_edges = 0;
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      if (term.moment && term.pass == pass && term.first_softmax == s)
        edges[num_edges++] = {value(term.second), maxima[term.first] - maxima[term.second], moment_lanes + i};
    }
    with_power(softmax.power, [&](auto power_of) __attribute__((always_inline)) {
      sum_exponentials<decltype(power_of)::value>(s, edges, num_edges);
    });
  }

  template <int derived_power>
  void sum_exponentials(int s, const Edge* edge, int num_edges) {
    const Softmax& softmax = program.softmaxes[s];
    const Real* v = value(softmax.node);
    const Real largest = maxima[softmax.node], scale = real(Base::kLog2E / softmax.temperature);
    Real* to = exponentials ? exponentials + s * Base::chunk : nullptr;
    Vec total{}, derived_total{};
    for_vectors<Real>(padded, [&](auto k, int64_t i) __attribute__((always_inline)) {
      constexpr int unroll = decltype(k)::value;
      Vec x[unroll], e[unroll];
      for (int u = 0; u < unroll; ++u) {
        x[u] = load(v + i + u * width);
        e[u] = vexp_scaled(x[u] - largest, scale);
        total += e[u];
        if constexpr (derived_power > 0) derived_total += power<derived_power>(e[u]);
        if (to) store(to + i + u * width, e[u]);
      }
      for (int j = 0; j < num_edges; ++j) {
        const Real* second = edge[j].second + i;
        Vec part{};
        for (int u = 0; u < unroll; ++u) part += e[u] * ((x[u] - load(second + u * width)) - edge[j].shift);
        *edge[j].moment += part;
      }
    });
    sum_lanes[s] += total;
    if constexpr (derived_power > 0) sum_lanes[softmax.derived] += derived_total;
  }

  // An edge with a row of probabilities, or with an exact eps.
  void normalized_edge(int index) {
    const Term& term = program.terms[index];
    const NormalizedEdge<Real> edge(*this, term);
    Vec total{}, inner_total{};
    for (int64_t i = 0; i < padded; i += width) {
      const auto at = edge.at(i);
      if (term.direction == kJensenShannon) {
        total += Base::only_used(at.of_teacher, i);
        inner_total += Base::only_used(at.of_student, i);
      } else if (term.direction == kStudentFirst) {
        total += Base::only_used(at.q * (at.log_q - at.log_p), i);
      } else {
        total += Base::only_used(at.with_eps * (at.log_with_eps - at.log_q), i);
        const Vec more = edge.teacher_softmax >= 0 ? at.p * (at.log_with_eps - at.log_q) : at.with_eps;
        inner_total += Base::only_used(more, i);
      }
      if (term.mixture_stat >= 0) {
        const Vec slope = edge.teacher_slope(at);
        const Node& mixture = program.nodes[term.teacher];
        for (int k = 0; k < mixture.num_inputs; ++k)
          mixture_lanes[term.mixture_stat - program.mixture_stats + k] +=
              Base::only_used(Base::share(term.teacher, k, i) * slope, i);
      }
    }
    moment_lanes[index] += total;
    inner_lanes[index] += inner_total;
  }

  // A squared or absolute error between two rows of logits.
  void error(int index) {
    const Term& term = program.terms[index];
    const Real *student = value(term.student), *teacher = value(term.teacher);
    Vec total{};
    for (int64_t i = 0; i < padded; i += width) {
      const Vec gap = load(student + i) - load(teacher + i);
      const Vec part = term.kind == kSquaredError ? gap * gap : (gap < Vec{} ? -gap : gap);
      total += Base::only_used(part, i);
    }
    moment_lanes[index] += total;
  }

  // The logit of the label's probability: the label's logit minus the logarithm of the other classes' sum.
  double log_odds(const Term& term, int non_target, int softmax) const {
    const double gap = label_logit[program.nodes[non_target].inputs[0]] - maxima[non_target];
    return gap / term.temperature - logs[softmax];
  }

  static double softplus(double x) { return (x > 0 ? x : 0) + log_one_plus_exp(x > 0 ? -x : x); }

  // log(1 + exp(x)) for x <= 0; the vectors' functions, because the library's may need another instruction set.
  static double log_one_plus_exp(double x) {
    using Wide = typename Lanes<double>::Vec;
    const Wide e = vexp(Wide{} + x), sum = e + 1;
    // The first term of its series replaces what 1 + e rounds away.
    return (vlog(sum) + (e - (sum - 1)) / sum)[0];
  }

  void target_edge(int index) {
    const Term& term = program.terms[index];
    const double teacher = log_odds(term, term.teacher, term.first_softmax);
    const double student = log_odds(term, term.student, term.second_softmax);
    const double p = exp_of(teacher - softplus(teacher)), q = exp_of(student - softplus(student));
    const double rest = exp_of(-softplus(teacher)), gap = teacher - student;
    // Of two equal forms, the one whose terms are small where the probabilities are near 0 or 1.
    const double kl = teacher > 0 ? -rest * gap + softplus(-student) - softplus(-teacher)
                                  : p * gap - softplus(teacher) + softplus(student);
    values_of_terms[index] = real(kl * term.scale);
    inner[index] = real(q - p);
    of_teacher[index] = real(p * rest * gap);
  }

  static double exp_of(double x) { return vexp(typename Lanes<double>::Vec{} + x)[0]; }

  void finish(int pass) {
    for (int s = 0; s < program.num_softmaxes; ++s) {
      const Softmax& softmax = program.softmaxes[s];
      const unsigned passes = softmax.base < 0 ? softmax.passes : program.softmaxes[softmax.base].passes;
      if (passes >> pass & 1u) sums[s] = sum(sum_lanes[s]);
    }
    Base::take_logs();
    if (pass == 0) finish_targets();
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      if (term.kind == kCrossEntropy || term.pass != pass) continue;
      if (term.kind == kTargetKL) {
        target_edge(i);
        continue;
      }
      if (term.kind >= kSquaredError) {
        values_of_terms[i] = sum(moment_lanes[i]) * real(term.scale / static_cast<double>(call.classes));
        continue;
      }
      if (term.direction == kJensenShannon) {
        of_teacher[i] = sum(moment_lanes[i]);
        inner[i] = sum(inner_lanes[i]);
        values_of_terms[i] = (of_teacher[i] + inner[i]) * real(term.scale);
        continue;
      }
      if (!term.moment) {
        values_of_terms[i] = sum(moment_lanes[i]) * real(term.scale);
        inner[i] = term.direction == kStudentFirst ? sum(moment_lanes[i]) : sum(inner_lanes[i]);
        continue;
      }
      const Real inverse = 1 / real(term.temperature), classes = real(static_cast<double>(call.classes));
      const Real log_ratio = logs[term.first_softmax] - logs[term.second_softmax];
      inner[i] = sum(moment_lanes[i]) / sums[term.first_softmax];
      Real kl = inner[i] * inverse - log_ratio;
      if (term.eps_mode == kEpsFirstOrder) {
        const Real gap = shifted_sums[term.first] - shifted_sums[term.second];
        kl += real(term.eps) * (classes + gap * inverse - classes * log_ratio);
      }
      values_of_terms[i] = kl * real(term.scale);
    }
  }

  void finish_targets() {
    if (soft) mass = sum(mass_lanes);
    for (int n = 0; n < program.num_nodes; ++n) {
      if (!program.nodes[n].wants_target) continue;
      if (soft) {
        products[n] = sum(product_lanes[n]);
        label_logit[n] = products[n] + maxima[n] * mass;
      } else {
        if (label < 0) label_logit[n] = mass;  // NaN
        products[n] = label_logit[n] - maxima[n];
      }
      const int softmax = program.softmax_at_one[n];
      if (softmax >= 0) losses[n] = mass * logs[softmax] - products[n];
    }
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      if (node.kind != kSelection) continue;
      chosen[n] = 0;
      for (int k = 1; k < node.num_inputs; ++k) {
        const Real best = losses[node.inputs[chosen[n]]], loss = losses[node.inputs[k]];
        if (loss < best || (loss != loss && best == best)) chosen[n] = k;
      }
    }
  }

  void put(int stat, Real value) { static_cast<Real*>(call.stats)[stat * call.batch + row] = value; }

  void write() {
    const Real smoothing = real(program.label_smoothing), classes = real(static_cast<double>(call.classes));
    Real total = 0, output = 0;
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      if (term.inner_stat >= 0) put(term.inner_stat, inner[i]);
      if (term.teacher_stat >= 0) put(term.teacher_stat, of_teacher[i]);
      Real loss = values_of_terms[i];
      if (term.kind == kCrossEntropy) {
        const int n = term.student;
        loss = losses[n];
        if (smoothing != 0)
          loss = (1 - smoothing) * loss + smoothing * (logs[program.softmax_at_one[n]] - shifted_sums[n] / classes);
      }
      const bool first = i == 0 || program.terms[i - 1].output != term.output;
      output = first ? loss : output + loss;
      if (i + 1 < program.num_terms && program.terms[i + 1].output == term.output) continue;
      if (output > static_cast<Real>(kMaskedLoss)) output = static_cast<Real>(__builtin_inf());
      static_cast<Real*>(call.terms)[term.output * call.batch + row] = output;
      const Real weight = this->term_weight(term.output);
      if (weight != 0 || call.term_weights.row_stride == 0) total += weight * output;
    }
    static_cast<Real*>(call.rows)[row] = total;
    put(program.mass_stat, mass);
    for (int s = 0; s < program.num_softmaxes; ++s) put(program.softmaxes[s].stat, sums[s]);
    for (int i = 0; i < program.num_mixture_sums; ++i) put(program.mixture_stats + i, sum(mixture_lanes[i]));
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      if (node.max_stat >= 0) put(node.max_stat, maxima[n]);
      if (node.kind == kSelection) put(node.extra_stat, real(chosen[n]));
      if (node.kind == kMinimum)
        for (int k = 0; k < node.num_inputs; ++k) put(node.extra_stat + k, label_logit[node.inputs[k]]);
    }
  }
};

}  // namespace FASTOKD_ISA
}  // namespace fastokd
