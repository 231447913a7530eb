// A decoded plan, and the table of functions that each instruction set provides.
//
// Glossary, as in kernels/triton/spec.py:
// - node: a row of values per sample: logits, an external row of probabilities, or a derived node.
// - softmax: one node at one temperature. Its exponentials are summed over the classes.
// - base: a softmax whose exponentials are computed. The exponentials of a derived softmax of the same node are their
//   second, third or fourth power.
// - edge: a KL term sum_c p_first (log p_first - log p_second).
// - moment: the mean of log p_first - log p_second under p_first, without the logarithms of the two sums. An edge between
//   two rows of logits needs no more than its moment.
// - normalized edge: an edge that needs normalized probabilities, because one row is not a row of logits, because an
//   exact eps is added to the teacher's probabilities, or because it is a Jensen-Shannon divergence. It takes a separate
//   pass. (kernels/triton has a shorter way for edges from external rows.)
// - non-target node: a row of logits without the label's class.
// - target edge: the KL divergence of the pairs (probability of the label, of all other classes) of two rows of logits.
// - output: a term of the graph, the sum of one or two terms here.
// - statistics: the values per row that the forward pass keeps for the backward pass.
// - pass: one reading of all columns of a row, in chunks.
//
// The objects compiled for AVX2 or AVX-512 see only these plain structs. A standard-library template instantiated there
// could be the copy that the linker keeps, and would then crash older machines.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "fastokd.h"

namespace fastokd {

enum NodeKind {
  kLogits = -2,
  kExternal = -1,
  kMixture = 0,
  kProbabilityMixture = 1,
  kMinimum = 2,
  kSelection = 3,
  kNonTarget = 4
};
enum TermKind { kCrossEntropy = 0, kKL = 1, kTargetKL = 2, kSquaredError = 3, kAbsoluteError = 4 };
enum EpsMode { kEpsNone = 0, kEpsFirstOrder = 1, kEpsExact = 2 };
enum Direction { kTeacherFirst = 0, kStudentFirst = 1, kJensenShannon = 2 };

struct Node {
  int kind;
  int num_inputs;
  const int* inputs;
  const int* input_softmaxes;  // of a probability mixture: each input's softmax at its temperature, -1 for external rows
  int source;                  // run-time weight tensor, or -1
  const double* constants;     // weights if source is -1
  double temperature;          // of a probability mixture
  int first_weight;            // position of its first weight among the row's weights
  int sum_pass;                // the pass that takes its softmax sums
  unsigned read_in;            // bit p: pass p reads its values
  bool wants_target;           // its product with the target is needed
  bool wants_sum;              // the sum of its values minus its maximum is needed
  int max_stat;                // statistics: its maximum,
  int extra_stat;              // and the inputs' label logits (minimum) or the chosen input (selection)
};

// A base computes the exponentials of at most one derived softmax as powers of its exponentials.
struct Softmax {
  int node;
  double temperature;
  int base;         // or -1
  int derived;      // of a base: the softmax derived from it, or -1,
  int power;        // and the ratio of their temperatures, or 0
  unsigned passes;  // bit p: summed in pass p
  int stat;
};

struct Term {
  int kind;
  int output;
  int student;
  int teacher;
  double temperature;
  double scale;
  bool detach;
  int direction;
  int eps_mode;
  double eps;
  double beta;
  bool moment;         // an edge that needs only its moment; other edges are normalized edges
  int pass;
  int first;           // nodes
  int second;
  int first_softmax;   // -1 for a row of probabilities
  int second_softmax;
  int inner_stat;      // the sum over the classes that the gradient needs; of a target edge its slope for the student
  int teacher_stat;    // the same for the teacher of a Jensen-Shannon divergence or a target edge, or -1
  int mixture_stat;    // the first of K such sums for the inputs of a probability mixture that learns, or -1
};

struct Program {
  int num_logits;
  int num_externals;
  int num_sources;
  int num_nodes;
  int num_terms;
  int num_outputs;
  int num_softmaxes;
  int num_weights;
  int num_stats;
  int num_passes;
  int num_mixture_sums;
  int mixture_stats;
  int mass_stat;        // the sum of the target's probabilities; NaN for a label out of range
  bool has_normalized;  // there are normalized edges, probability mixtures or errors
  double label_smoothing;
  const int* widths;
  const Node* nodes;
  const Softmax* softmaxes;
  const Term* terms;
  const int* node_softmaxes;  // per node: its first softmax; then the number of softmaxes
  const int* softmax_at_one;  // per node: the softmax at temperature 1, or -1
};

struct Call {
  const Program* program;
  int64_t batch;
  int64_t classes;
  const fastokd_tensor* tensors;
  fastokd_tensor term_weights;
  void* rows;
  void* terms;
  void* stats;  // written by forward, read by backward
  fastokd_tensor grad_rows;
  void* const* grads;
};

using RowsFunction = void (*)(const Call& call, void* scratch, int64_t begin, int64_t end);

// `scratch` is the number of bytes that a range of rows needs, aligned to 64. Index 0: float, 1: double.
struct RowKernel {
  size_t (*scratch)(const Call& call);
  RowsFunction rows;
};

struct Backend {
  const char* name;
  RowKernel forward[2];
  RowKernel backward[2];
  RowKernel forward_backward[2];
  void (*math[2])(int function, const void* in, void* out, int64_t count);
};

}  // namespace fastokd
