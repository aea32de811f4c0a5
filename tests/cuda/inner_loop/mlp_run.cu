// Runs a small perceptron's kernel on numbers of its own and prints a hash of its results' bits, for sanitizers.
// Arguments: threads of a block, sets on the chip; 0 sets: in tiles, -1: in tiles whose launches overlap, -2 and -3: the
// same two on matrix units.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "cuda/inner_loop/mlp/kernel.cuh"
#include "cuda/inner_loop/mlp/list.cuh"
#include "cuda/inner_loop/mlp/tile_launches.cuh"
#include "cuda/launch.h"

namespace {

using Shape = mtmlk::MlpShape<false, 2, 12, 8, 1>;
using Tiles = mtmlk::TileLaunches<float, mtmlk::TiledMlp<Shape, 2, 2, 1>>;
using OfFragments = mtmlk::InTf32<mtmlk::MlpShape<false, 2, 32, 32, 1>, 3>;
using TilesOfFragments = mtmlk::TileLaunches<float, mtmlk::TiledMlp<OfFragments, 8, 8, 8>>;
constexpr int kTasks = 3, kQuery = 3, kSteps = 3, kRows = 2;

struct Free {
  void operator()(float* p) const { free(p); }
};

// Each in memory of its own, as large as it is; results begin as NaN.
class Arrays {
 public:
  float* random(size_t n) {
    float* const p = result(n);
    for (size_t i = 0; i < n; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      p[i] = float(int32_t(state_ >> 32)) / float(1u << 31);
    }
    return p;
  }
  float* result(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, sizeof(float) * n) != 0) abort();
    memset(p, 0xFF, sizeof(float) * n);
    all_.emplace_back(static_cast<float*>(p));
    return all_.back().get();
  }

 private:
  uint64_t state_ = 1;
  std::vector<std::unique_ptr<float, Free>> all_;
};

uint64_t hash_of(uint64_t hash, const float* p, size_t n) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(p);
  for (size_t i = 0; i < sizeof(float) * n; ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  return hash;
}

int whole(const MtmlkMlpCall& c, mtmlk::Launch launch) {
  mtmlk::SharedCarver carver;
  mtmlk::MlpMemory<float, Shape>::of(carver, c);
  launch.shared_bytes = carver.bytes();
  return mtmlk::start(mtmlk::mlp_kernel<float, Shape, kRows>, launch, c);
}

// On the way back two blocks a task have three tiles, of fragments two.
template <class Tiles>
int in_tiles(const MtmlkMlpCall& c, const mtmlk::Launch& launch, bool overlaps) {
  return Tiles{c, launch, 2 * kTasks, int(launch.block.x), overlaps}.run();
}

template <class Shape, class Tiles>
int run(int threads, int sets, int samples) {
  Arrays arrays;
  MtmlkMlpCall c = {};
  c.tasks = kTasks, c.support = samples, c.query = kQuery, c.steps = kSteps;
  c.wants_gradient = c.wants_rates = 1, c.sets = sets;
  c.act = mtmlk::kRelu, c.support_loss = {mtmlk::kMse, 0, 0.2}, c.query_loss = {mtmlk::kMse, 0, 0.3};
  for (int l = 1; l <= Shape::kLayers; ++l) {
    c.theta[2 * l - 2] = arrays.random(size_t(Shape::width(l)) * Shape::width(l - 1));
    c.theta[2 * l - 1] = arrays.random(size_t(Shape::width(l)));
    for (const int tensor : {2 * l - 2, 2 * l - 1})
      c.rates[tensor] = arrays.random(kSteps), c.rate_stride[tensor] = 1, c.rate_at[tensor] = tensor * kSteps;
  }
  c.n_rates = 2 * Shape::kLayers * kSteps;
  c.support_x = arrays.random(size_t(kTasks) * samples * 2), c.support_y = arrays.random(size_t(kTasks) * samples);
  c.query_x = arrays.random(kTasks * kQuery * 2), c.query_y = arrays.random(kTasks * kQuery);
  const size_t parts = size_t(kTasks) * (Shape::kPlainParams + c.n_rates);
  float *loss = arrays.result(kTasks), *output = arrays.result(kTasks * kQuery);
  float *support = arrays.result(kSteps * kTasks), *shares = arrays.result(parts);
  c.loss = loss, c.output = output, c.support_losses = support, c.parts = shares;
  c.history = arrays.result(sets > 0 ? size_t(2) * kSteps * Shape::step(samples) : size_t(Tiles::space(c)));
  mtmlk::Launch launch;
  launch.grid = dim3(2), launch.block = dim3(unsigned(threads));
  const int status = sets > 0 ? whole(c, launch) : in_tiles<Tiles>(c, launch, sets % 2 != 0);
  if (status != 0) return 3;
  uint64_t hash = hash_of(1469598103934665603u, loss, kTasks);
  hash = hash_of(hash_of(hash, output, kTasks * kQuery), support, kSteps * kTasks);
  printf("{\"bits\": \"%016llx\"}\n", static_cast<unsigned long long>(hash_of(hash, shares, parts)));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int threads = atoi(arguments[1]), sets = atoi(arguments[2]);
  return sets < -1 ? run<OfFragments, TilesOfFragments>(threads, sets, 11) : run<Shape, Tiles>(threads, sets, 5);
}
