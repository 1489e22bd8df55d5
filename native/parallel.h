// Work split over threads that live as long as the call. Results must not depend on their number.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace gossamer {

// f(worker, item) for each item in [0, items), on up to `threads` threads.
template <typename F>
void parallel(size_t items, size_t threads, F f) {
  threads = std::max<size_t>(1, std::min(threads, items));
  std::atomic<size_t> next{0};
  auto work = [&](size_t worker) {
    for (size_t i; (i = next.fetch_add(1)) < items;) f(worker, i);
  };
  std::vector<std::thread> pool;
  for (size_t t = 1; t < threads; t++) pool.emplace_back(work, t);
  work(0);
  for (auto& t : pool) t.join();
}

}  // namespace gossamer
