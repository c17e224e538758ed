// Runs the kernels of csrc/cuda on the stand-in, over random problems: drive [KERNEL] [SEEDS] [FIRST_SEED]
// Exit status 1 where one fails. The message names the seed: `drive KERNEL 1 SEED` repeats it, in gdb too.
#include <cstdlib>
#include <cstring>

#include "problems.h"
#include "runs.h"

int main(int count, char** arguments) {
  const char* only = count > 1 ? arguments[1] : "all";
  const uint64_t seeds = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 100;
  const uint64_t first = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 1;
  bool good = true, known = false;
  auto all = problems::real_kernels();
  all.push_back({"runs_of_tiles", problems::runs<false>});
  all.push_back({"runs_of_spans", problems::runs<true>});
  for (const auto& problem : all) {
    if (std::strcmp(only, "all") != 0 && std::strcmp(only, problem.name) != 0) continue;
    known = true;
    good = problems::passes(problem, first, seeds, true) && good;
  }
  if (!known) {
    std::fprintf(stderr, "drive: no kernel %s\n", only);
    return 2;
  }
  return good ? 0 : 1;
}
