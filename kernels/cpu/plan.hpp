// Decoding and validation of a plan.
#pragma once

#include <vector>

#include "program.hpp"

struct fastokd_plan {
  fastokd::Program program{};
  const fastokd::Backend* backend = nullptr;
  std::vector<int> widths;
  std::vector<fastokd::Node> nodes;
  std::vector<fastokd::Softmax> softmaxes;
  std::vector<fastokd::Term> terms;
  std::vector<std::vector<int>> inputs;           // per node
  std::vector<std::vector<int>> input_softmaxes;  // per node
  std::vector<std::vector<double>> constants;     // per node
  std::vector<int> node_softmaxes;
  std::vector<int> softmax_at_one;
};

namespace fastokd {

// Fills all members except the backend. Returns a status of fastokd.h.
int32_t decode(const int64_t* ints, int64_t num_ints, const double* floats, int64_t num_floats, fastokd_plan& plan);

}  // namespace fastokd
