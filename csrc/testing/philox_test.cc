// Checks Philox in parts (a row's, a column's and what remains) against the whole of it, on random
// counters and keys. Prints the number of mistakes; run by tests/test_dropout.py.
#include "common/philox.h"

#include <cstdio>
#include <random>

int main() {
  using namespace jax_flash;
  std::mt19937 random(20261128);
  const auto word = [&] { return static_cast<uint32_t>(random()); };
  constexpr int kCalls = 100000;
  int mistakes = 0;
  for (int i = 0; i < kCalls; ++i) {
    const Philox4 counter = {word(), word(), word(), word()};
    const uint32_t key0 = word(), key1 = word();
    const Philox4 whole = philox(counter, key0, key1);
    const Philox4 parts =
        philox(philox_row(counter.y, counter.z, key0),
               philox_column(counter.x, counter.z, counter.w, key0, key1), philox_keys(key0, key1));
    mistakes +=
        whole.x != parts.x || whole.y != parts.y || whole.z != parts.z || whole.w != parts.w;
  }
  std::printf("%d mistakes in %d calls\n", mistakes, kCalls);
  return mistakes != 0;
}
