// Which instruction set runs here: every feature that a file was compiled for is asked for, and the system must save
// the registers (cpuid's OSXSAVE, which __builtin_cpu_supports checks).
#include "isa/dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <string>

#include "mtml/abi.h"

namespace mtmlk {
namespace {

struct Choice {
  const Kernels* kernels = &kBaseKernels;
  std::string reason, available = "base";
};

#if defined(MTMLK_HAVE_AVX2)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(MTMLK_HAVE_AVX512)
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

Choice choose() {
  Choice choice;
  const Kernels* found[3] = {&kBaseKernels};
  int count = 1;
#if defined(MTMLK_HAVE_AVX2)
  if (cpu_has_avx2()) found[count++] = &kAvx2Kernels, choice.available += ",avx2";
#endif
#if defined(MTMLK_HAVE_AVX512)
  if (cpu_has_avx512()) found[count++] = &kAvx512Kernels, choice.available += ",avx512";
#endif
  choice.kernels = found[count - 1];
  choice.reason = "the widest that was built and that this processor runs";
  const char* wanted = getenv("MTML_CPU_ISA");
  if (!wanted || !*wanted) return choice;
  for (int i = 0; i < count; ++i)
    if (strcmp(found[i]->name, wanted) == 0) {
      choice.kernels = found[i];
      choice.reason = "MTML_CPU_ISA";
      return choice;
    }
  choice.kernels = nullptr;
  choice.reason =
      std::string("MTML_CPU_ISA=") + wanted + " is not available here; expected one of: " + choice.available;
  return choice;
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

bool isa_ok() { return choice().kernels != nullptr; }
const Kernels& kernels() { return choice().kernels ? *choice().kernels : kBaseKernels; }
const TypedKernels& kernels_of(int32_t dtype) { return dtype == MTMLK_F32 ? kernels().f32 : kernels().f64; }
const TaskKernels& task_kernels_of(int32_t dtype) {
  const TaskKernels* found = kBaseTaskKernels;
#if defined(MTMLK_HAVE_AVX2)
  if (&kernels() == &kAvx2Kernels) found = kAvx2TaskKernels;
#endif
#if defined(MTMLK_HAVE_AVX512)
  if (&kernels() == &kAvx512Kernels) found = kAvx512TaskKernels;
#endif
  return found[dtype == MTMLK_F32 ? 0 : 1];
}
const char* isa_reason() { return choice().reason.c_str(); }
const char* isa_available() { return choice().available.c_str(); }

}  // namespace mtmlk

using namespace mtmlk;

extern "C" {

double mtmlk_fma_peak(int32_t dtype, int32_t threads, double seconds) {
  return kernels().fma_peak(dtype, threads, seconds);
}

const char* mtmlk_isa(void) { return isa_ok() ? kernels().name : ""; }
const char* mtmlk_isa_reason(void) { return isa_reason(); }
const char* mtmlk_isa_available(void) { return isa_available(); }

}  // extern "C"
