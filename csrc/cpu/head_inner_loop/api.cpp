// The C ABI of a linear head's inner loop.
#include "mtml/abi.h"
#include "mtml/program.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "runtime/labels.h"
#include "isa/dispatch.h"

using namespace mtmlk;

extern "C" {

int mtmlk_head_loop(const MtmlkHeadCall* given, MtmlkError* error) {
  MtmlkHeadCall call = *given;
  if (call.tasks == 0) return MTMLK_OK;
  if (call.support_loss.kind == kCrossEntropy &&
      !labels_ok(call.support_y, call.tasks, call.support, call.classes, false, error))
    return MTMLK_BAD_LABEL;
  if (call.query_loss.kind == kCrossEntropy &&
      !labels_ok(call.query_y, call.tasks, call.query, call.classes, true, error))
    return MTMLK_BAD_LABEL;
  const TypedKernels& k = kernels_of(call.dtype);
  Watch watch = start_watch();
  const Workspace workspace(k.head_loop_bytes(call), &watch);
  if (!workspace.data()) return workspace.status();
  k.head_loop(call, workspace.data(), &watch);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

int mtmlk_head_chain(const MtmlkHeadCall* given) {
  MtmlkHeadCall call = *given;
  const TypedKernels& k = kernels_of(call.dtype);
  Watch watch = start_watch();
  const Workspace workspace(k.head_chain_bytes(call), &watch);
  if (!workspace.data()) return workspace.status();
  k.head_chain(call, workspace.data(), &watch);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

}  // extern "C"
