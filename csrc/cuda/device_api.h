// What kernels call in place of what CUDA spells in ways that a host compiler does not take: each has two bodies, here
// and in host/. With them a kernel compiles with nvcc and, unchanged, with g++ -x c++.
//
// SharedCarver at(dynamic_shared());
// float* weights = at.take<float>(rows * columns);  // [rows, columns]
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__CUDACC__)
#include "cuda/host/carver.h"
#include "cuda/host/device_words.h"
#else
#include <cooperative_groups.h>

#define DEV __device__ __forceinline__

// An array of the block.
#define SHARED_ARRAY(type, name, n) __shared__ type name[n]

namespace mtmlk {

// The block's dynamic shared memory.
DEV char* dynamic_shared() {
  extern __shared__ __align__(128) char mtmlk_dynamic_shared[];
  return mtmlk_dynamic_shared;
}

// Cuts arrays of the dynamic shared memory; one that was made of no address only counts the bytes they take.
class SharedCarver {
 public:
  __host__ __device__ SharedCarver() : base_(nullptr), bytes_(0) {}
  __host__ __device__ explicit SharedCarver(char* base) : base_(base), bytes_(0) {}

  template <class T>
  __host__ __device__ T* take(size_t n) {
    static_assert(alignof(T) <= 16, "arrays are aligned to 16 bytes");
    char* p = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (n * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(p);
  }
  __host__ __device__ size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_;
};

// A number that the compiler keeps, where it would rather read it anew from the kernel's arguments each time.
DEV float kept(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
DEV double kept(double x) {
  asm volatile("" : "+d"(x));
  return x;
}
DEV int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---------------------------------------------------------------- clusters

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // where none can be launched
DEV int cluster_rank() { return 0; }
DEV void cluster_sync() { __trap(); }
template <class T>
DEV T* peer_shared(T* p, int) {
  return p;
}
#else
DEV int cluster_rank() { return int(cooperative_groups::this_cluster().block_rank()); }
DEV void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// What `p`, in this block's shared memory, is in that of the cluster's block `rank`. No block may return before others
// have done with its memory: a cluster_sync() comes last.
template <class T>
DEV T* peer_shared(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, unsigned(rank));
}
#endif

// ---------------------------------------------------------------- launches that begin early (Launch::overlaps)

// wait_for_earlier_launches: until they have ended, and what they wrote is there. Every thread calls it. Before it a kernel
// reads nothing that the call's earlier launches write, and writes nothing but its block's memory.
// let_next_launch_begin: the next launch may begin when all blocks have said so, or have returned.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // where none begins early
DEV void wait_for_earlier_launches() {}
DEV void let_next_launch_begin() {}
#else
DEV void wait_for_earlier_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

// ---------------------------------------------------------------- copies that overlap with work (cp.async)

// 16 bytes, from and to multiples of 16. What was in the target is gone at once.
DEV void copy_async_16(void* shared, const void* global) {
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}
// One number of 4 or 8 bytes, from and to multiples of its size.
template <class T>
DEV void copy_async_one(T* shared, const T* global) {
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(int(sizeof(T))) : "memory");
}
// Copies since the last commit become a group.
DEV void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's groups, the newest, are on their way. Other threads: after a barrier.
template <int kPending>
DEV void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
DEV void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---------------------------------------------------------------- matrix units

// To TF32's 10 bits of fraction, halves away from zero.
DEV uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// D[16, 8] += A[16, 8] B[8, 8] of a warp. A lane holds, with group = lane / 4 and within = lane % 4,
//   a[i] = A[group + 8 (i % 2), within + 4 (i / 2)]
//   b[i] = B[within + 4 i, group]
//   d[i] = D[group + 8 (i / 2), 2 within + i % 2]
DEV void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mtmlk
#endif
