// One compilation of the global posterior with tangents, for the instruction set around it.

// Images, and rows of numbers, whose products are formed together.
constexpr int kGroupImages = kLanes == 16 ? 3 : 2;
constexpr int kGroupRows = 4;

inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline float sub(float a, float b) { return a - b; }

// Terms of squared distances to noisy images: (row - value)^2.
struct SquaredGaps {
  template <typename Number>
  Number value(Number stored, std::size_t) const {
    return stored;
  }
  template <typename Number>
  Number add(Number row, Number value, Number sum) const {
    const Number gap = sub(row, value);
    return multiply_add(gap, gap, sum);
  }
};

// Terms of inner products with tangents: row * (value - centre), the centre being an image.
struct CentredProducts {
  Vec value(Vec stored, std::size_t d) const { return sub(stored, load(centre + d)); }
  float value(float stored, std::size_t d) const { return stored - centre[d]; }
  template <typename Number>
  Number add(Number row, Number value, Number sum) const {
    return multiply_add(row, value, sum);
  }
  const float* centre;
};

// Adds up the terms of kRows rows [dim] and kImages images, kLanes of them at a time:
// sums[row * stride + image]. The same additions in the same order whatever the group.
template <int kImages, int kRows, typename Stored, typename Terms>
inline void sum_terms(const Stored* const* images, const float* rows, std::size_t dim,
                      const Terms& terms, float* sums, std::size_t stride) {
  Vec local[kRows][kImages];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kImages; ++i) local[k][i] = zero();
  }
  const std::size_t whole = dim / kLanes * kLanes;
  for (std::size_t d = 0; d < whole; d += kLanes) {
    Vec value[kImages];
#pragma GCC unroll 8
    for (int i = 0; i < kImages; ++i) value[i] = terms.value(load(images[i] + d), d);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const Vec row = load(rows + k * dim + d);
#pragma GCC unroll 8
      for (int i = 0; i < kImages; ++i) local[k][i] = terms.add(row, value[i], local[k][i]);
    }
  }
  for (int k = 0; k < kRows; ++k) {
    for (int i = 0; i < kImages; ++i) {
      alignas(64) float lanes[kLanes];
      store(lanes, local[k][i]);
      float sum = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
      for (std::size_t d = whole; d < dim; ++d) {
        const float value = terms.value(static_cast<float>(images[i][d]), d);
        sum = terms.add(rows[k * dim + d], value, sum);
      }
      sums[k * stride + i] = sum;
    }
  }
}

// As sum_terms() for any number of images and rows, in groups.
template <typename Stored, typename Terms>
inline void sum_all_terms(const Stored* const* images, std::size_t count, const float* rows,
                          std::size_t row_count, std::size_t dim, const Terms& terms, float* sums,
                          std::size_t stride) {
  std::size_t image = 0;
  for (; image + kGroupImages <= count; image += kGroupImages) {
    std::size_t k = 0;
    for (; k + kGroupRows <= row_count; k += kGroupRows) {
      sum_terms<kGroupImages, kGroupRows>(images + image, rows + k * dim, dim, terms,
                                          sums + k * stride + image, stride);
    }
    for (; k < row_count; ++k) {
      sum_terms<kGroupImages, 1>(images + image, rows + k * dim, dim, terms,
                                 sums + k * stride + image, stride);
    }
  }
  for (; image < count; ++image) {
    for (std::size_t k = 0; k < row_count; ++k) {
      sum_terms<1, 1>(images + image, rows + k * dim, dim, terms, sums + k * stride + image,
                      stride);
    }
  }
}

