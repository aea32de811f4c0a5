// See team.h.
//
// A call publishes its job at a place of a board; the team's threads look there for pieces. All that changes of a job
// while it runs is one word, so that to take a piece is one compare-and-swap, which fails for who has read an older
// job. Places are never freed: a thread may look at one whose job has ended. Pieces may have pieces of their own: who
// waits there waits for deeper ones only, so somebody always goes on.
#include "runtime/team.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "runtime/sleep.h"

namespace mtmlk {
namespace {

constexpr int kPlaces = 64;  // jobs at once; who finds no place works alone
constexpr int kMostThreads = 1000;
constexpr int kShares = 16;    // pieces a thread, where there are as many: the last ones are waited for
constexpr int kLooks = 256;    // of a thread with nothing to do before it sleeps: 4 us
constexpr int kAskAgain = 50;  // ms after which a waiting caller asks whether it is to stop

// The word: pieces given out (16 bits), helpers at work (10), slots given (10), number of the job (28). A helper at
// work has a piece, always.
constexpr uint64_t kPiece = 1, kHelper = kPiece << 16, kSlot = kHelper << 10, kJob = kSlot << 10;
constexpr uint64_t kNoJob = kHelper - kPiece;  // more pieces given out than a job has

constexpr int64_t given_out(uint64_t word) { return int64_t(word % kHelper); }
constexpr int helpers(uint64_t word) { return int(word % kSlot / kHelper); }
constexpr int slots(uint64_t word) { return int(word % kJob / kSlot); }

// Atomic, for a thread reads a job that may end meanwhile; what it has read counts once its compare-and-swap succeeds.
template <class T>
struct Field {
  std::atomic<T> value{};
  operator T() const { return value.load(std::memory_order_relaxed); }
  void operator=(T v) { value.store(v, std::memory_order_relaxed); }
};

struct alignas(128) Place {
  std::atomic<uint64_t> word{kNoJob};
  Field<int64_t> n, size, count;  // of the work; of a piece; of pieces
  Field<int> threads;
  Field<Pieces> pieces;
  Field<const void*> body;
  std::atomic<bool> taken{false};
  alignas(128) std::atomic<uint32_t> left{0};  // how often the last helper has: what a caller sleeps on
  std::atomic<bool> waits{false};              // whether it does

  void run(int64_t piece, int slot) const {
    const int64_t first = piece * size, last = first + size;
    const Pieces call = pieces;
    call(body, first, last < n ? last : int64_t(n), slot);
  }
};

struct Team {
  Place places[kPlaces];
  std::atomic<int> used{0};            // places that have had a job
  std::atomic<uint32_t> published{0};  // jobs: what threads with nothing to do sleep on
  std::atomic<int> asleep{0};
  std::atomic<int> wanted{0};  // helpers, of all callers together
  std::atomic<int> started{0};
  std::mutex starting;
};

std::atomic<Team*> current{new Team};  // never destroyed: its threads sleep on it as the process ends

// A forked child has none of the threads, and jobs that nobody would end.
const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(new Team); });

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Two, each of which wakes two more once it has found work: nobody wakes them all in turn.
void wake_some(Team& team, int64_t useful) {
  if (useful > 0 && team.asleep.load() > 0) wake(team.published, useful < 2 ? 1 : 2);
}

// The next piece, for the caller or for a helper that has had one. False: all are given out.
bool take(Place& place, uint64_t* word) {
  const int64_t count = place.count;
  *word = place.word.load(std::memory_order_acquire);
  while (given_out(*word) < count)
    if (place.word.compare_exchange_weak(*word, *word + kPiece, std::memory_order_acq_rel)) return true;
  return false;
}

// The first piece, and with it a slot. False: there is no work for another thread.
bool join(Place& place, uint64_t* word) {
  *word = place.word.load(std::memory_order_acquire);
  while (given_out(*word) < place.count && slots(*word) < place.threads)
    if (place.word.compare_exchange_weak(*word, *word + kPiece + kHelper + kSlot, std::memory_order_acq_rel))
      return true;
  return false;
}

