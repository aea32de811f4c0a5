// The end of a run in which a kernel broke a rule of CUDA: what and where, on stderr. Nothing computes on after it.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

namespace mtmlk {
namespace host {

// A line of source: `Place place = here()` as the last argument is the line that calls.
struct Place {
  const char* file;
  int line;
};
inline Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

[[noreturn]] inline void fail_with(const char* format, va_list values) {
  fputs("CUDA on the CPU: ", stderr);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  abort();
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  fail_with(format, values);
}

// With the line of source that broke the rule.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail_at(Place place, const char* format, ...) {
  fprintf(stderr, "%s:%d: ", place.file, place.line);
  va_list values;
  va_start(values, format);
  fail_with(format, values);
}

}  // namespace host
}  // namespace mtmlk
