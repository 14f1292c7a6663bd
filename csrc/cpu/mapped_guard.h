// Reads of a mapped file that is cut short, or whose disk fails, while it is being read.
//
// The system answers such a read with SIGBUS, which ends the process. While a guard is alive, pages
// of its mapping that cannot be read are replaced by zeros instead, and the guard says so: whatever
// was computed meanwhile is of no use. SIGBUS from anywhere else goes to the handler that was there
// before, and that handler is back once the last guard is gone.
//
// Guards are made and released by one thread at a time, such as that with the interpreter's lock.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyflocality {

struct GuardedRegion;

class MappedGuard {
 public:
  // Guards a mapping of `size` bytes, which has to outlive the guard.
  MappedGuard(std::uintptr_t address, std::size_t size);
  ~MappedGuard() { release(); }
  MappedGuard(const MappedGuard&) = delete;
  MappedGuard& operator=(const MappedGuard&) = delete;

  // Whether something could not be read since the first of the guards began that the mapping has;
  // asked before the guard is released.
  bool lost() const;
  // Ends the guard; further calls do nothing.
  void release();

 private:
  GuardedRegion* region_;
};

}  // namespace pyflocality
