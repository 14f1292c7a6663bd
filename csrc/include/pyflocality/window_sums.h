// Sums over windows along a line, at three additions an element whatever the window. Compiles for
// the host and, under NVCC or NVRTC, for the device.
//
// The line, with zeros before and behind, is cut into blocks of one window. A window then is the
// tail of a block and the head of the next one. All terms are added, none subtracted, so small
// sums keep their digits beside large ones.
#pragma once

#include "pyflocality/pixel.h"

namespace pyflocality {

// The partial sums of one block: in registers where the window is a small constant, else in memory
// at a stride, so that the threads of a warp, a line each, touch neighbouring words.
template <int kWindow>
struct RegisterTails {
  float values[kWindow];
  PYFLOCALITY_HOST_DEVICE float& operator[](int place) { return values[place]; }
};

struct StridedTails {
  float* values;
  int stride;
  PYFLOCALITY_HOST_DEVICE float& operator[](int place) { return values[place * stride]; }
};

// Calls emit(x, sum) for x = 0 .. length - 1 with the sum of the elements x - before ..
// x - before + kWindow - 1 that lie in the line. The call for x may overwrite element x: what is
// read afterwards lies behind it.
//
//   before   elements of the window before its own, 0 .. kWindow - 1
//   element  element(x) for x in [0, length)
//   tails    room for min(kWindow, length) values, for kWindow if kUnrolled
template <int kWindow, bool kUnrolled, typename Element, typename Tails, typename Emit>
PYFLOCALITY_HOST_DEVICE inline void window_sums(int length, int before, const Element& element,
                                                Tails& tails, const Emit& emit) {
  constexpr int kUnroll = kUnrolled ? kWindow : 1;
  const int last = kUnrolled || kWindow < length ? kWindow : length;
  float sum = 0.0f;
#pragma unroll kUnroll
  for (int place = kWindow - 1; place >= 0; --place) {
    const int x = place - before;
    if (x >= 0 && x < length) sum += element(x);
    if (place < last) tails[place] = sum;
  }
  for (int start = 0; start < length; start += kWindow) {
    float head = 0.0f;
    // The next block is stored, element by element, where its tails will stand: a sum may overwrite
    // what they are made of.
#pragma unroll kUnroll
    for (int r = 0; r < kWindow; ++r) {
      if (start + r < length) {
        sum = tails[r];
        if (r > 0) {
          const int x = start + kWindow + r - 1 - before;
          const float next = x < length ? element(x) : 0.0f;
          head += next;
          sum += head;
          tails[r - 1] = next;
        }
        emit(start + r, sum);
      }
    }
    if (start + kWindow < length) {
      const int x = start + 2 * kWindow - 1 - before;
      sum = x < length ? element(x) : 0.0f;
      tails[kWindow - 1] = sum;
#pragma unroll kUnroll
      for (int r = kWindow - 2; r >= 0; --r) {
        sum += tails[r];
        tails[r] = sum;
      }
    }
  }
}

}  // namespace pyflocality
