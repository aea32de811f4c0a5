// All kernels of these tests in one program: `program CASE`.
#if !defined(__CUDACC__)
#include <thread>
#endif

#include "blocks.cu"
#include "clusters.cu"
#include "copies.cu"
#include "faults.cu"
#include "overlaps.cu"
#include "products.cu"
#include "warps.cu"

// Two threads of the host launch at once, each in an order of its own.
static void side_by_side() {
#if !defined(__CUDACC__)
  Buffer<float> x(128), y(2 * 128);
  x.draw(11);
  const auto half = [&](int order) {
    host::set_order(order);
    for (int i = 0; i < (host::kTsan ? 2 : 100); ++i) launch(rotate<true>, {1, 128}, x.data(), y.data() + order * 128);
  };
  std::thread first(half, 0), second(half, 1);
  first.join(), second.join();
  report(y, [&](size_t i) { return x[(i % 128 + 33) % 128]; });
#endif
}

static const Case kCases[] = {
    {"rotation", rotation<true>},
    {"rotation_without_barrier", rotation<false>},
    {"reduction", reduction},
    {"carving", carving},
    {"indices", indices},
    {"histogram", histogram},
    {"last_block", last_block<true>},
    {"last_block_without_fence", last_block<false>},
    {"barrier_time", barrier_time},
    {"blocks_race", blocks_race},
    {"pairs", pairs_right},
    {"pairs_without_barrier", pairs_without_barrier},
    {"pairs_by_shuffle", pairs_by_shuffle},
    {"shuffles", shuffles},
    {"groups", groups},
    {"drawn_groups", drawn_groups},
    {"copies", copies_right},
    {"copies_at_once", copies_at_once},
    {"copies_without_wait", copies_without_wait},
    {"copies_too_early", copies_too_early},
    {"clusters", clusters_right},
    {"clusters_named", clusters_named},
    {"clusters_without_first", clusters_without_first},
    {"clusters_without_last", clusters_without_last},
    {"overlaps", overlaps_right},
    {"overlaps_without_wait", overlaps_without_wait},
    {"overlaps_copied_early", overlaps_copied_early},
    {"tf32", tf32},
    {"tf32_thrice", tf32_thrice},
    {"side_by_side", side_by_side},
    {"divergent_block", broken<divergent_block>},
    {"divergent_warp", broken<divergent_warp>},
    {"lost_block", broken<lost_block>},
    {"lane_not_in_mask", broken<lane_not_in_mask>},
    {"lane_gone", broken<lane_gone>},
    {"wrong_warp", wrong_warp},
    {"shuffle_out", shuffle_out},
    {"overrun_between", overrun_between},
    {"overrun_past", overrun_past},
    {"overrun_name", overrun_name},
    {"carve_too_much", broken<carve_too_much>},
    {"carve_differently", broken<carve_differently>},
    {"misaligned", misaligned},
    {"not_shared", not_shared},
    {"no_such_peer", broken<no_such_peer>},
    {"peer_gone", broken<peer_gone>},
    {"refusals", refusals},
};

int main(int count, char** arguments) {
  for (const Case& c : kCases)
    if (count == 2 && strcmp(c.name, arguments[1]) == 0) {
      c.run();
      return 0;
    }
  fprintf(stderr, "expected the name of a case\n");
  return 2;
}
