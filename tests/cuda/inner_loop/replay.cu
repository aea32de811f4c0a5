// Runs a launch of the persistent inner loop that a file holds (cases/cuda_replay.py) and prints a hash of the tensors'
// bits after it. Every tensor has memory of its own, as large as it is.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "engine.cu"

namespace {

struct Free {
  void operator()(void* p) const { free(p); }
};

// Bytes at a multiple of 16.
class Bytes {
 public:
  explicit Bytes(size_t size) : size_(size) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, size > 0 ? size : 1) != 0) abort();
    memset(p, 0xFF, size);
    data_.reset(static_cast<char*>(p));
  }
  char* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<char, Free> data_;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(fopen(path, "rb")) {
    if (file_ == nullptr) fail("cannot be opened");
  }
  ~Reader() { fclose(file_); }
  void read(void* to, size_t bytes) {
    if (fread(to, 1, bytes, file_) != bytes) fail("ends too early");
  }
  int64_t number() {
    int64_t n;
    read(&n, sizeof n);
    return n;
  }
  Bytes bytes(size_t size) {
    Bytes found(size);
    read(found.data(), size);
    return found;
  }

 private:
  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "the file of the launch %s\n", what);
    exit(2);
  }
  FILE* file_;
};

uint64_t hash_of(const std::vector<Bytes>& tensors) {
  uint64_t hash = 1469598103934665603u;
  for (const Bytes& tensor : tensors)
    for (size_t i = 0; i < tensor.size(); ++i)
      hash = (hash ^ static_cast<unsigned char>(tensor.data()[i])) * 1099511628211u;
  return hash;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  Reader file(arguments[1]);
  MtmlkSchedule s = {};
  s.dtype = int32_t(file.number()), s.full = int32_t(file.number());
  s.tasks = int32_t(file.number()), s.blocks = int32_t(file.number());
  s.threads = int32_t(file.number()), s.first_words = int32_t(file.number());
  s.chip_elements = int32_t(file.number()), s.workspace_elements = file.number();
  const Bytes words = file.bytes(4 * size_t(file.number()));
  const size_t element = s.dtype == MTMLK_F32 ? 4 : 8;
  const Bytes workspace(element * size_t(s.workspace_elements) * size_t(s.blocks));
  s.program = reinterpret_cast<const int32_t*>(words.data());
  s.workspace = workspace.size() > 0 ? workspace.data() : nullptr;
  s.n_tensors = int32_t(file.number());
  std::vector<Bytes> tensors;
  std::vector<void*> addresses;
  std::vector<int64_t> strides;
  for (int i = 0; i < s.n_tensors; ++i) {
    const int64_t bytes = file.number();  // -1: absent
    strides.push_back(file.number());
    tensors.push_back(file.bytes(bytes < 0 ? 0 : size_t(bytes)));
    addresses.push_back(bytes < 0 ? nullptr : tensors.back().data());
  }
  s.tensors = addresses.data(), s.strides = strides.data();
  MtmlkReason reason = {};
  if (mtmlk_run_schedule(&s, nullptr, &reason) != MTMLK_CUDA_OK) {
    fprintf(stderr, "%s\n", reason.text);
    return 3;
  }
  printf("{\"bits\": \"%016llx\"}\n", static_cast<unsigned long long>(hash_of(tensors)));
  return 0;
}
