#include "plan.hpp"

#include <algorithm>
#include <cmath>

namespace fastokd {
namespace {

constexpr int64_t kPlanVersion = 2;     // PLAN_VERSION of fastokd/graph/plan.py
constexpr int64_t kMaxCount = 1 << 12;  // larger counts are invalid

constexpr int kWeightAlignment = 16;  // aligns each node's weights to a vector of any width

struct PlanError {
  int32_t status;
};

void require(bool condition, int32_t status) {
  if (!condition) throw PlanError{status};
}

template <class T>
struct Reader {
  const T* at;
  const T* end;
  T next() {
    require(at != end, FASTOKD_PLAN_LENGTH);
    return *at++;
  }
};

int count(Reader<int64_t>& ints) {
  const int64_t value = ints.next();
  require(value >= 0 && value <= kMaxCount, FASTOKD_PLAN_COUNT);
  return static_cast<int>(value);
}

int flag(Reader<int64_t>& ints, int64_t last, int32_t status) {
  const int64_t value = ints.next();
  require(value >= 0 && value <= last, status);
  return static_cast<int>(value);
}

double temperature(Reader<double>& floats) {
  const double value = floats.next();
  require(std::isfinite(value) && value > 0, FASTOKD_PLAN_NUMBER);
  return value;
}

bool is_logits(int kind) { return kind == kLogits || kind == kMixture || kind == kNonTarget; }
bool is_probability(int kind) { return kind == kExternal || kind == kProbabilityMixture; }

Node plain_node(int kind) {
  Node node{};
  node.kind = kind;
  node.source = node.max_stat = node.extra_stat = -1;
  node.temperature = 1;
  return node;
}

void read_node(Reader<int64_t>& ints, Reader<double>& floats, fastokd_plan& plan) {
  Node node = plain_node(flag(ints, kNonTarget, FASTOKD_PLAN_NODE));
  const int64_t source = ints.next();
  require(source >= -1 && source < static_cast<int64_t>(plan.widths.size()), FASTOKD_PLAN_NODE);
  node.source = static_cast<int>(source);
  node.num_inputs = count(ints);
  require(node.num_inputs > 0, FASTOKD_PLAN_NODE);
  std::vector<int> inputs;
  for (int k = 0; k < node.num_inputs; ++k) {
    inputs.push_back(flag(ints, static_cast<int64_t>(plan.nodes.size()) - 1, FASTOKD_PLAN_NODE));
    const int kind = plan.nodes[inputs.back()].kind;
    require(kind != kNonTarget, FASTOKD_PLAN_NODE);
    require(is_logits(kind) || (node.kind == kProbabilityMixture && kind == kExternal), FASTOKD_PLAN_NODE);
  }
  require(node.kind != kNonTarget || node.num_inputs == 1, FASTOKD_PLAN_NODE);
  node.temperature = temperature(floats);
  const bool weighted = node.kind == kMixture || node.kind == kProbabilityMixture;
  require(weighted || source < 0, FASTOKD_PLAN_NODE);
  std::vector<double> constants;
  if (weighted && source >= 0) require(plan.widths[source] == node.num_inputs, FASTOKD_PLAN_NODE);
  if (weighted && source < 0) {
    for (int k = 0; k < node.num_inputs; ++k) {
      constants.push_back(floats.next());
      require(std::isfinite(constants.back()), FASTOKD_PLAN_NUMBER);
      require(node.kind == kMixture || constants.back() >= 0, FASTOKD_PLAN_NUMBER);
    }
  }
  if (node.kind == kNonTarget) constants.push_back(1);  // it passes its gradient on like a mixture
  if (weighted || node.kind == kNonTarget) {
    node.first_weight = plan.program.num_weights;
    plan.program.num_weights += (node.num_inputs + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
  }
  node.sum_pass = node.kind == kMinimum || node.kind == kSelection ? 1 : 0;
  plan.nodes.push_back(node);
  plan.inputs.push_back(inputs);
  plan.constants.push_back(constants);
}

void read_term(Reader<int64_t>& ints, Reader<double>& floats, fastokd_plan& plan) {
  const int64_t last = static_cast<int64_t>(plan.nodes.size()) - 1;
  Term term{};
  term.kind = flag(ints, kAbsoluteError, FASTOKD_PLAN_TERM);
  term.student = flag(ints, last, FASTOKD_PLAN_TERM);
  require(is_logits(plan.nodes[term.student].kind), FASTOKD_PLAN_TERM);
  const int64_t teacher = ints.next();
  term.teacher = static_cast<int>(teacher);
  term.detach = flag(ints, 1, FASTOKD_PLAN_TERM);
  term.direction = flag(ints, kJensenShannon, FASTOKD_PLAN_TERM);
  term.eps_mode = flag(ints, kEpsExact, FASTOKD_PLAN_TERM);
  term.output = flag(ints, plan.program.num_outputs, FASTOKD_PLAN_TERM);
  require(term.output >= plan.program.num_outputs - 1, FASTOKD_PLAN_TERM);
  plan.program.num_outputs = term.output + 1;
  term.temperature = temperature(floats);
  term.scale = floats.next();
  term.eps = floats.next();
  term.beta = floats.next();
  require(std::isfinite(term.scale) && term.eps >= 0 && term.eps < 1, FASTOKD_PLAN_NUMBER);
  term.first = term.second = term.first_softmax = term.second_softmax = -1;
  term.inner_stat = term.teacher_stat = term.mixture_stat = -1;
  if (term.kind == kCrossEntropy) {
    require(teacher == -1, FASTOKD_PLAN_TERM);
  } else {
    require(teacher >= 0 && teacher <= last && teacher != term.student, FASTOKD_PLAN_TERM);
    const int kind = plan.nodes[teacher].kind;
    const bool probability = is_probability(kind);
    require(term.direction == kTeacherFirst || term.eps_mode == kEpsNone, FASTOKD_PLAN_TERM);
    require(!probability || term.eps_mode != kEpsFirstOrder, FASTOKD_PLAN_TERM);
    const bool non_target = kind == kNonTarget && plan.nodes[term.student].kind == kNonTarget;
    require(term.kind != kTargetKL || non_target, FASTOKD_PLAN_TERM);
    require(term.kind < kSquaredError || is_logits(kind), FASTOKD_PLAN_TERM);
    const bool js = term.direction == kJensenShannon;
    require(!js || (term.beta > 0 && term.beta < 1), FASTOKD_PLAN_NUMBER);
    term.moment = term.kind == kKL && !probability && term.eps_mode != kEpsExact && !js;
    const bool swapped = term.direction == kStudentFirst;
    term.first = swapped ? term.student : term.teacher;
    term.second = swapped ? term.teacher : term.student;
  }
  plan.terms.push_back(term);
}

void read(const int64_t* ints_begin, int64_t num_ints, const double* floats_begin, int64_t num_floats, fastokd_plan& plan) {
  Reader<int64_t> ints{ints_begin, ints_begin + num_ints};
  Reader<double> floats{floats_begin, floats_begin + num_floats};
  require(num_ints > 0 && ints.next() == kPlanVersion, FASTOKD_PLAN_VERSION);
  Program& program = plan.program;
  program.num_logits = count(ints);
  program.num_externals = count(ints);
  program.num_sources = count(ints);
  require(program.num_logits > 0, FASTOKD_PLAN_COUNT);
  for (int i = 0; i < program.num_sources; ++i) plan.widths.push_back(count(ints));
  program.label_smoothing = floats.next();
  require(program.label_smoothing >= 0 && program.label_smoothing < 1, FASTOKD_PLAN_NUMBER);
  for (int i = 0; i < program.num_logits + program.num_externals; ++i)
    plan.nodes.push_back(plain_node(i < program.num_logits ? kLogits : kExternal));
  plan.inputs.resize(plan.nodes.size());
  plan.constants.resize(plan.nodes.size());
  const int derived = count(ints);
  for (int i = 0; i < derived; ++i) read_node(ints, floats, plan);
  const int terms = count(ints);
  require(terms > 0, FASTOKD_PLAN_COUNT);
  for (int i = 0; i < terms; ++i) read_term(ints, floats, plan);
  require(ints.at == ints.end && floats.at == floats.end, FASTOKD_PLAN_LENGTH);
}

// The softmaxes of a plan, ordered by node, then by falling temperature.
struct SoftmaxTable {
  struct Key {
    int node;
    double temperature;
  };
  std::vector<Key> keys;
  void add(int node, double temperature) {
    if (find(node, temperature) == keys.size()) keys.push_back({node, temperature});
  }
  size_t find(int node, double temperature) const {
    return std::find_if(keys.begin(), keys.end(), [&](const Key& key) {
             return key.node == node && key.temperature == temperature;
           }) - keys.begin();
  }
  void sort() {
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
      return a.node != b.node ? a.node < b.node : a.temperature > b.temperature;
    });
  }
};

void find_softmaxes(fastokd_plan& plan) {
  SoftmaxTable table;
  for (const Term& term : plan.terms) {
    if (term.kind == kCrossEntropy) table.add(term.student, 1);
    else if (term.kind == kKL || term.kind == kTargetKL)
      for (const int node : {term.first, term.second})
        if (!is_probability(plan.nodes[node].kind)) table.add(node, term.temperature);
  }
  for (size_t n = 0; n < plan.nodes.size(); ++n)
    for (const int input : plan.inputs[n]) {
      if (plan.nodes[n].kind == kSelection) table.add(input, 1);
      if (plan.nodes[n].kind == kProbabilityMixture && plan.nodes[input].kind != kExternal)
        table.add(input, plan.nodes[n].temperature);
    }
  table.sort();
  for (const auto& key : table.keys) plan.softmaxes.push_back({key.node, key.temperature, -1, -1, 0, 0, -1});
  const auto softmax_of = [&](int node, double temperature) { return static_cast<int>(table.find(node, temperature)); };
  std::vector<bool> has_edges(plan.softmaxes.size());
  for (Term& term : plan.terms) {
    if (term.kind != kKL && term.kind != kTargetKL) continue;
    if (!is_probability(plan.nodes[term.first].kind)) term.first_softmax = softmax_of(term.first, term.temperature);
    if (!is_probability(plan.nodes[term.second].kind)) term.second_softmax = softmax_of(term.second, term.temperature);
    if (term.moment) has_edges[term.first_softmax] = true;
  }
  for (size_t s = 0; s < plan.softmaxes.size(); ++s) {
    Softmax& softmax = plan.softmaxes[s];
    for (size_t b = 0; b < s && !has_edges[s] && softmax.base < 0; ++b) {
      Softmax& base = plan.softmaxes[b];
      if (base.node != softmax.node || base.base >= 0 || base.derived >= 0) continue;
      for (int power = 2; power <= 4; ++power)
        if (base.temperature == power * softmax.temperature) {
          softmax.base = static_cast<int>(b);
          base.derived = static_cast<int>(s);
          base.power = power;
        }
    }
  }
  plan.input_softmaxes.resize(plan.nodes.size());
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    const auto first = std::find_if(plan.softmaxes.begin(), plan.softmaxes.end(),
                                    [&](const Softmax& softmax) { return softmax.node >= static_cast<int>(n); });
    plan.node_softmaxes.push_back(static_cast<int>(first - plan.softmaxes.begin()));
    const int one = softmax_of(static_cast<int>(n), 1);
    plan.softmax_at_one.push_back(one < static_cast<int>(plan.softmaxes.size()) ? one : -1);
    if (plan.nodes[n].kind != kProbabilityMixture) continue;
    for (const int input : plan.inputs[n]) {
      const bool external = plan.nodes[input].kind == kExternal;
      plan.input_softmaxes[n].push_back(external ? -1 : softmax_of(input, plan.nodes[n].temperature));
    }
  }
  plan.node_softmaxes.push_back(static_cast<int>(plan.softmaxes.size()));
}

