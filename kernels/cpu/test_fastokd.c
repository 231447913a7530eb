/* The C ABI from plain C: versions, bad plans, a small AHBF plan against known values, an empty batch, threads, fork. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fastokd.h"

static int failures = 0;

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
      ++failures;                                                     \
    }                                                                 \
  } while (0)

/* AHBF with three branches (ids 0, 1, 2), ta2 (3) = s2 . (branch 1, branch 0), ta3 (4) = s3 . (branch 2, ta2), T = 3:
 * cross-entropies of all five; ta2 -> branch 0, branch 1 -> branch 0, ta3 -> ta2, branch 2 -> ta2. */
enum { M = 3, NUM_TERMS = 9, CE = 0, KL = 1 };
static const int64_t plan_ints[] = {
    2, M, 0, 2, 2, 2,                                         /* version, logits, externals, sources of width 2 */
    2, 0, 0, 2, 1, 0, 0, 1, 2, 2, 3,                          /* two mixtures */
    NUM_TERMS, CE, 0, -1, 0, 0, 0, 0, CE, 1, -1, 0, 0, 0, 1, CE, 2, -1, 0, 0, 0, 2, CE, 3, -1, 0, 0, 0, 3,
    CE, 4, -1, 0, 0, 0, 4, KL, 0, 3, 0, 0, 0, 5, KL, 0, 1, 0, 0, 0, 6, KL, 3, 4, 0, 0, 0, 7, KL, 3, 2, 0, 0, 0, 8,
};
static const double plan_floats[] = {
    0, 1, 1,                                                  /* label smoothing, the nodes' temperatures */
    1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, /* temperature, T^2, eps, beta of the cross-entropies */
    3, 9, 0, 0, 3, 9, 0, 0, 3, 9, 0, 0, 3, 9, 0, 0,
};
enum { NUM_INTS = sizeof plan_ints / sizeof *plan_ints, NUM_FLOATS = sizeof plan_floats / sizeof *plan_floats };
/* lambda_ta = 4, lambda_branch = 2, kd_weight = 0.5. */
static double weights_of_terms[NUM_TERMS] = {1, 1, 1, 1, 1, 2, 1, 2, 1};
static const fastokd_tensor shared_weights = {weights_of_terms, 0, 1, FASTOKD_FLOAT64, 0};
static const fastokd_tensor *const term_weights = &shared_weights;
static const double known_loss = 4.285215;
static const double known_grads[] = {
    -0.293761, 0.310757, -0.016996, -1.935302, 1.759042, 0.176260, 0.030955, -0.434477, 0.403522,
    0.760261,  -1.649746, -0.021102, -0.376563,
};

static double row_logits[3][3] = {{1, 0, -1}, {0.5, 1, -0.5}, {2, -1, 0.5}};
static double row_scores[2][2] = {{0.6, 0.4}, {0.3, 0.7}};

static fastokd_plan *make(const char *isa) {
  fastokd_plan *plan = NULL;
  CHECK(fastokd_plan_create(plan_ints, NUM_INTS, plan_floats, NUM_FLOATS, isa, &plan) == FASTOKD_OK);
  return plan;
}

/* Every row of the batch is the same one, by a row stride of 0. Returns how many values are wrong. */
static int wrong_values(const fastokd_plan *plan, int64_t batch, int32_t threads) {
  int64_t label = 0;
  int wrong = 0;
  fastokd_tensor tensors[6];
  memset(tensors, 0, sizeof tensors);
  for (int i = 0; i < 5; ++i) {
    tensors[i].data = i < 3 ? row_logits[i] : row_scores[i - 3];
    tensors[i].column_stride = 1;
    tensors[i].dtype = FASTOKD_FLOAT64;
  }
  tensors[5].data = &label;
  tensors[5].dtype = FASTOKD_INT64;
  double upstream = 1;
  fastokd_tensor grad_rows = {&upstream, 0, 0, FASTOKD_FLOAT64, 0};
  double *rows = malloc(batch * sizeof(double));
  double *terms = malloc(batch * NUM_TERMS * sizeof(double));
  double *stats = malloc(batch * fastokd_plan_num_stats(plan) * sizeof(double));
  void *grads[5];
  for (int i = 0; i < 5; ++i) grads[i] = malloc(batch * (i < 3 ? 3 : 2) * sizeof(double));
  CHECK(fastokd_forward(plan, batch, 3, tensors, term_weights, rows, terms, stats, threads) == FASTOKD_OK);
  CHECK(fastokd_backward(plan, batch, 3, tensors, term_weights, stats, &grad_rows, grads, threads) == FASTOKD_OK);
  for (int64_t b = 0; b < batch; ++b) {
    const double *known = known_grads;
    wrong += !(fabs(rows[b] - known_loss) < 1e-6);
    for (int i = 0; i < 5; ++i)
      for (int c = 0; c < (i < 3 ? 3 : 2); ++c) wrong += !(fabs(((double *)grads[i])[b * (i < 3 ? 3 : 2) + c] - *known++) < 1e-6);
  }
  double *both_rows = malloc(batch * sizeof(double));
  double *both = malloc(batch * 3 * sizeof(double));
  void *first_grad[5] = {both, NULL, NULL, NULL, NULL};
  CHECK(fastokd_forward_backward(plan, batch, 3, tensors, term_weights, both_rows, terms, stats, &grad_rows, first_grad,
                                 threads) == FASTOKD_OK);
  wrong += memcmp(both_rows, rows, batch * sizeof(double)) != 0;
  wrong += memcmp(both, grads[0], batch * 3 * sizeof(double)) != 0;
  free(both_rows);
  free(both);
  for (int i = 0; i < 5; ++i) free(grads[i]);
  free(rows);
  free(terms);
  free(stats);
  return wrong;
}

