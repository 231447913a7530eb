// A decoded plan, and the table of functions that each instruction set provides.
//
// The objects compiled for AVX2 or AVX-512 see only these plain structs: a template of the standard library
// instantiated there could be the copy the linker keeps, and then crash older machines.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "fastokd.h"

namespace fastokd {

enum NodeKind { kLogits = -2, kExternal = -1, kMixture = 0, kProbabilityMixture = 1, kMinimum = 2, kSelection = 3 };
enum TermKind { kCrossEntropy = 0, kKL = 1 };
enum EpsMode { kEpsNone = 0, kEpsFirstOrder = 1, kEpsExact = 2 };
enum Direction { kTeacherFirst = 0, kStudentFirst = 1 };

struct Node {
  int kind;
  int num_inputs;
  const int* inputs;
  const int* input_slots;   // probability mixtures: each input's slot at its temperature, -1 for external rows
  int source;               // run-time weight tensor, or -1
  const double* constants;  // weights where source is -1
  double temperature;       // of a probability mixture
  int factors;              // place of its first weight among the row's factors
  int stage;                // the pass over the columns that takes its softmax sums
  unsigned read_in;         // bit p: pass p reads its values
  bool wants_target;        // its product with the target is needed
  bool wants_mean;          // the sum of its shifted values is needed
  int max_stat;             // statistics: its maximum,
  int extra_stat;           // and the inputs' label logits (minimum) or the chosen input (selection)
};

// The softmax sum of one node at one temperature. A derived slot takes a power of the exponentials of slot `base`: where
// the ratio of the temperatures is a whole number that saves half of the exponentials.
struct Slot {
  int node;
  double temperature;
  int base;     // or -1
  int derived;  // of a base: the slot derived from it, or -1,
  int power;    // and the ratio of their temperatures, or 0
  unsigned passes;  // bit p: summed in pass p
  int stat;
};

// A KL edge is sum_c p_first (log p_first - log p_second). `moment`: both rows are logits, and sums of
// e_first * (first - second) are enough. The others need normalised probabilities, in a pass of their own.
struct Term {
  int kind;
  int student;
  int teacher;
  double temperature;
  double scale;
  bool detach;
  int direction;
  int eps_mode;
  double eps;
  bool moment;
  int pass;
  int first;        // nodes
  int second;
  int first_slot;   // -1 if it is a row of probabilities
  int second_slot;
  int inner_stat;   // what the gradient needs of the sums over the classes
  int mixture_stat; // the first of K such sums for the inputs of an undetached probability mixture, or -1
};

struct Program {
  int num_logits;
  int num_externals;
  int num_sources;
  int num_nodes;
  int num_terms;
  int num_slots;
  int num_factors;
  int num_stats;
  int num_passes;
  int num_mixture_sums;
  int mixture_stats;
  int mass_stat;  // the sum of the target's probabilities; NaN for a label out of range
  bool has_direct;  // there are terms that are no moments, or probability mixtures
  double label_smoothing;
  const int* widths;
  const Node* nodes;
  const Slot* slots;
  const Term* terms;
  const int* first_slot;   // per node, and one behind: its slots
  const int* slot_of_one;  // per node: the slot at temperature 1, or -1
};

struct Call {
  const Program* program;
  int64_t batch;
  int64_t classes;
  const fastokd_tensor* tensors;
  const void* term_weights;
  void* rows;
  void* terms;
  void* stats;  // written by forward, read by backward
  fastokd_tensor grad_rows;
  void* const* grads;
};

using RowsFunction = void (*)(const Call& call, void* scratch, int64_t begin, int64_t end);

// `scratch` is the number of bytes that a range of rows needs, aligned to 64. Index 0: float, 1: double.
struct Pass {
  size_t (*scratch)(const Call& call);
  RowsFunction rows;
};

struct Backend {
  const char* name;
  Pass forward[2];
  Pass backward[2];
  Pass both[2];
  void (*math[2])(int function, const void* in, void* out, int64_t count);
};

}  // namespace fastokd
