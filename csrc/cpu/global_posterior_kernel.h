// One compilation of the global posterior's kernels, for the instruction set around it.

// Images whose sums are formed together, with the rows that share their reads: noisy images, or
// fewer tangents, whose terms take more registers.
constexpr int kGroupImages = kLanes == 16 ? 3 : 2;
constexpr int kGroupBatch = kLanes == 16 ? 8 : 4;
constexpr int kGroupTangents = 4;
// Images between two looks at the minimum.
constexpr std::size_t kBlock = 48;

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

inline float sum_of_lanes(Vec a) {
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  float sum = 0.0f;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

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
      float sum = sum_of_lanes(local[k][i]);
      for (std::size_t d = whole; d < dim; ++d) {
        const float value = terms.value(static_cast<float>(images[i][d]), d);
        sum = terms.add(rows[k * dim + d], value, sum);
      }
      sums[k * stride + i] = sum;
    }
  }
}

// As sum_terms() for any number of images and rows, kRows at a time.
template <int kRows, typename Stored, typename Terms>
inline void sum_all_terms(const Stored* const* images, std::size_t count, const float* rows,
                          std::size_t row_count, std::size_t dim, const Terms& terms, float* sums,
                          std::size_t stride) {
  std::size_t image = 0;
  for (; image + kGroupImages <= count; image += kGroupImages) {
    std::size_t k = 0;
    for (; k + kRows <= row_count; k += kRows) {
      sum_terms<kGroupImages, kRows>(images + image, rows + k * dim, dim, terms,
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

// Squared distances [batch, kBlock] to a block of images, which is listed too.
template <typename Stored>
inline void measure_block(const TypedPass<Stored>& pass, std::size_t first, std::size_t count,
                          const Stored** block, float* distance) {
  for (std::size_t i = 0; i < count; ++i) block[i] = pass.images + (first + i) * pass.dim;
  sum_all_terms<kGroupBatch>(block, count, pass.batch.noisy, pass.batch.count, pass.dim,
                             SquaredGaps{}, distance, kBlock);
}

// Images are read where they lie, values side by side in the lanes.
template <typename Stored>
class GlobalScan {
 public:
  explicit GlobalScan(const TypedPass<Stored>& pass) : pass_(pass) {}

  struct Scratch {
    const TypedPass<Stored>& pass;
    AlignedArray<float> distance{pass.batch.count * kBlock}, minimum{pass.batch.count};
    AlignedArray<double> total{pass.batch.count};
    AlignedArray<float> weighted{pass.batch.count * pass.values.answered() * pass.dim};
    const Stored* block[kBlock] = {};  // images at hand
  };

  Scratch scratch() const { return {pass_}; }
  ScanState state() const { return {pass_.batch.count, pass_.values.answered() * pass_.dim}; }
  double scale(std::size_t q) const { return pass_.batch.scale[q]; }

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    const std::size_t batch = pass_.batch.count, sums = pass_.values.answered() * pass_.dim;
    std::fill_n(scratch.minimum.data(), batch, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.total.data(), batch, 0.0);
    std::fill_n(scratch.weighted.data(), batch * sums, 0.0f);
    for (std::size_t image = first; image < last; image += kBlock) {
      pass_.checkpoint();
      const std::size_t count = std::min(kBlock, last - image);
      measure_block(pass_, image, count, scratch.block, scratch.distance.data());
      for (std::size_t b = 0; b < batch; ++b) take_in_block(b, image, count, scratch);
    }
    std::copy_n(scratch.minimum.data(), batch, state.minimum.begin());
    std::copy_n(scratch.total.data(), batch, state.total.begin());
    std::copy_n(scratch.weighted.data(), batch * sums, state.weighted.begin());
  }

 private:
  // Takes in `count` images from image `first` on.
  void take_in_block(std::size_t b, std::size_t first, std::size_t count, Scratch& scratch) const {
    const ValueImages& values = pass_.values;
    const std::size_t values_dim = values.number * pass_.dim;
    const std::size_t sums = values.answered() * pass_.dim;
    const float* distance = scratch.distance.data() + b * kBlock;
    float& minimum = scratch.minimum.data()[b];
    float* weighted = scratch.weighted.data() + b * sums;
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
    const float lowest = *std::min_element(distance, distance + count);
    // Equal distances count even where adding the reach rounds away.
    if (!(lowest <= minimum + reach)) return;
    if (lowest < minimum) {
      const float decay = exp2_of_negative((lowest - minimum) * scale);
      scratch.total.data()[b] *= decay;
      for (std::size_t d = 0; d < sums; ++d) weighted[d] *= decay;
      minimum = lowest;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (!(distance[i] <= minimum + reach)) continue;
      const float weight = exp2_of_negative((minimum - distance[i]) * scale);
      scratch.total.data()[b] += weight;
      float* behind = weighted;
      if (values.with_image) {
        add_weighted(scratch.block[i], pass_.dim, weight, weighted);
        behind += pass_.dim;
      }
      if (values_dim == 0) continue;
      add_weighted(values.values + (first + i) * values_dim, values_dim, weight, behind);
    }
  }

  template <typename Number>
  static void add_weighted(const Number* values, std::size_t dim, float weight, float* weighted) {
    const std::size_t whole = dim / kLanes * kLanes;
    const Vec factor = broadcast(weight);
    for (std::size_t d = 0; d < whole; d += kLanes) {
      store(weighted + d, multiply_add(factor, load(values + d), load(weighted + d)));
    }
    for (std::size_t d = whole; d < dim; ++d) {
      weighted[d] += weight * static_cast<float>(values[d]);
    }
  }

  const TypedPass<Stored> pass_;
};

template <typename Stored>
class GlobalJvp {
 public:
  GlobalJvp(const TypedPass<Stored>& pass, const Tangents& tangents)
      : pass_(pass), tangents_(tangents), dim_(pass.dim), sets_(1 + tangents.count) {}

  // What a thread works in. There is a set of sums for the weights of every noisy image, and one
  // for each of its tangents with the weights times c, all counted from its nearest image.
  struct Scratch {
    const TypedPass<Stored>& pass;
    const std::size_t sets;
    AlignedArray<float> distance{pass.batch.count * kBlock}, minimum{pass.batch.count};
    AlignedArray<float> nearest{pass.batch.count * pass.dim}, moved{pass.dim};
    AlignedArray<double> totals{pass.batch.count * sets};
    AlignedArray<float> weighted{pass.batch.count * sets * pass.dim};
    AlignedArray<float> factors{sets * kBlock};  // of the images that matter, by set
    const Stored* block[kBlock] = {};            // images at hand
    const Stored* of_matter[kBlock] = {};        // and those that matter
  };

  Scratch scratch() const { return {pass_, sets_}; }
  ScanState state() const { return {pass_.batch.count, tangents_.sums(dim_), tangents_.count}; }
  double scale(std::size_t q) const { return pass_.batch.scale[q]; }

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), pass_.batch.count, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), pass_.batch.count * dim_, 0.0f);
    std::fill_n(scratch.totals.data(), pass_.batch.count * sets_, 0.0);
    std::fill_n(scratch.weighted.data(), pass_.batch.count * sets_ * dim_, 0.0f);
    for (std::size_t image = first; image < last; image += kBlock) {
      const std::size_t count = std::min(kBlock, last - image);
      measure_block(pass_, image, count, scratch.block, scratch.distance.data());
      for (std::size_t b = 0; b < pass_.batch.count; ++b) {
        pass_.checkpoint();
        take_in_block(b, count, scratch);
      }
    }
    for (std::size_t b = 0; b < pass_.batch.count; ++b) {
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

 private:
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
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
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
    std::size_t heavy = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (!(distance[i] <= minimum + reach)) continue;
      factors[heavy] = exp2_of_negative((minimum - distance[i]) * scale);
      scratch.of_matter[heavy++] = scratch.block[i];
    }
    const CentredProducts products{scratch.nearest.data() + b * dim_};
    sum_all_terms<kGroupTangents>(scratch.of_matter, heavy,
                                  tangents_.tangents + b * tangents_.count * dim_, tangents_.count,
                                  dim_, products, factors + kBlock, kBlock);
    for (std::size_t set = 0; set < sets_; ++set) {
      for (std::size_t i = 0; i < heavy; ++i) {
        if (set > 0) factors[set * kBlock + i] *= factors[i];
        totals[set] += factors[set * kBlock + i];
      }
    }
    std::size_t set = 0;
    for (; set + kGroupTangents <= sets_; set += kGroupTangents) {
      add_weighted<kGroupTangents>(scratch.of_matter, heavy, factors + set * kBlock, products,
                                   weighted + set * dim_);
    }
    for (; set < sets_; ++set) {
      add_weighted<1>(scratch.of_matter, heavy, factors + set * kBlock, products,
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

  const TypedPass<Stored> pass_;
  const Tangents tangents_;
  const std::size_t dim_, sets_;
};

struct Kernels {
  template <typename Stored>
  static void scan(const TypedPass<Stored>& pass, const ScanResult& result) {
    run_kernel(GlobalScan<Stored>(pass), {pass.count, kBlock}, pass.threads).copy_to(result);
  }

  template <typename Stored>
  static void jvp(const TypedPass<Stored>& pass, const Tangents& tangents,
                  const ScanResult& result) {
    const GlobalJvp<Stored> scan(pass, tangents);
    run_kernel(scan, {pass.count, kBlock}, pass.threads).copy_to(result);
  }
};
