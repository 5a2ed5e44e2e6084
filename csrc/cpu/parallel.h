// Splits a range of work over threads that live for one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vjepa {

// Calls work(first, last) on contiguous pieces of [0, total), one piece per thread, the calling thread included.
// Threads are not kept: a pool would not survive a fork (data loader workers), and starting one costs tens of
// microseconds, nothing beside the megabytes of `minimum` work items that each gets.
template <class Work>
void parallel_for(int64_t total, int64_t minimum, int32_t threads, const Work &work) {
  const int64_t useful = std::max<int64_t>(1, total / std::max<int64_t>(1, minimum));
  const int64_t pieces = std::min<int64_t>(threads, useful);
  const auto boundary = [total, pieces](int64_t piece) {
    return total / pieces * piece + std::min(piece, total % pieces);
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(pieces - 1));
  int64_t piece = 1;
  try {
    for (; piece < pieces; ++piece) workers.emplace_back(work, boundary(piece), boundary(piece + 1));
  } catch (const std::system_error &) {
    // The system has no more threads to give: the calling thread does the pieces that got none.
    work(boundary(piece), total);
  }
  work(boundary(0), boundary(1));
  for (std::thread &worker : workers) worker.join();
}

}  // namespace vjepa
