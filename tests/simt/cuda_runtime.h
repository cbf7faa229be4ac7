// Runs the kernels of a CUDA source on the CPU, so that tests can check their results on a machine without a GPU.
//
// The blocks of a grid run one after the other.  Each thread of a block is a fiber with a stack of its own.  It runs until it
// reaches a barrier or a shuffle, and continues when all threads of the block (or of its warp) have reached it or have ended.
// A warp runs as far as it can before the next warp starts; the order of the warps, and of the threads in a warp, is random.
// A kernel that reads what another thread writes without a barrier in between therefore gives a wrong result, and a kernel
// whose threads wait for each other forever gives an error instead of hanging.
//
// `kernel<<<grid, block, 0, stream>>>(arguments)` is not C++: tests/test_cuda_source.py replaces it by `simt::launch(...)`,
// and changes nothing else.  Only what csrc/pair_loss.cu uses is implemented: one-dimensional grids and blocks, static shared
// memory, barriers, and shuffles of whole warps.  Speed, alignment and races between blocks cannot be tested this way.
#pragma once
#include <math.h>  // like nvcc: sqrt(float) is a float
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(threads)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;

enum Place { kRunning, kAtShuffle, kAtBarrier, kEnded };

struct Fiber {
  ucontext_t context;
  Place place;
  unsigned distance;        // of the shuffle that it waits at
  uint64_t sent, received;  // by that shuffle
};

inline Fiber fibers[kMostThreads];
alignas(16) inline char stacks[kMostThreads][1 << 16];
inline ucontext_t scheduler;
inline void (*run_thread)(const void* arguments);
inline const void* thread_arguments;
inline uint32_t random_state = 1;
inline cudaError_t last_error = cudaSuccess;

// Switches from the running fiber to the scheduler; returns when the fiber may continue.
inline void wait_at(Place place) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.place = place;
  swapcontext(&fiber.context, &scheduler);
}

inline void fiber_main() {
  run_thread(thread_arguments);
  wait_at(kEnded);
}

inline void start_fiber(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.place = kRunning;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks[thread];
  fiber.context.uc_stack.ss_size = sizeof stacks[thread];
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// The numbers 0 ... count - 1 in random order.
struct Order {
  unsigned numbers[kMostThreads], count;
  explicit Order(unsigned count) : count(count) {
    for (unsigned i = 0; i < count; ++i) {
      random_state = random_state * 1664525u + 1013904223u;
      const unsigned other = (random_state >> 16) % (i + 1);
      numbers[i] = numbers[other];
      numbers[other] = i;
    }
  }
  const unsigned* begin() const { return numbers; }
  const unsigned* end() const { return numbers + count; }
};

// Whether each of the threads [first, last) is at `place` or has ended.
inline bool all_at(Place place, unsigned first, unsigned last) {
  for (unsigned thread = first; thread < last; ++thread)
    if (fibers[thread].place != place && fibers[thread].place != kEnded) return false;
  return true;
}

// Lets the threads [first, last) go on if they have met at `place`; false if there was none to go on.
inline bool release(Place place, unsigned first, unsigned last) {
  bool any = false;
  if (!all_at(place, first, last)) return any;
  for (unsigned thread = first; thread < last; ++thread) {
    Fiber& fiber = fibers[thread];
    if (fiber.place == kEnded) continue;
    fiber.received = thread + fiber.distance < last ? fibers[thread + fiber.distance].sent : fiber.sent;
    fiber.place = kRunning;
    any = true;
  }
  return any;
}

// Until each of its threads waits at a barrier or has ended, or they wait for each other.
inline void run_warp(unsigned first, unsigned last) {
  do {
    for (const unsigned lane : Order(last - first)) {
      threadIdx.x = first + lane;
      if (fibers[threadIdx.x].place == kRunning) swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
  } while (release(kAtShuffle, first, last));
}

// False if threads wait for each other.
inline bool run_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) start_fiber(thread);
  do {
    for (const unsigned warp : Order(threads / kWarp)) run_warp(warp * kWarp, (warp + 1) * kWarp);
  } while (release(kAtBarrier, 0, threads));
  return all_at(kEnded, 0, threads);
}

template <typename... Parameters, typename... Arguments>
void launch(unsigned blocks, unsigned threads, int, cudaStream_t, void (*kernel)(Parameters...), Arguments... arguments) {
  if (blocks == 0 || threads == 0 || threads > kMostThreads || threads % kWarp != 0) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const auto thread = [=] { kernel(arguments...); };
  run_thread = [](const void* arguments) { (*static_cast<decltype(thread)*>(arguments))(); };
  thread_arguments = &thread;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    if (!run_block(threads)) last_error = cudaErrorLaunchFailure;
}

}  // namespace simt

inline void __syncthreads() { simt::wait_at(simt::kAtBarrier); }

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  simt::Fiber& fiber = simt::fibers[threadIdx.x];
  std::memcpy(&fiber.sent, &value, sizeof value);
  fiber.distance = distance;
  simt::wait_at(simt::kAtShuffle);
  std::memcpy(&value, &fiber.received, sizeof value);
  return value;
}

inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads of a block wait for each other" : "invalid launch";
}
