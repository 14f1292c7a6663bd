// Runs a CUDA kernel on the host, for tests: compile the kernel's source as C++ after this header.
//
// The threads of a block are fibres. One runs until it meets a barrier or ends, then the next;
// when all have met the barrier, the round starts again. The order of the threads within a round
// is the caller's choice: a kernel that lacks a barrier gives results that depend on it. Shared
// memory starts as NaN, and what lies behind it is checked to be untouched. Covers what the
// kernels use: one-dimensional blocks, dynamic shared memory, __syncthreads.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};

namespace simulator {

constexpr std::size_t kSharedFloats = 1 << 16, kGuardFloats = 64;
constexpr float kGuard = 123456.0f;

inline dim3 thread_index, block_index, grid_size;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = true;
};

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline const std::function<void()>* body;
inline std::size_t current;

inline void enter() {
  (*body)();
  fibres[current].finished = true;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void barrier() {
  const dim3 index = thread_index;
  swapcontext(&fibres[current].context, &scheduler);
  thread_index = index;
}

// Order 0 runs the threads of a round upwards, 1 downwards, any other in a fixed shuffle.
inline std::size_t nth_thread(std::size_t n, std::size_t threads, int order) {
  if (order == 0) return n;
  if (order == 1) return threads - 1 - n;
  // 7919 is prime and no block has as many threads: a permutation.
  return (n * 7919 + 13) % threads;
}

inline void run_block(std::size_t threads, int order) {
  constexpr std::size_t kStack = 64 * 1024;
  if (fibres.size() < threads) fibres.resize(threads);
  for (std::size_t t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    fibre.finished = false;
  }
  for (;;) {
    std::size_t waiting = 0;
    for (std::size_t n = 0; n < threads; ++n) {
      current = nth_thread(n, threads, order);
      thread_index = {static_cast<unsigned>(current), 0, 0};
      swapcontext(&scheduler, &fibres[current].context);
      waiting += !fibres[current].finished;
    }
    if (waiting == 0) return;
    if (waiting != threads) {
      std::fprintf(stderr, "a barrier was met by %zu of %zu threads\n", waiting, threads);
      std::abort();
    }
  }
}

// Arguments by address, as the driver takes them.
template <typename... Args, std::size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}

template <typename... Args>
int launch(void (*kernel)(Args...), float* shared, const unsigned* grid, unsigned threads,
           std::size_t shared_bytes, int order, void** args) {
  if (shared_bytes > kSharedFloats * sizeof(float)) return 1;
  const std::size_t floats = shared_bytes / sizeof(float);
  const std::function<void()> run = [&] { call(kernel, args, std::index_sequence_for<Args...>()); };
  body = &run;
  grid_size = {grid[0], grid[1], grid[2]};
  for (unsigned z = 0; z < grid[2]; ++z) {
    for (unsigned y = 0; y < grid[1]; ++y) {
      for (unsigned x = 0; x < grid[0]; ++x) {
        block_index = {x, y, z};
        for (std::size_t i = 0; i < floats; ++i)
          shared[i] = std::numeric_limits<float>::quiet_NaN();
        for (std::size_t i = 0; i < kGuardFloats; ++i) shared[floats + i] = kGuard;
        run_block(threads, order);
        for (std::size_t i = 0; i < kGuardFloats; ++i) {
          if (shared[floats + i] != kGuard) return 2;
        }
      }
    }
  }
  return 0;
}

}  // namespace simulator

#define threadIdx (simulator::thread_index)
#define blockIdx (simulator::block_index)
#define gridDim (simulator::grid_size)
#define __syncthreads() simulator::barrier()

alignas(16) float pyflocality_shared[simulator::kSharedFloats + simulator::kGuardFloats];

#define PYFLOCALITY_SIMULATE(kernel)                                                         \
  extern "C" int simulate_##kernel(const unsigned* grid, unsigned threads,                   \
                                   std::size_t shared_bytes, int order, void** args) {       \
    return simulator::launch(kernel, pyflocality_shared, grid, threads, shared_bytes, order, \
                             args);                                                          \
  }
