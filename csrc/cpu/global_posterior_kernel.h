// One compilation of the global posterior, for the instruction set around it.

// Images whose distances are formed together, and noisy images that share their reads.
constexpr int kGroupImages = kLanes == 16 ? 3 : 2;
constexpr int kGroupQueries = kLanes == 16 ? 8 : 4;

inline float sum_of_lanes(Vec a) {
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  float sum = 0.0f;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// Images are read where they lie, values side by side in the lanes.
template <typename Stored>
class GlobalScan {
 public:
  GlobalScan(const Stored* images, std::size_t dim, const Segments& segments,
             const NoisyBatch& batch, const Checkpoint& checkpoint)
      : images_(images), dim_(dim), segments_(segments), batch_(batch), checkpoint_(checkpoint) {}

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch, dim_,
        [&] { return std::make_unique<Scratch>(dim_, batch_.batch); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return batch_.scale[q]; });
  }

 private:
  static constexpr std::size_t kBlock = 48;  // images between two looks at the minimum

  struct Scratch {
    Scratch(std::size_t dim, std::size_t batch)
        : distance(batch * kBlock), minimum(batch), total(batch), weighted(batch * dim) {}
    AlignedArray<float> distance, minimum;
    AlignedArray<double> total;
    AlignedArray<float> weighted;
  };

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), batch_.batch, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.total.data(), batch_.batch, 0.0);
    std::fill_n(scratch.weighted.data(), batch_.batch * dim_, 0.0f);
    for (std::size_t image = first; image < last; image += kBlock) {
      checkpoint_();
      const std::size_t count = std::min(kBlock, last - image);
      const Stored* block = images_ + image * dim_;
      measure(block, count, scratch.distance.data());
      for (std::size_t b = 0; b < batch_.batch; ++b) take_in_block(b, block, count, scratch);
    }
    for (std::size_t b = 0; b < batch_.batch; ++b) {
      state.minimum[b] = scratch.minimum.data()[b];
      state.total[b] = scratch.total.data()[b];
    }
    std::copy_n(scratch.weighted.data(), batch_.batch * dim_, state.weighted.begin());
  }

  void measure(const Stored* block, std::size_t count, float* distance) const {
    for (std::size_t i = 0; i < count; i += kGroupImages) {
      const bool whole = i + kGroupImages <= count;
      for (std::size_t b = 0; b < batch_.batch; b += kGroupQueries) {
        if (whole && b + kGroupQueries <= batch_.batch) {
          measure_group<kGroupImages, kGroupQueries>(block, i, b, distance);
          continue;
        }
        for (std::size_t image = i; image < std::min(i + kGroupImages, count); ++image) {
          for (std::size_t q = b; q < std::min(b + kGroupQueries, batch_.batch); ++q) {
            measure_group<1, 1>(block, image, q, distance);
          }
        }
      }
    }
  }

  // The same additions in the same order whatever the group.
  template <int kImages, int kQueries>
  void measure_group(const Stored* block, std::size_t image, std::size_t query,
                     float* distance) const {
    Vec sums[kQueries][kImages];
#pragma GCC unroll 8
    for (int b = 0; b < kQueries; ++b) {
#pragma GCC unroll 8
      for (int i = 0; i < kImages; ++i) sums[b][i] = zero();
    }
    const Stored* values = block + image * dim_;
    const float* noisy = batch_.noisy + query * dim_;
    const std::size_t whole = dim_ / kLanes * kLanes;
    for (std::size_t d = 0; d < whole; d += kLanes) {
      Vec value[kImages];
#pragma GCC unroll 8
      for (int i = 0; i < kImages; ++i) value[i] = load(values + i * dim_ + d);
#pragma GCC unroll 8
      for (int b = 0; b < kQueries; ++b) {
        const Vec target = load(noisy + b * dim_ + d);
#pragma GCC unroll 8
        for (int i = 0; i < kImages; ++i) {
          const Vec gap = sub(target, value[i]);
          sums[b][i] = multiply_add(gap, gap, sums[b][i]);
        }
      }
    }
    for (int b = 0; b < kQueries; ++b) {
      for (int i = 0; i < kImages; ++i) {
        float sum = sum_of_lanes(sums[b][i]);
        for (std::size_t d = whole; d < dim_; ++d) {
          const float gap = noisy[b * dim_ + d] - static_cast<float>(values[i * dim_ + d]);
          sum += gap * gap;
        }
        distance[(query + b) * kBlock + image + i] = sum;
      }
    }
  }

  void take_in_block(std::size_t b, const Stored* block, std::size_t count,
                     Scratch& scratch) const {
    const float* distance = scratch.distance.data() + b * kBlock;
    float& minimum = scratch.minimum.data()[b];
    float* weighted = scratch.weighted.data() + b * dim_;
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    const float lowest = *std::min_element(distance, distance + count);
    // Equal distances count even where adding the reach rounds away.
    if (!(lowest <= minimum + reach)) return;
    if (lowest < minimum) {
      const float decay = exp2_of_negative((lowest - minimum) * scale);
      scratch.total.data()[b] *= decay;
      for (std::size_t d = 0; d < dim_; ++d) weighted[d] *= decay;
      minimum = lowest;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (!(distance[i] <= minimum + reach)) continue;
      const float weight = exp2_of_negative((minimum - distance[i]) * scale);
      scratch.total.data()[b] += weight;
      add_weighted(block + i * dim_, weight, weighted);
    }
  }

  void add_weighted(const Stored* values, float weight, float* weighted) const {
    const std::size_t whole = dim_ / kLanes * kLanes;
    const Vec factor = broadcast(weight);
    for (std::size_t d = 0; d < whole; d += kLanes) {
      store(weighted + d, multiply_add(factor, load(values + d), load(weighted + d)));
    }
    for (std::size_t d = whole; d < dim_; ++d) {
      weighted[d] += weight * static_cast<float>(values[d]);
    }
  }

  const Stored* images_;
  const std::size_t dim_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void global_posterior(const Stored* images, std::size_t count, std::size_t dim,
                      const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                      const Checkpoint& checkpoint) {
  const Segments segments(count, 48);
  copy_state(GlobalScan<Stored>(images, dim, segments, batch, checkpoint).run(threads), result);
}