bool help(Team& team, Place& place) {
  uint64_t word;
  if (!join(place, &word)) return false;
  const int slot = slots(word);
  const int64_t left = place.count - given_out(word) - 1, threads = place.threads - slot - 1;
  wake_some(team, left < threads ? left : threads);
  do place.run(given_out(word), slot);
  while (take(place, &word));
  if (helpers(place.word.fetch_sub(kHelper)) > 1) return true;
  place.left.fetch_add(1);
  if (place.waits.load()) wake(place.left, 1);
  return true;
}

bool help_anywhere(Team& team) {
  const int used = team.used.load(std::memory_order_acquire);
  bool helped = false;
  for (int i = 0; i < used; ++i) helped |= help(team, team.places[i]);
  return helped;
}

void* work(void* given) {
  Team& team = *static_cast<Team*>(given);
  for (;;) {
    const uint32_t seen = team.published.load();
    if (help_anywhere(team)) continue;
    int looks = 0;
    for (; looks < kLooks && team.published.load(std::memory_order_relaxed) == seen; ++looks) pause();
    if (looks < kLooks) continue;
    team.asleep.fetch_add(1);
    sleep_while(team.published, seen, -1);
    team.asleep.fetch_sub(1);
  }
  return nullptr;
}

// Signals are for the threads of the program.
bool start_thread(Team& team) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  const bool started = pthread_create(&thread, nullptr, work, &team) == 0;
  if (started) pthread_detach(thread);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

// As many as a call wants, and for calls side by side as many as there are cores. Where the system gives none, those
// that there are do the work.
void start_threads(Team& team, int threads) {
  static const int cores = int(std::thread::hardware_concurrency());
  const int most = (threads > cores ? threads : cores) - 1, wanted = team.wanted.load(std::memory_order_relaxed);
  const int enough = wanted < most ? wanted : most;
  if (team.started.load(std::memory_order_relaxed) >= enough) return;
  const std::lock_guard<std::mutex> hold(team.starting);
  while (team.started.load(std::memory_order_relaxed) < enough && start_thread(team)) team.started.fetch_add(1);
}

Place* take_place(Team& team) {
  for (int i = 0; i < kPlaces; ++i) {
    Place& place = team.places[i];
    if (place.taken.load(std::memory_order_relaxed) || place.taken.exchange(true, std::memory_order_acquire)) continue;
    for (int used = team.used.load(); used <= i && !team.used.compare_exchange_weak(used, i + 1);) continue;
    return &place;
  }
  return nullptr;
}

void wait_for_helpers(Place& place, Watch* watch) {
  const auto at_work = [&] { return helpers(place.word.load()) > 0; };
  for (int looks = 0; looks < kLooks; ++looks, pause())
    if (!at_work()) return;
  while (at_work()) {
    const uint32_t seen = place.left.load();
    place.waits.store(true);
    if (at_work()) sleep_while(place.left, seen, kAskAgain);
    place.waits.store(false);
    if (watch) ask_caller(watch);
  }
}

void run_job(Team& team, Place& place, Watch* watch) {
  const uint64_t job = (place.word.load(std::memory_order_relaxed) / kJob + 1) * kJob;
  uint64_t word = job + kSlot;
  place.word.store(word);
  team.published.fetch_add(1);
  const int64_t others = place.count - 1, threads = place.threads - 1;
  wake_some(team, others < threads ? others : threads);
  while (take(place, &word)) place.run(given_out(word), 0);
  wait_for_helpers(place, watch);
  // Before the next job's number of pieces is there, of which an old word would seem to have some left.
  place.word.store(job + kNoJob);
}

}  // namespace

void run_on_team(int threads, int64_t n, Pieces pieces, const void* body, Watch* watch) {
  (void)registered;
  Team& team = *current.load(std::memory_order_acquire);
  Place* place = take_place(team);
  if (!place) return pieces(body, 0, n, 0);
  threads = threads < kMostThreads ? threads : kMostThreads;
  const int64_t size = n / (int64_t(kShares) * threads);  // at most 2 kShares kMostThreads pieces: their number fits
  place->n = n, place->size = size > 1 ? size : 1, place->count = (n + place->size - 1) / place->size;
  place->threads = threads, place->pieces = pieces, place->body = body;
  team.wanted.fetch_add(threads - 1);
  start_threads(team, threads);
  run_job(team, *place, watch);
  team.wanted.fetch_sub(threads - 1);
  place->taken.store(false, std::memory_order_release);
}

}  // namespace mtmlk
