#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace pyflocality {

// Memory on a cache line boundary, uninitialised.
template <typename T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(std::size_t size)
      : data_(static_cast<T*>(
            ::operator new[](std::max<std::size_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Release> data_;
};

}  // namespace pyflocality
