// The backward pass of a range of rows: one pass over the columns, from the statistics of the forward pass.
//
// A node's gradient is g = sum over its softmaxes of e * (a + sum_j coef_j * ((v - x_j) - shift_j)), where e are the
// softmax's exponentials, plus a linear combination of other rows: the exponentials of its teachers, the target, and the
// gradients of the mixtures that use it. Nodes are processed last to first, so the gradients of users are complete.
#pragma once

#include "rows.hpp"

namespace fastokd {
namespace FASTOKD_ISA {

template <class Real>
struct Backward : Rows<Real> {
  using Base = Rows<Real>;
  using typename Base::Lane;
  using typename Base::Vec;
  using Base::call, Base::chosen, Base::count, Base::weights, Base::label, Base::label_logit, Base::logs, Base::mass,
      Base::maxima, Base::num_chunks, Base::padded, Base::program, Base::row, Base::soft, Base::soft_target, Base::start,
      Base::sums, Base::chunk, Base::value, Base::width;

  struct Outgoing {  // an edge whose first node this is
    const Real* second;
    Real coef;
    Real shift;
  };
  struct Incoming {  // a row that enters the gradient linearly
    const Real* row;
    Real coef;
    Vec* product;  // sum of row * node, the gradient of the coefficient; or null
  };
  struct SoftmaxState {
    bool used;
    int first_outgoing, num_outgoing;
    Real coef;  // of the exponentials
    Real* e;
  };
  struct NodeState {
    bool learns;   // its gradient is needed, or passes through it
    bool visited;  // it learns, or a weight's gradient needs its values
    bool pushed;   // a normalized edge or a probability mixture adds to its gradient
    int first_incoming, num_incoming;
    Real constant;  // added to each column
    Real at_label;  // added to the label's column
    Real* g;
  };
  struct TermState {
    bool first, second;  // whether each node gets a gradient from it
    int outgoing, incoming;
    Real coef;
  };

  SoftmaxState* softmaxes;
  NodeState* nodes;
  TermState* terms;
  Outgoing* outgoing;
  Incoming* incoming;
  int* weight_of;        // per incoming: the mixture's weight, or -1
  Real* slopes;          // [N, chunk]: d loss / d log h of probability mixtures
  Vec* weight_products;  // per weight
  Real* weight_grads;    // per weight
  Real* source_grads;
  Real* e;  // [S, chunk]: the exponentials
  bool has_soft_row;

  // With `other`, the values of all nodes are in its memory.
  Backward(const Call& c, Arena& arena, const Base* other = nullptr) : Base(c, arena, other) {
    softmaxes = arena.take<SoftmaxState>(program.num_softmaxes);
    nodes = arena.take<NodeState>(program.num_nodes);
    terms = arena.take<TermState>(program.num_terms);
    outgoing = arena.take<Outgoing>(program.num_terms);
    incoming = arena.take<Incoming>(2 * program.num_terms + program.num_weights);
    weight_of = arena.take<int>(2 * program.num_terms + program.num_weights);
    weight_products = arena.take<Vec>(program.num_weights);
    weight_grads = arena.take<Real>(program.num_weights);
    source_grads = arena.take<Real>(program.num_weights);
    e = arena.take<Real>(program.num_softmaxes * chunk);
    Real* gradients = arena.take<Real>(program.num_nodes * chunk);
    slopes = arena.take<Real>(program.num_nodes * chunk);
    if (!arena.base) return;
    for (int s = 0; s < program.num_softmaxes; ++s) softmaxes[s] = {false, 0, 0, 0, e + s * chunk};
    for (int n = 0; n < program.num_nodes; ++n) nodes[n] = {false, false, false, 0, 0, 0, 0, gradients + n * chunk};
    find_learners();
    connect();
  }

  static Real real(double x) { return static_cast<Real>(x); }

  bool wants_weights(const Node& node) const {
    return node.source >= 0 && call.grads[program.num_logits + node.source];
  }

