// A mapped file that is cut short while several threads read it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "mapped_guard.h"
#include "plain_scan.h"
#include "threads.h"

namespace pyflocality {

// The handler replaces pages that others read, which ThreadSanitizer takes for writes to them.
__attribute__((noinline, no_sanitize("thread"))) inline std::size_t sum_of(
    const std::uint8_t* piece, std::size_t size) {
  std::size_t sum = 0;
  for (std::size_t k = 0; k < size; ++k) sum += piece[k];
  return sum;
}

inline void check_mapped_guard(std::size_t workers) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // More than the handler replaces at a time.
  const std::size_t size = 700 * page, left = 3 * page;
  std::FILE* file = std::tmpfile();
  const std::vector<std::uint8_t> content(size, 1);
  expect(file != nullptr && std::fwrite(content.data(), 1, size, file) == size &&
             std::fflush(file) == 0,
         "guard: no file to map");
  void* mapping = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fileno(file), 0);
  expect(mapping != MAP_FAILED, "guard: the file cannot be mapped");
  const auto address = reinterpret_cast<std::uintptr_t>(mapping);
  const auto* bytes = static_cast<const std::uint8_t*>(mapping);
  {
    MappedGuard guard(address, size), twin(address, size);
    expect(!guard.lost() && bytes[size - 1] == 1, "guard: something is lost beforehand");
    expect(ftruncate(fileno(file), static_cast<off_t>(left)) == 0, "guard: the file stays whole");
    std::atomic<std::size_t> sum{0};
    // From behind: everybody finds the end of the file.
    parallel_for(size / page, workers,
                 [&](std::size_t i) { sum += sum_of(bytes + size - (i + 1) * page, page); });
    expect(sum == left, "guard: what was lost is not zero");
    expect(guard.lost() && twin.lost(), "guard: nothing was noticed");
    guard.release();
    expect(!guard.lost() && twin.lost(), "guard: released, and not");
  }
  {
    const MappedGuard again(address, size);
    expect(!again.lost(), "guard: another one begins with a loss");
  }
  munmap(mapping, size);
  std::fclose(file);
}

}  // namespace pyflocality
