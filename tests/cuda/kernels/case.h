// A case runs kernels on numbers of its own and prints how far the result is from what a plain loop computes, and a
// hash of the result's bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <vector>

#include "cuda/launch.h"

using namespace mtmlk;

// Memory that a device sees, too, at a multiple of 16. It is full of NaN bits.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) : n_(n) {
#if defined(__CUDACC__)
    cudaMallocManaged(&data_, n * sizeof(T));
#else
    if (posix_memalign(reinterpret_cast<void**>(&data_), 16, n * sizeof(T)) != 0) abort();
#endif
    memset(static_cast<void*>(data_), 0xFF, n * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(data_);
#else
    free(data_);
#endif
  }
  T& operator[](size_t i) { return data_[i]; }
  T* data() { return data_; }
  size_t size() const { return n_; }

  // Numbers in (-1, 1), or the whole numbers below `below`.
  void draw(uint32_t seed, uint32_t below = 0) {
    for (size_t i = 0; i < n_; ++i) {
      seed = seed * 1664525u + 1013904223u;
      data_[i] = below > 0 ? T((seed >> 8) % below) : T(int(seed >> 8) - (1 << 23)) / T(1 << 23);
    }
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

inline void synchronize() {
#if defined(__CUDACC__)
  cudaDeviceSynchronize();
#endif
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& how, A... arguments) {
  const int error = start(kernel, how, arguments...);
  if (error != 0) printf("error %d\n", error);
  synchronize();
}

// The largest difference between result[i] and expected(i).
template <class T, class F>
void report(Buffer<T>& result, F expected) {
  double error = 0;
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < result.size(); ++i) {
    const double off = fabs(double(result[i]) - double(expected(i)));
    if (!(off <= error) && error == error) error = off;  // a NaN stays
    unsigned char bytes[sizeof(T)];
    memcpy(bytes, &result[i], sizeof(T));
    for (const unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  }
  printf("{\"error\": %s%.9g%s, \"bits\": \"%016llx\"}\n", error == error ? "" : "\"", error,
         error == error ? "" : "\"", static_cast<unsigned long long>(hash));
}

struct Case {
  const char* name;
  void (*run)();
};
