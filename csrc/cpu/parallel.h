// Splits a range of work over the threads of the process's OpenMP runtime, or over threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vjepa {

// GOMP_parallel of the OpenMP runtime that the process computes with: its threads spin for a while after each of its
// own loops, and others on the same processors would wait for them.
using Team = void (*)(void (*run)(void *), void *data, unsigned threads, unsigned flags);
inline std::atomic<Team> team{nullptr};

// More pieces than threads, so that one whose processor does something else in between does not hold up the others.
constexpr int64_t kPiecesPerThread = 4;

// Calls work(first, last), which must not throw, on contiguous pieces of [0, total) of at least `minimum` items, on at
// most `threads` threads, the calling one included. Who does which piece is left to chance: work must not depend on it.
// Own threads are not kept: a pool would not survive a fork (data loader workers), and starting one costs tens of
// microseconds, nothing beside the megabytes of `minimum` work items that each gets.
template <class Work>
void parallel_for(int64_t total, int64_t minimum, int32_t threads, const Work &work) {
  const int64_t useful = std::max<int64_t>(1, total / std::max<int64_t>(1, minimum));
  const int64_t pieces = std::min<int64_t>(threads * kPiecesPerThread, useful);
  if (threads == 1 || pieces == 1) return work(int64_t{0}, total);
  std::atomic<int64_t> next{0};
  const auto take_pieces = [&] {
    const auto boundary = [&](int64_t piece) { return total / pieces * piece + std::min(piece, total % pieces); };
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      work(boundary(piece), boundary(piece + 1));
    }
  };
  if (const Team run_team = team.load(std::memory_order_relaxed)) {
    // All threads, also for few pieces: asked for fewer, the runtime would end the others and start them again later.
    const auto member = [](void *data) { (*static_cast<decltype(take_pieces) *>(data))(); };
    return run_team(member, const_cast<void *>(static_cast<const void *>(&take_pieces)), threads, 0);
  }
  std::vector<std::thread> workers;
  const int64_t helpers = std::min<int64_t>(threads, pieces) - 1;
  workers.reserve(static_cast<size_t>(helpers));
  try {
    for (int64_t helper = 0; helper < helpers; ++helper) workers.emplace_back(take_pieces);
  } catch (const std::system_error &) {
    // The system has no more threads to give: those that there are, and the calling one, take all pieces.
  }
  take_pieces();
  for (std::thread &worker : workers) worker.join();
}

template <class Tensor>
int64_t total_numel(const Tensor *tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += tensors[k].numel;
  return total;
}

// Calls work(k, begin, end) on pieces of `count` tensors, taken as one run of elements.
template <class Tensor, class Work>
void parallel_for_tensors(const Tensor *tensors, int64_t count, int64_t minimum, int32_t threads, const Work &work) {
  std::vector<int64_t> offsets(static_cast<size_t>(count) + 1, 0);
  for (int64_t k = 0; k < count; ++k) offsets[k + 1] = offsets[k] + tensors[k].numel;
  parallel_for(offsets[count], minimum, threads, [&](int64_t first, int64_t last) {
    int64_t k = std::upper_bound(offsets.begin(), offsets.end(), first) - offsets.begin() - 1;
    for (; k < count && offsets[k] < last; ++k) {
      work(k, std::max<int64_t>(first - offsets[k], 0), std::min(last - offsets[k], tensors[k].numel));
    }
  });
}

}  // namespace vjepa
