// Fork and join over independent pieces of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pyflocality {

// Calls body(i) once for every i in [0, count), on at most `threads` threads of which the caller
// is one. Pieces are handed out in order as threads become free, so no piece may depend on which
// thread runs it. The first exception stops the hand-out and is rethrown after the join.
template <typename Body>
void parallel_for(std::size_t count, std::size_t threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;

  const auto work = [&] {
    try {
      for (std::size_t i; (i = next.fetch_add(1)) < count;) body(i);
    } catch (...) {
      next.store(count);
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };

  std::vector<std::thread> helpers;
  helpers.reserve(std::min(threads, count));
  try {
    while (helpers.size() + 1 < std::min(threads, count)) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system grants no more threads: those there are do all the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pyflocality
