// A block at work on a task's perceptron: where its numbers lie, and by which rates it goes.
#pragma once

#include "cuda/inner_loop/machine.cuh"
#include "cuda/inner_loop/mlp/shape.cuh"
#include "mtml/cuda_mlp.h"

namespace mtmlk {

// An array on the chip, by its distance from where the block's memory begins: so that a device's compiler knows in which
// memory it lies.
template <class T>
struct OnChip {
  int from;

  DEV static T* chip() { return reinterpret_cast<T*>(dynamic_shared()); }
  DEV static OnChip of(const T* at) { return {int(at - chip())}; }
  DEV operator T*() const { return chip() + from; }
};

// Planes of a set of samples.
template <class T, class S>
struct MlpValues {
  OnChip<T> at;
  int room;  // samples of a plane

  DEV T* plane(typename S::Plane p, int l) const { return at + S::plane(p, l) * room; }
  DEV int size() const { return S::values(room); }
};

// Parameters, and behind them the values of a set: what a step leaves in the history.
template <class T, class S>
struct MlpStep {
  OnChip<T> at;
  int room;

  DEV T* weight(int l) const { return at + S::weight(l); }
  DEV T* bias(int l) const { return at + S::bias(l); }
  DEV MlpValues<T, S> values() const { return {{at.from + S::kParams}, room}; }
  DEV T* plane(typename S::Plane p, int l) const { return values().plane(p, l); }
  DEV int size() const { return S::step(room); }
};

template <class T, class S>
struct MlpTask {
  const MtmlkMlpCall& call;
  int rank, threads;
  int task;
  T low;                   // the slope of an activation that does not bend, below 0
  OnChip<T> lambda;        // like the parameters
  MlpValues<T, S> moving;  // tangents of values
  OnChip<T> each;          // [samples]: losses
  OnChip<T> dots;          // [samples, S::kDots]: <dz, a lambda> by columns of lanes
  OnChip<T> rates;         // [K, 2 L]
  OnChip<T> rate_grads;    // [K, 2 L]
  OnChip<T> ones;          // four of them, then four zeros
  T* history;              // of this block, a step after the other

  DEV int lane() const { return rank % 32; }
  DEV int warp() const { return rank / 32; }
  DEV int warps() const { return threads / 32; }
  DEV T rate(int k, int tensor) const { return rates[k * 2 * S::kLayers + tensor]; }
};

// A set's samples of this task.
template <class T>
struct MlpSet {
  OnChip<T> x, y;  // [samples, I] in rows of row_of(I); [samples, O] without gaps
  int kind;        // of the loss
  T p0, weight;
  int samples;

  DEV const T* target(int row, int width) const { return y + row * width; }
};

}  // namespace mtmlk