// Images are read where they lie, values side by side in the lanes.
template <typename Stored>
class GlobalJvpScan {
 public:
  GlobalJvpScan(const Stored* images, std::size_t dim, const Segments& segments,
                const NoisyBatch& batch, const Tangents& tangents, const Checkpoint& checkpoint)
      : images_(images),
        dim_(dim),
        segments_(segments),
        batch_(batch),
        tangents_(tangents),
        sets_(1 + tangents.count),
        checkpoint_(checkpoint) {}

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch, tangents_.sums(dim_),
        [&] { return std::make_unique<Scratch>(dim_, batch_.batch, sets_); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return batch_.scale[q]; }, tangents_.count);
  }

 private:
  static constexpr std::size_t kBlock = 48;  // images between two looks at the minimum

  // What a thread works in. There is a set of sums for the weights of every noisy image, and one
  // for each of its tangents with the weights times c, all counted from its nearest image.
  struct Scratch {
    Scratch(std::size_t dim, std::size_t batch, std::size_t sets)
        : distance(batch * kBlock),
          minimum(batch),
          nearest(batch * dim),
          moved(dim),
          totals(batch * sets),
          weighted(batch * sets * dim),
          factors(sets * kBlock) {}
    AlignedArray<float> distance, minimum, nearest, moved;
    AlignedArray<double> totals;
    AlignedArray<float> weighted;
    AlignedArray<float> factors;      // of the images that matter, by set
    const Stored* block[kBlock];      // images at hand
    const Stored* of_matter[kBlock];  // and those that matter
  };

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), batch_.batch, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), batch_.batch * dim_, 0.0f);
    std::fill_n(scratch.totals.data(), batch_.batch * sets_, 0.0);
    std::fill_n(scratch.weighted.data(), batch_.batch * sets_ * dim_, 0.0f);
    for (std::size_t image = first; image < last; image += kBlock) {
      const std::size_t count = std::min(kBlock, last - image);
      for (std::size_t i = 0; i < count; ++i) scratch.block[i] = images_ + (image + i) * dim_;
      sum_all_terms(scratch.block, count, batch_.noisy, batch_.batch, dim_, SquaredGaps{},
                    scratch.distance.data(), kBlock);
      for (std::size_t b = 0; b < batch_.batch; ++b) {
        checkpoint_();
        take_in_block(b, count, scratch);
      }
    }
    for (std::size_t b = 0; b < batch_.batch; ++b) {
      const double* totals = scratch.totals.data() + b * sets_;
      const float* weighted = scratch.weighted.data() + b * sets_ * dim_;
      double* values = state.weighted.data() + b * tangents_.sums(dim_);
      state.minimum[b] = scratch.minimum.data()[b];
      state.total[b] = totals[0];
      std::copy_n(weighted, dim_, values);
      std::copy_n(totals + 1, tangents_.count, values + dim_);
      std::copy_n(weighted + dim_, tangents_.count * dim_, values + dim_ + tangents_.count);
      const float* nearest = scratch.nearest.data() + b * dim_;
      const float* centre = tangents_.centre + b * dim_;
      count_from_means(
          totals[0], dim_, tangents_.count, values,
          [&](std::size_t d) { return double{nearest[d]} - centre[d]; },
          [&](std::size_t k) {
            const float* tangent = tangents_.tangents + (b * tangents_.count + k) * dim_;
            double sum = 0.0;
            for (std::size_t d = 0; d < dim_; ++d) {
              sum += tangent[d] * (double{nearest[d]} - centre[d]);
            }
            return sum;
          });
    }
  }

  // Counts the sums of a noisy image from another image.
  void count_from(std::size_t b, const Stored* image, Scratch& scratch) const {
    double* totals = scratch.totals.data() + b * sets_;
    float* weighted = scratch.weighted.data() + b * sets_ * dim_;
    float* nearest = scratch.nearest.data() + b * dim_;
    float* moved = scratch.moved.data();
    for (std::size_t d = 0; d < dim_; ++d) {
      moved[d] = nearest[d] - static_cast<float>(image[d]);
      nearest[d] = static_cast<float>(image[d]);
    }
    for (std::size_t k = 0; k < tangents_.count; ++k) {
      const float* tangent = tangents_.tangents + (b * tangents_.count + k) * dim_;
      double inner = 0.0;
      for (std::size_t d = 0; d < dim_; ++d) inner += double{tangent[d]} * moved[d];
      double& total = totals[1 + k];
      float* products = weighted + (1 + k) * dim_;
      const auto step = static_cast<float>(inner);
      const auto plain = static_cast<float>(total + inner * totals[0]);
      for (std::size_t d = 0; d < dim_; ++d) {
        products[d] += step * weighted[d] + plain * moved[d];
      }
      total += inner * totals[0];
    }
    const auto total = static_cast<float>(totals[0]);
    for (std::size_t d = 0; d < dim_; ++d) weighted[d] += total * moved[d];
  }

  void take_in_block(std::size_t b, std::size_t count, Scratch& scratch) const {
    const float* distance = scratch.distance.data() + b * kBlock;
    float& minimum = scratch.minimum.data()[b];
    double* totals = scratch.totals.data() + b * sets_;
    float* weighted = scratch.weighted.data() + b * sets_ * dim_;
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    const float lowest = *std::min_element(distance, distance + count);
    // Equal distances count even where adding the reach rounds away.
    if (!(lowest <= minimum + reach)) return;
    if (lowest < minimum) {
      const float decay = exp2_of_negative((lowest - minimum) * scale);
      for (std::size_t set = 0; set < sets_; ++set) totals[set] *= decay;
      for (std::size_t d = 0; d < sets_ * dim_; ++d) weighted[d] *= decay;
      minimum = lowest;
      count_from(b, scratch.block[std::find(distance, distance + count, lowest) - distance],
                 scratch);
    }
    float* factors = scratch.factors.data();
    std::size_t found = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (!(distance[i] <= minimum + reach)) continue;
      factors[found] = exp2_of_negative((minimum - distance[i]) * scale);
      scratch.of_matter[found++] = scratch.block[i];
    }
    const CentredProducts products{scratch.nearest.data() + b * dim_};
    sum_all_terms(scratch.of_matter, found, tangents_.tangents + b * tangents_.count * dim_,
                  tangents_.count, dim_, products, factors + kBlock, kBlock);
    for (std::size_t set = 0; set < sets_; ++set) {
      for (std::size_t i = 0; i < found; ++i) {
        if (set > 0) factors[set * kBlock + i] *= factors[i];
        totals[set] += factors[set * kBlock + i];
      }
    }
    std::size_t set = 0;
    for (; set + kGroupRows <= sets_; set += kGroupRows) {
      add_weighted<kGroupRows>(scratch.of_matter, found, factors + set * kBlock, products,
                               weighted + set * dim_);
    }
    for (; set < sets_; ++set) {
      add_weighted<1>(scratch.of_matter, found, factors + set * kBlock, products,
                      weighted + set * dim_);
    }
  }

  // Adds the centred values times factors [kSets, kBlock] to the sums of kSets sets.
  template <int kSets>
  void add_weighted(const Stored* const* images, std::size_t count, const float* factors,
                    const CentredProducts& centred, float* weighted) const {
    const std::size_t whole = dim_ / kLanes * kLanes;
    for (std::size_t d = 0; d < whole; d += kLanes) {
      Vec sums[kSets];
#pragma GCC unroll 8
      for (int set = 0; set < kSets; ++set) sums[set] = zero();
      for (std::size_t i = 0; i < count; ++i) {
        const Vec value = centred.value(load(images[i] + d), d);
#pragma GCC unroll 8
        for (int set = 0; set < kSets; ++set) {
          sums[set] = multiply_add(broadcast(factors[set * kBlock + i]), value, sums[set]);
        }
      }
#pragma GCC unroll 8
      for (int set = 0; set < kSets; ++set) {
        float* sum = weighted + set * dim_ + d;
        store(sum, add(load(sum), sums[set]));
      }
    }
    for (std::size_t d = whole; d < dim_; ++d) {
      float sums[kSets] = {};
      for (std::size_t i = 0; i < count; ++i) {
        const float value = centred.value(static_cast<float>(images[i][d]), d);
        for (int set = 0; set < kSets; ++set) {
          sums[set] = multiply_add(factors[set * kBlock + i], value, sums[set]);
        }
      }
      for (int set = 0; set < kSets; ++set) weighted[set * dim_ + d] += sums[set];
    }
  }

  const Stored* images_;
  const std::size_t dim_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const Tangents& tangents_;
  const std::size_t sets_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void global_posterior_jvp(const Stored* images, std::size_t count, std::size_t dim,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads,
                          const Checkpoint& checkpoint) {
  const Segments segments(count, 48);
  copy_state(GlobalJvpScan<Stored>(images, dim, segments, batch, tangents, checkpoint).run(threads),
             result);
}