// Finds the passes over the columns in which each node is read and each softmax is summed.
void find_passes(fastokd_plan& plan) {
  for (Softmax& softmax : plan.softmaxes) {
    softmax.passes = 1u << plan.nodes[softmax.node].sum_pass;
    plan.nodes[softmax.node].read_in |= softmax.passes;
  }
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    Node& node = plan.nodes[n];
    node.read_in |= is_logits(node.kind) ? 1u : 2u;
    if (node.kind != kMinimum && node.kind != kSelection) continue;
    for (const int input : plan.inputs[n]) plan.nodes[input].wants_target = true;
  }
  for (Term& term : plan.terms) {
    if (term.kind == kCrossEntropy) {
      plan.nodes[term.student].wants_target = true;
      plan.nodes[term.student].wants_sum |= plan.program.label_smoothing > 0;
      continue;
    }
    if (term.kind == kTargetKL) {
      for (const int node : {term.first, term.second}) plan.nodes[plan.inputs[node][0]].wants_target = true;
      continue;
    }
    Node &first = plan.nodes[term.first], &second = plan.nodes[term.second];
    if (term.kind >= kSquaredError) {
      first.read_in |= 1u;
      second.read_in |= 1u;
      plan.program.has_normalized = true;
      continue;
    }
    term.pass = std::max(first.sum_pass, second.sum_pass) + (term.moment ? 0 : 1);
    first.read_in |= 1u << term.pass;
    second.read_in |= 1u << term.pass;
    if (term.moment) plan.softmaxes[term.first_softmax].passes |= 1u << term.pass;
    if (term.eps_mode == kEpsFirstOrder) first.wants_sum = second.wants_sum = true;
    plan.program.has_normalized |= !term.moment;
  }
  unsigned all = 0;
  for (size_t n = plan.nodes.size(); n-- > 0;) {
    const Node& node = plan.nodes[n];
    plan.program.has_normalized |= node.kind == kProbabilityMixture;
    all |= node.read_in;
    for (const int input : plan.inputs[n]) plan.nodes[input].read_in |= node.read_in;
  }
  plan.program.num_passes = all & 4u ? 3 : all & 2u ? 2 : 1;
}

