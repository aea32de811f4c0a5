// Callers side by side on the engine's C ABI, for ThreadSanitizer: `callers CALLERS ROUNDS FAULT`.
//
// Every call is repeated on several threads and must give the bits of one thread. FAULT 1: the pieces of a job add to
// one number without a lock, which is to be found.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <thread>
#include <vector>

#include "mtml/abi.h"
#include "runtime/team.h"

namespace {

using Numbers = std::vector<double>;

Numbers draw(std::mt19937& rng, int64_t n) {
  std::normal_distribution<double> normal;
  Numbers numbers(static_cast<size_t>(n));
  for (double& each : numbers) each = normal(rng);
  return numbers;
}

// Layers of all tasks, forward and back.
Numbers layers(std::mt19937 rng, int threads) {
  MtmlkTaskLinear c = {};
  c.dtype = MTMLK_F64, c.threads = threads, c.activation = 2;
  c.tasks = c.weights = c.biases = 1 + int64_t(rng() % 5), c.rows = 1 + int64_t(rng() % 200);
  c.inputs = 1 + int64_t(rng() % 60), c.outputs = 1 + int64_t(rng() % 60);
  const int64_t n_x = c.tasks * c.rows * c.inputs, n_w = c.tasks * c.inputs * c.outputs;
  const int64_t n_b = c.tasks * c.outputs, n_y = c.tasks * c.rows * c.outputs;
  const Numbers x = draw(rng, n_x), w = draw(rng, n_w), b = draw(rng, n_b), dy = draw(rng, n_y);
  Numbers out(size_t(n_y + n_x + n_w + n_b));
  c.x = x.data(), c.weight = w.data(), c.bias = b.data(), c.grad = dy.data(), c.y = out.data();
  c.dx = out.data() + n_y, c.dw = out.data() + n_y + n_x, c.db = out.data() + n_y + n_x + n_w;
  if (mtmlk_task_linear(&c) != MTMLK_OK || mtmlk_task_linear_back(&c) != MTMLK_OK) abort();
  return out;
}

// The inner loop of I-8-1, tanh, three steps: tasks for every thread, or a few whose chunks they share.
Numbers inner_loop(std::mt19937 rng, int threads) {
  const bool shared = rng() % 2;
  const int64_t tasks = 1 + int64_t(rng() % (shared ? 2 : 9)), samples = shared ? 700 : 1 + int64_t(rng() % 40);
  const int64_t program[] = {2, 1, 4,  4, 3, 3, 0, 8, 3,  1, 1, 8, 0,  2,  8, 1, 1, 2,  0, 0, -1, -1, -1, 1, 3, 1, -1,
                             3, 0, -1, 0, 1, 1, 8, 1, -1, 4, 1, 2, -1, -1, 1, 8, 1, -1, 3, 2, -1, 2,  3,  1, 2, 1, -1};
  const uint8_t adapted[] = {1, 1, 1, 1}, elements[] = {0};
  const int64_t lr_steps[] = {1};
  MtmlkPlanSpec spec = {};
  spec.dtype = MTMLK_F64, spec.program = program, spec.n_program = sizeof(program) / sizeof(*program);
  spec.adapted = adapted, spec.n_adapted = 4, spec.support = spec.query = samples, spec.steps = 3;
  spec.needs = MTMLK_NEED_PARAMS, spec.lr_steps = lr_steps, spec.lr_elements = elements, spec.n_lr = 1;
  MtmlkPlan* plan = nullptr;
  MtmlkReason reason;
  if (mtmlk_plan_create(&spec, &plan, &reason) != MTMLK_OK) abort();
  MtmlkPlanInfo info;
  mtmlk_plan_info(plan, &info);
  const Numbers w = draw(rng, 24), b = draw(rng, 8), v = draw(rng, 16), a = draw(rng, 2), rate(1, 0.1);
  const Numbers x = draw(rng, tasks * samples * 3), y = draw(rng, tasks * samples * 2);
  const void *params[] = {w.data(), b.data(), v.data(), a.data()}, *inputs[] = {x.data()}, *rates[] = {rate.data()};
  const int64_t rows = info.carry_per_task ? tasks : 1;
  Numbers out(size_t(tasks + rows * info.carry_cols));
  MtmlkCall call = {};
  call.tasks = tasks, call.threads = threads, call.params = params, call.support_x = call.query_x = inputs;
  call.support_y = call.query_y = y.data(), call.lr = rates, call.loss = out.data(), call.differentiate = 1;
  Numbers carry(size_t(rows * info.carry_cols) + 8);
  void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(carry.data()) + 63) / 64 * 64);
  call.carry = aligned;
  MtmlkError error = {};
  if (mtmlk_inner_loop(plan, &call, &error) != MTMLK_OK) abort();
  memcpy(out.data() + tasks, aligned, size_t(rows * info.carry_cols) * sizeof(double));
  mtmlk_plan_destroy(plan);
  return out;
}

bool same(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

// Every piece once, by a slot that nobody else has meanwhile, whose memory needs no lock.
bool pieces(std::mt19937& rng, bool fault) {
  const int threads = 2 + int(rng() % 7);
  const int64_t n = 2 + int64_t(rng() % 3000);
  std::vector<int64_t> taken(size_t(n), 0);
  struct alignas(128) Sum {
    int64_t value;
  };
  std::vector<Sum> sums(size_t(threads), Sum{0});
  mtmlk::each_piece(threads, n, nullptr, [&](int64_t i, int slot) {
    taken[size_t(i)] += 1, sums[fault ? 0 : size_t(slot)].value += i;
    int64_t own[3] = {};  // pieces of a piece, shared again
    mtmlk::each_piece(2, 3, nullptr, [&](int64_t j, int) { own[j] += j; });
    taken[size_t(i)] += own[0] + own[1] + own[2] - 3;
  });
  int64_t sum = 0;
  bool once = true;
  for (const Sum& each : sums) sum += each.value;
  for (const int64_t each : taken) once &= each == 1;
  return once && (fault || sum == n * (n - 1) / 2);
}

}  // namespace

int main(int, char** arguments) {
  const int callers = atoi(arguments[1]), rounds = atoi(arguments[2]);
  const bool fault = atoi(arguments[3]) != 0;
  mtmlk_thread_work(1);
  std::vector<std::thread> threads;
  std::vector<int> wrong(size_t(callers), 0);
  for (int caller = 0; caller < callers; ++caller)
    threads.emplace_back([&, caller] {
      std::mt19937 rng{uint32_t(caller)};
      for (int round = 0; round < rounds; ++round) {
        const std::mt19937 seed{uint32_t(rng())};
        const int team = 2 + int(rng() % 4);
        wrong[size_t(caller)] += !same(layers(seed, team), layers(seed, 1));
        wrong[size_t(caller)] += !same(inner_loop(seed, team), inner_loop(seed, 1));
        for (int i = 0; i < 8; ++i) wrong[size_t(caller)] += !pieces(rng, fault);
      }
    });
  for (std::thread& each : threads) each.join();
  int all = 0;
  for (const int each : wrong) all += each;
  printf("%d\n", all);
  return 0;
}