static int32_t status_with(int at, int64_t value) {
  int64_t ints[NUM_INTS];
  fastokd_plan *plan = NULL;
  memcpy(ints, plan_ints, sizeof ints);
  ints[at] = value;
  const int32_t status = fastokd_plan_create(ints, NUM_INTS, plan_floats, NUM_FLOATS, NULL, &plan);
  CHECK((plan == NULL) == (status != FASTOKD_OK));
  fastokd_plan_destroy(plan);
  return status;
}

static void test_bad_plans(void) {
  fastokd_plan *plan = NULL;
  CHECK(status_with(0, 1) == FASTOKD_PLAN_VERSION);
  CHECK(status_with(1, -1) == FASTOKD_PLAN_COUNT);
  CHECK(status_with(1, INT64_MAX) == FASTOKD_PLAN_COUNT);
  CHECK(status_with(7, 9) == FASTOKD_PLAN_NODE);  /* kind */
  CHECK(status_with(8, 2) == FASTOKD_PLAN_NODE);  /* source */
  CHECK(status_with(10, 3) == FASTOKD_PLAN_NODE); /* a node that takes itself */
  CHECK(status_with(18, 2) == FASTOKD_PLAN_TERM); /* a target edge without non-target nodes */
  CHECK(status_with(18, 5) == FASTOKD_PLAN_TERM); /* kind */
  CHECK(status_with(19, 5) == FASTOKD_PLAN_TERM); /* student */
  CHECK(status_with(20, 0) == FASTOKD_PLAN_TERM); /* a cross-entropy with a teacher */
  CHECK(status_with(24, 1) == FASTOKD_PLAN_TERM); /* an output that is left out */
  for (int n = 0; n < NUM_INTS; ++n) {
    const int32_t status = fastokd_plan_create(plan_ints, n, plan_floats, NUM_FLOATS, NULL, &plan);
    CHECK(status == (n == 0 ? FASTOKD_PLAN_VERSION : FASTOKD_PLAN_LENGTH));
  }
  CHECK(fastokd_plan_create(plan_ints, NUM_INTS, plan_floats, NUM_FLOATS - 1, NULL, &plan) == FASTOKD_PLAN_LENGTH);
  CHECK(fastokd_plan_create(plan_ints, NUM_INTS, plan_floats, NUM_FLOATS, "none", &plan) == FASTOKD_UNKNOWN_ISA);
  CHECK(fastokd_plan_create(NULL, 0, plan_floats, NUM_FLOATS, NULL, &plan) == FASTOKD_ARGUMENT);
  double floats[NUM_FLOATS];
  memcpy(floats, plan_floats, sizeof floats);
  floats[23] = 0; /* the first KL's temperature */
  CHECK(fastokd_plan_create(plan_ints, NUM_INTS, floats, NUM_FLOATS, NULL, &plan) == FASTOKD_PLAN_NUMBER);
  floats[23] = NAN;
  CHECK(fastokd_plan_create(plan_ints, NUM_INTS, floats, NUM_FLOATS, NULL, &plan) == FASTOKD_PLAN_NUMBER);
  CHECK(plan == NULL);
  for (int32_t status = -1; status < 12; ++status) CHECK(strlen(fastokd_status_message(status)) > 0);
}

static void test_calls(void) {
  fastokd_plan *plan = make(NULL);
  fastokd_tensor tensors[6];
  memset(tensors, 0, sizeof tensors);
  tensors[5].dtype = FASTOKD_INT64;
  CHECK(fastokd_forward(plan, 0, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT); /* not float */
  for (int i = 0; i < 5; ++i) tensors[i].dtype = FASTOKD_FLOAT64;
  CHECK(fastokd_forward(plan, 0, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_OK);
  CHECK(fastokd_forward(plan, 0, 3, tensors, NULL, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT);
  CHECK(fastokd_forward(plan, -1, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT);
  CHECK(fastokd_forward(plan, 1, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT);
  CHECK(fastokd_forward(NULL, 0, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT);
  tensors[1].dtype = FASTOKD_BFLOAT16; /* not the dtype of the first */
  CHECK(fastokd_forward(plan, 0, 3, tensors, term_weights, NULL, NULL, NULL, 2) == FASTOKD_ARGUMENT);
  CHECK(fastokd_plan_num_stats(NULL) == 0);
  fastokd_plan_destroy(plan);
  fastokd_plan_destroy(NULL);
}

int main(void) {
  CHECK(fastokd_abi_version() == FASTOKD_ABI_VERSION);
  test_bad_plans();
  test_calls();
  const char *isa;
  for (int i = 0; (isa = fastokd_isa(i)); ++i) {
    fastokd_plan *plan = make(isa);
    CHECK(wrong_values(plan, 1, 1) == 0);
    CHECK(wrong_values(plan, 7, 1) == 0);
    CHECK(wrong_values(plan, 20000, 4) == 0); /* enough for the threads to be used */
    fastokd_plan_destroy(plan);
    printf("%s: ok\n", isa);
  }
  CHECK(fastokd_isa(-1) == NULL);
  fastokd_plan *plan = make(NULL);
  fflush(stdout);
  const pid_t child = fork(); /* after the pool was made */
  if (child == 0) _exit(wrong_values(plan, 20000, 4) != 0);
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
  CHECK(wrong_values(plan, 20000, 4) == 0);
  fastokd_plan_destroy(plan);
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