  void find_learners() {
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      NodeState& state = nodes[n];
      if (node.kind == kLogits) state.learns = call.grads[n] != nullptr;
      if (node.kind == kMixture || node.kind == kProbabilityMixture || node.kind == kNonTarget) {
        state.learns = wants_weights(node);
        for (int k = 0; k < node.num_inputs; ++k) state.learns |= nodes[node.inputs[k]].learns;
      }
      state.visited = state.learns;
      if (node.kind == kMixture && wants_weights(node))
        for (int k = 0; k < node.num_inputs; ++k) nodes[node.inputs[k]].visited = true;
    }
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      const bool student = nodes[term.student].learns;
      const bool teacher = term.kind != kCrossEntropy && !term.detach && nodes[term.teacher].learns;
      const bool swapped = term.direction == kStudentFirst;
      terms[i] = {swapped ? student : teacher, swapped ? teacher : student, -1, -1, 0};
    }
  }

  void use(int softmax) {
    softmaxes[softmax].used = true;
    if (program.softmaxes[softmax].base >= 0) softmaxes[program.softmaxes[softmax].base].used = true;
  }

  // Lists the rows that enter each gradient. Their coefficients depend on the batch row.
  void connect() {
    has_soft_row = false;
    int num_outgoing = 0, num_incoming = 0;
    for (int s = 0; s < program.num_softmaxes; ++s) {
      softmaxes[s].first_outgoing = num_outgoing;
      for (int i = 0; i < program.num_terms; ++i) {
        const Term& term = program.terms[i];
        if (!term.moment || term.first_softmax != s || !(terms[i].first || terms[i].second)) continue;
        use(s);
        if (!terms[i].first) continue;
        terms[i].outgoing = num_outgoing;
        outgoing[num_outgoing++] = {value(term.second), 0, 0};
      }
      softmaxes[s].num_outgoing = num_outgoing - softmaxes[s].first_outgoing;
    }
    for (int n = 0; n < program.num_nodes; ++n) {
      NodeState& node = nodes[n];
      node.first_incoming = num_incoming;
      for (int i = 0; i < program.num_terms; ++i) {
        const Term& term = program.terms[i];
        if (term.kind == kCrossEntropy && term.student == n && node.learns) {
          use(program.softmax_at_one[n]);
          if (!soft) continue;
          terms[i].incoming = num_incoming;
          add_incoming(num_incoming++, soft_target, -1, nullptr);
          has_soft_row = true;
        } else if (term.moment && term.second == n && terms[i].second) {
          use(term.second_softmax);
          terms[i].incoming = num_incoming;
          add_incoming(num_incoming++, softmaxes[term.first_softmax].e, -1, nullptr);
        } else if (term.kind == kTargetKL) {
          if (term.second == n && terms[i].second) use(term.second_softmax);
          if (term.first == n && terms[i].first) use(term.first_softmax);
        } else if (term.kind != kCrossEntropy && !term.moment) {
          if (term.student == n && node.learns) node.pushed = true;
          if (term.teacher == n && node.learns && !term.detach) node.pushed = true;
        }
      }
      for (int u = 0; u < program.num_nodes; ++u) {
        const Node& user = program.nodes[u];
        for (int k = 0; k < user.num_inputs; ++k) {
          if (user.inputs[k] != n || !nodes[u].learns) continue;
          if (user.kind == kProbabilityMixture && node.learns) node.pushed = true;
          if ((user.kind == kMixture || user.kind == kNonTarget) && node.visited)
            add_incoming(num_incoming++, nodes[u].g, user.first_weight + k,
                         wants_weights(user) ? weight_products + user.first_weight + k : nullptr);
        }
      }
      node.num_incoming = num_incoming - node.first_incoming;
    }
  }

  void add_incoming(int at, const Real* from, int weight, Vec* product) {
    incoming[at] = {from, 0, product};
    weight_of[at] = weight;
  }

  // `evaluated`: the forward pass left the row's values and exponentials in this pass's memory.
  void run(int64_t b, bool evaluated = false) {
    Base::begin_row(b);
    restore();
    set_coefficients();
    for (int64_t t = 0; t < num_chunks; ++t) {
      Base::begin_chunk(t);
      if (!evaluated) {
        if (has_soft_row) Base::load_target();
        Base::evaluate(~0u, 0);
        for (int s = 0; s < program.num_softmaxes; ++s)
          if (softmaxes[s].used && program.softmaxes[s].base < 0) exponentials(s);
      }
      push_normalized();
      for (int n = program.num_nodes - 1; n >= 0; --n)
        if (nodes[n].visited && has_gradient(program.nodes[n].kind)) gradient(n);
    }
    write_weights();
  }

