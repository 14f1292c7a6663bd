#include "mapped_guard.h"

#include <algorithm>
#include <atomic>

#if !defined(_WIN32)
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace pyflocality {

// A guarded mapping, [first, last). The handler reads them in a list that only grows, so that no
// thread ever frees what another one's handler looks at; a region without users is used again.
struct GuardedRegion {
  std::atomic<std::uintptr_t> first{UINTPTR_MAX}, last{0};
  std::atomic<bool> lost{false};
  std::size_t users = 0;
  GuardedRegion* next = nullptr;
};

#if defined(_WIN32)

// There are no such signals, and a file cannot be cut short while it is mapped.
MappedGuard::MappedGuard(std::uintptr_t, std::size_t) : region_(nullptr) {}
bool MappedGuard::lost() const { return false; }
void MappedGuard::release() {}

#else

namespace {

static_assert(std::atomic<std::uintptr_t>::is_always_lock_free, "read by a signal handler");

// Zeros go under this many bytes at a time: a signal for each page would take long.
constexpr std::uintptr_t kReplacedBytes = std::uintptr_t{2} << 20;

std::atomic<GuardedRegion*> regions{nullptr};
std::uintptr_t page_size = 0;
std::size_t active = 0;

// Handlers of ours that are in place, each with the one that was there before it. Who installs a
// handler of his own on top of ours may come back to ours: it has to stay as it is, and the next
// one goes on top of his.
constexpr int kHandlers = 4;
struct sigaction previous[kHandlers];
bool installed[kHandlers];

// Puts zeros under an address of a guarded mapping; false for any other.
bool replace_lost_pages(const siginfo_t* info) {
  // Not what other processes send, nor broken memory.
  if (info->si_code != BUS_ADRERR && info->si_code != BUS_OBJERR) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  GuardedRegion* region = regions.load(std::memory_order_acquire);
  for (; region != nullptr; region = region->next) {
    const std::uintptr_t first = region->first.load(std::memory_order_acquire);
    const std::uintptr_t last = region->last.load(std::memory_order_acquire);
    // Compared again: it may have been given to another mapping in between.
    if (first <= address && address < last && region->first.load() == first) {
      const std::uintptr_t page = address & ~(page_size - 1);
      const std::uintptr_t end = (last + page_size - 1) & ~(page_size - 1);
      region->lost.store(true);
      // A system call and nothing else, which a handler may do.
      return mmap(reinterpret_cast<void*>(page), std::min(kReplacedBytes, end - page),
                  PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                  -1, 0) != MAP_FAILED;
    }
  }
  return false;
}

void pass_on(const struct sigaction& to, int signal, siginfo_t* info, void* context) {
  if ((to.sa_flags & SA_SIGINFO) != 0) {
    to.sa_sigaction(signal, info, context);
    return;
  }
  const bool is_fault = info->si_code > 0;
  // A fault cannot be ignored: the system takes the default then.
  if (to.sa_handler == SIG_DFL || (to.sa_handler == SIG_IGN && is_fault)) {
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    // A fault happens again on return; what was sent has to be sent again.
    if (!is_fault) raise(signal);
  } else if (to.sa_handler != SIG_IGN) {
    to.sa_handler(signal);
  }
}

template <int Index>
void handle(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  if (!replace_lost_pages(info)) pass_on(previous[Index], signal, info, context);
  errno = error;
}

using Handler = void (*)(int, siginfo_t*, void*);
constexpr Handler kOurs[kHandlers] = {&handle<0>, &handle<1>, &handle<2>, &handle<3>};

// Which of ours an action is, or -1.
int index_of(const struct sigaction& action) {
  if ((action.sa_flags & SA_SIGINFO) == 0) return -1;
  const auto* ours = std::find(kOurs, kOurs + kHandlers, action.sa_sigaction);
  return ours == kOurs + kHandlers ? -1 : static_cast<int>(ours - kOurs);
}

void install() {
  struct sigaction current = {};
  sigaction(SIGBUS, nullptr, &current);
  if (index_of(current) >= 0) return;
  const auto* free = std::find(installed, installed + kHandlers, false);
  if (free == installed + kHandlers) return;
  const auto index = static_cast<int>(free - installed);
  struct sigaction action = {};
  action.sa_sigaction = kOurs[index];
  action.sa_mask = current.sa_mask;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | (current.sa_flags & (SA_RESTART | SA_NODEFER));
  previous[index] = current;
  installed[index] = sigaction(SIGBUS, &action, nullptr) == 0;
}

void restore() {
  struct sigaction current = {};
  sigaction(SIGBUS, nullptr, &current);
  const int index = index_of(current);
  // With somebody else's on top, ours stays below it and passes on.
  if (index < 0) return;
  sigaction(SIGBUS, &previous[index], nullptr);
  installed[index] = false;
}

GuardedRegion* region_of(std::uintptr_t address, std::size_t size) {
  GuardedRegion* unused = nullptr;
  for (GuardedRegion* region = regions.load(); region != nullptr; region = region->next) {
    if (region->users > 0 && region->first.load() == address) return region;
    if (region->users == 0) unused = region;
  }
  GuardedRegion* region = unused;
  if (region == nullptr) {
    region = new GuardedRegion;
    region->next = regions.load();
    regions.store(region, std::memory_order_release);
  }
  region->lost.store(false);
  region->last.store(address + size, std::memory_order_release);
  region->first.store(address, std::memory_order_release);
  return region;
}

}  // namespace

MappedGuard::MappedGuard(std::uintptr_t address, std::size_t size)
    : region_(region_of(address, size)) {
  ++region_->users;
  if (active++ == 0) {
    page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    install();
  }
}

bool MappedGuard::lost() const { return region_ != nullptr && region_->lost.load(); }

void MappedGuard::release() {
  if (region_ == nullptr) return;
  if (--region_->users == 0) {
    region_->first.store(UINTPTR_MAX, std::memory_order_release);
    region_->last.store(0, std::memory_order_release);
  }
  region_ = nullptr;
  if (--active == 0) restore();
}

#endif

}  // namespace pyflocality