void place_stats(fastokd_plan& plan) {
  Program& program = plan.program;
  int& next = program.num_stats;
  program.mass_stat = next++;
  for (Softmax& softmax : plan.softmaxes) softmax.stat = next++;
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    Node& node = plan.nodes[n];
    if (plan.node_softmaxes[n] != plan.node_softmaxes[n + 1] || node.wants_target || node.wants_sum) node.max_stat = next++;
    if (node.kind != kMinimum && node.kind != kSelection) continue;
    node.extra_stat = next;
    next += node.kind == kMinimum ? node.num_inputs : 1;
  }
  for (Term& term : plan.terms) {
    if (term.kind == kKL || term.kind == kTargetKL) term.inner_stat = next++;
    if (term.direction == kJensenShannon || term.kind == kTargetKL) term.teacher_stat = next++;
  }
  program.mixture_stats = next;
  for (Term& term : plan.terms) {
    if (term.kind != kKL || term.detach || plan.nodes[term.teacher].kind != kProbabilityMixture) continue;
    term.mixture_stat = next;
    next += plan.nodes[term.teacher].num_inputs;
  }
  program.num_mixture_sums = next - program.mixture_stats;
}

}  // namespace

int32_t decode(const int64_t* ints, int64_t num_ints, const double* floats, int64_t num_floats, fastokd_plan& plan) {
  try {
    read(ints, num_ints, floats, num_floats, plan);
  } catch (const PlanError& bad) {
    return bad.status;
  }
  find_softmaxes(plan);
  find_passes(plan);
  place_stats(plan);
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    plan.nodes[n].inputs = plan.inputs[n].data();
    plan.nodes[n].input_softmaxes = plan.input_softmaxes[n].data();
    plan.nodes[n].constants = plan.constants[n].data();
  }
  Program& program = plan.program;
  program.num_nodes = static_cast<int>(plan.nodes.size());
  program.num_terms = static_cast<int>(plan.terms.size());
  program.num_softmaxes = static_cast<int>(plan.softmaxes.size());
  program.widths = plan.widths.data();
  program.nodes = plan.nodes.data();
  program.softmaxes = plan.softmaxes.data();
  program.terms = plan.terms.data();
  program.node_softmaxes = plan.node_softmaxes.data();
  program.softmax_at_one = plan.softmax_at_one.data();
  return FASTOKD_OK;
}

}  // namespace fastokd