  static bool has_gradient(int kind) { return kind == kLogits || kind == kMixture || kind == kNonTarget; }

  Real get(int stat) const { return static_cast<const Real*>(call.stats)[stat * call.batch + row]; }

  void restore() {
    mass = get(program.mass_stat);
    for (int s = 0; s < program.num_softmaxes; ++s) sums[s] = get(program.softmaxes[s].stat);
    if (program.has_normalized) Base::take_logs();
    for (int n = 0; n < program.num_nodes; ++n) {
      const Node& node = program.nodes[n];
      if (node.max_stat >= 0) maxima[n] = get(node.max_stat);
      if (node.kind == kSelection) chosen[n] = static_cast<int>(get(node.extra_stat));
      if (node.kind == kMinimum)
        for (int k = 0; k < node.num_inputs; ++k) label_logit[node.inputs[k]] = get(node.extra_stat + k);
    }
  }

  void set_coefficients() {
    const Real smoothing = real(program.label_smoothing), classes = real(static_cast<double>(call.classes));
    const Real upstream = static_cast<const Real*>(call.grad_rows.data)[row * call.grad_rows.row_stride];
    for (int s = 0; s < program.num_softmaxes; ++s) softmaxes[s].coef = 0;
    for (int n = 0; n < program.num_nodes; ++n) nodes[n].constant = nodes[n].at_label = 0;
    for (int i = 0; i < program.num_weights; ++i) {
      weight_products[i] = Vec{};
      weight_grads[i] = 0;
    }
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      TermState& state = terms[i];
      const Real weight = upstream * this->term_weight(term.output);
      if (term.kind == kCrossEntropy) {
        const int softmax = program.softmax_at_one[term.student];
        softmaxes[softmax].coef += weight * ((1 - smoothing) * mass + smoothing) / sums[softmax];
        nodes[term.student].constant -= weight * smoothing / classes;
        if (state.incoming >= 0) incoming[state.incoming].coef = weight * (smoothing - 1);
        else nodes[term.student].at_label += weight * (smoothing - 1);
        continue;
      }
      const Real inverse = 1 / real(term.temperature);
      state.coef = weight * real(term.scale) * inverse;
      if (term.kind == kTargetKL) {
        if (state.second) target_slope(term.second, term.second_softmax, state.coef * get(term.inner_stat));
        if (state.first) target_slope(term.first, term.first_softmax, state.coef * get(term.teacher_stat));
        continue;
      }
      if (term.kind >= kSquaredError) {
        state.coef /= classes;
        continue;
      }
      if (!term.moment) {
        mixture_grads(term, weight * real(term.scale));
        continue;
      }
      const Real first = state.coef / sums[term.first_softmax], second = state.coef / sums[term.second_softmax];
      const Real eps = term.eps_mode == kEpsFirstOrder ? real(term.eps) : 0;
      if (state.outgoing >= 0) {
        Outgoing& out = outgoing[state.outgoing];
        out.coef = first * inverse;
        out.shift = maxima[term.first] - maxima[term.second] + get(term.inner_stat);
        softmaxes[term.first_softmax].coef -= first * eps * classes;
        nodes[term.first].constant += state.coef * eps;
      }
      if (state.incoming >= 0) {
        incoming[state.incoming].coef = -first;
        softmaxes[term.second_softmax].coef += second * (1 + eps * classes);
        nodes[term.second].constant -= state.coef * eps;
      }
    }
    for (int n = 0; n < program.num_nodes; ++n)
      for (int j = nodes[n].first_incoming; j < nodes[n].first_incoming + nodes[n].num_incoming; ++j)
        if (weight_of[j] >= 0) incoming[j].coef = weights[weight_of[j]];
  }

  // The gradient of a target edge for the logit of the label's probability, times 1 / T.
  void target_slope(int non_target, int softmax, Real slope) {
    nodes[program.nodes[non_target].inputs[0]].at_label += slope;
    softmaxes[softmax].coef -= slope / sums[softmax];
  }

  // Gradients for a probability mixture's weights; the gradients of its inputs need the same sums.
  void mixture_grads(const Term& term, Real weight) {
    if (term.mixture_stat < 0) return;
    const Node& node = program.nodes[term.teacher];
    for (int k = 0; k < node.num_inputs; ++k) weight_grads[node.first_weight + k] += weight * get(term.mixture_stat + k);
  }

  void exponentials(int s) {
    const Softmax& softmax = program.softmaxes[s];
    const Real* v = value(softmax.node);
    Real* e = softmaxes[s].e;
    const Real largest = maxima[softmax.node], scale = real(Base::kLog2E / softmax.temperature);
    for_vectors<Real>(padded, [&](auto k, int64_t i) __attribute__((always_inline)) {
      for (int u = 0; u < decltype(k)::value; ++u)
        store(e + i + u * width, vexp_scaled(load(v + i + u * width) - largest, scale));
    });
  }

  void clear(Real* to) { memset(to, 0, padded * sizeof(Real)); }

  void push_normalized() {
    if (!program.has_normalized) return;
    for (int n = 0; n < program.num_nodes; ++n) {
      if (nodes[n].pushed) clear(nodes[n].g);
      if (program.nodes[n].kind == kProbabilityMixture && nodes[n].learns) clear(slopes + n * chunk);
    }
    for (int i = 0; i < program.num_terms; ++i) {
      const Term& term = program.terms[i];
      if (!(terms[i].first || terms[i].second)) continue;
      if (term.kind == kKL && !term.moment) normalized_edge(i);
      if (term.kind >= kSquaredError) error(i);
    }
    for (int n = 0; n < program.num_nodes; ++n)
      if (program.nodes[n].kind == kProbabilityMixture && nodes[n].learns) probability_mixture(n);
  }

  void error(int index) {
    const Term& term = program.terms[index];
    const Real *student = value(term.student), *teacher = value(term.teacher);
    const Real coef = term.kind == kSquaredError ? 2 * terms[index].coef : terms[index].coef;
    Real *g_student = nodes[term.student].g, *g_teacher = nodes[term.teacher].g;
    for (int64_t i = 0; i < padded; i += width) {
      const Vec gap = load(student + i) - load(teacher + i), one = Vec{} + 1;
      const Vec sign = gap > Vec{} ? one : (gap < Vec{} ? -one : Vec{});
      const Vec g = coef * (term.kind == kSquaredError ? gap : sign);
      if (terms[index].second) store(g_student + i, load(g_student + i) + g);
      if (terms[index].first) store(g_teacher + i, load(g_teacher + i) - g);
    }
  }

  void normalized_edge(int index) {
    const Term& term = program.terms[index];
    const NormalizedEdge<Real> edge(*this, term);
    const bool js = term.direction == kJensenShannon;
    const Real of_teacher = js ? get(term.teacher_stat) : 0;
    const bool swapped = term.direction == kStudentFirst;
    const bool student = swapped ? terms[index].first : terms[index].second;
    const bool teacher = swapped ? terms[index].second : terms[index].first;
    const Real coef = terms[index].coef, slope_coef = coef * real(term.temperature), inner = get(term.inner_stat);
    // The mass of the teacher's row, which may differ from 1 for external rows.
    const Real whole = edge.teacher_softmax >= 0 ? 1 + edge.eps * real(static_cast<double>(call.classes)) : inner;
    Real* g_student = nodes[term.student].g;
    Real* g_teacher = nodes[term.teacher].g;
    Real* slope = slopes + term.teacher * chunk;
    for (int64_t i = 0; i < padded; i += width) {
      const auto at = edge.at(i);
      if (student) {
        const Vec of_kl = swapped ? at.q * ((at.log_q - at.log_p) - inner) : at.q * whole - at.with_eps;
        const Vec g = js ? at.of_student - at.q * inner : of_kl;
        store(g_student + i, load(g_student + i) + coef * g);
      }
      if (!teacher) continue;
      if (edge.teacher_softmax >= 0 && js)
        store(g_teacher + i, load(g_teacher + i) + coef * (at.of_teacher - at.p * of_teacher));
      else if (edge.teacher_softmax >= 0)
        store(g_teacher + i, load(g_teacher + i) + coef * at.p * ((at.log_with_eps - at.log_q) - inner));
      else
        store(slope + i, load(slope + i) + slope_coef * edge.teacher_slope(at));
    }
  }

  void probability_mixture(int n) {
    const Node& node = program.nodes[n];
    const Real inverse = 1 / real(node.temperature);
    const Real* slope = slopes + n * chunk;
    for (int k = 0; k < node.num_inputs; ++k) {
      const int input = node.inputs[k];
      if (!nodes[input].learns) continue;
      const Real coef = weights[node.first_weight + k] * inverse, total = weight_grads[node.first_weight + k];
      Real* g = nodes[input].g;
      for (int64_t i = 0; i < padded; i += width) {
        const Vec p = vexp(Base::log_input(node, k, i));
        store(g + i, load(g + i) + coef * (Base::share(n, k, i) * load(slope + i) - p * total));
      }
    }
  }

  void gradient(int n) {
    const NodeState& node = nodes[n];
    const Incoming* in = incoming + node.first_incoming;
    const Real* v = value(n);
    const Real masked = static_cast<Real>(kMaskedLoss);
    Real* to = node.g;
    for_vectors<Real>(padded, [&](auto k, int64_t i) __attribute__((always_inline)) {
      constexpr int unroll = decltype(k)::value;
      Vec g[unroll], x[unroll];
      for (int u = 0; u < unroll; ++u) {
        x[u] = load(v + i + u * width);
        g[u] = node.pushed ? load(to + i + u * width) : Vec{};
        if (node.constant != 0) g[u] += x[u] > Vec{} - masked ? Vec{} + node.constant : Vec{};
      }
      if (node.learns) {
        for (int s = program.node_softmaxes[n]; s < program.node_softmaxes[n + 1]; ++s) {
          if (!softmaxes[s].used || program.softmaxes[s].base >= 0) continue;
          Vec e[unroll], sum[unroll];
          for (int u = 0; u < unroll; ++u) {
            e[u] = load(softmaxes[s].e + i + u * width);
            sum[u] = Vec{} + softmaxes[s].coef;
          }
          const Outgoing* out = outgoing + softmaxes[s].first_outgoing;
          for (int j = 0; j < softmaxes[s].num_outgoing; ++j)
            for (int u = 0; u < unroll; ++u)
              sum[u] += out[j].coef * ((x[u] - load(out[j].second + i + u * width)) - out[j].shift);
          for (int u = 0; u < unroll; ++u) g[u] += e[u] * sum[u];
          const Softmax& softmax = program.softmaxes[s];
          if (softmax.derived < 0 || !softmaxes[softmax.derived].used) continue;
          const Real derived_coef = softmaxes[softmax.derived].coef;
          with_power(softmax.power, [&](auto power_of) __attribute__((always_inline)) {
            constexpr int n = decltype(power_of)::value;
            if constexpr (n > 0)
              for (int u = 0; u < unroll; ++u) g[u] += derived_coef * power<n>(e[u]);
          });
        }
      }
      for (int j = 0; j < node.num_incoming; ++j) {
        const Real* from = in[j].row + i;
        Vec product{};
        for (int u = 0; u < unroll; ++u) {
          const Vec other = load(from + u * width);
          g[u] += in[j].coef * other;
          product += other * x[u];
        }
        if (in[j].product) *in[j].product += product;
      }
      for (int u = 0; u < unroll; ++u) store(to + i + u * width, g[u]);
    });
    if (label >= start && label < start + count) to[label - start] += node.at_label;
    Base::fill_unused(to, 0);
    if (program.nodes[n].kind == kLogits && node.learns)
      store_row(call.grads[n], call.tensors[n].dtype, row * call.classes + start, count, to);
  }

  void write_weights() {
    for (int source = 0; source < program.num_sources; ++source) {
      void* to = call.grads[program.num_logits + source];
      if (!to) continue;
      const int columns = program.widths[source];
      for (int k = 0; k < columns; ++k) source_grads[k] = 0;
      for (int n = 0; n < program.num_nodes; ++n) {
        const Node& node = program.nodes[n];
        if ((node.kind != kMixture && node.kind != kProbabilityMixture) || node.source != source) continue;
        for (int k = 0; k < columns; ++k) {
          const int weight = node.first_weight + k;
          source_grads[k] += node.kind == kMixture ? sum(weight_products[weight]) : weight_grads[weight];
        }
      }
      store_row(to, Base::weight(source).dtype, row * columns, columns, source_grads);
    }
  }
};

}  // namespace FASTOKD_ISA
}  // namespace fastokd
