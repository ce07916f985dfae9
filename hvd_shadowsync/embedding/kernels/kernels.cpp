// Look-up, gradient and fused update of embedding rows, for compiled.py, which calls these functions through ctypes.
//
// All arrays belong to the caller. A function runs without Python's lock, on up to `threads` threads, and returns a
// negative number where there is no memory for what it needs. The same source is
// compiled for several instruction sets; compiled.py loads the best one that the machine has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int AHEAD = 24;      // ids between the prefetch of a row, or of a gradient, and its use
constexpr int AHEAD_OUT = 16;  // bags between the prefetch of where a vector goes and its writing
constexpr int LINE = 64;       // bytes
constexpr int OFTEN = 2;       // ids a bag from which gradients are copied together

// Some bags of rows. Fields are filled in by compiled.py as int64, in this order.
struct Bags {
  char* rows;          // [num_rows, dim]
  int64_t dim;
  const char* ids;     // [num_ids] int32 or int64
  int64_t wide;        // whether ids are int64
  const int32_t* lengths;  // [num_bags]; null: one id a bag
  const char* weights;     // [num_ids], of the rows' type; null: 1
  int64_t num_bags;
  int64_t num_ids;
  char* vectors;       // one of `dim` a bag: what pooling writes, what gradients are read from
  int64_t stride;      // elements from one vector to the next
  int64_t add;         // pooling: whether to add to what is there
  double scale;        // update: of these gradients
};

// What a rank holds of a table, and the bags that touch it in one step.
struct Shard {
  char* rows;
  int64_t dim;
  int64_t num_rows;
  char* state0;
  char* state1;
  int64_t first_bags, last_bags;  // into the array of Bags
};

struct Rule {
  int64_t kind;  // 0 SGD, 1 row-wise Adagrad, 2 Adagrad, 3 Adam
  double lr, eps, beta0, beta1, correction;
};

template <int WRITE = 0>
inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(row + at, WRITE, 3);
}

template <typename T, typename I, int DIM>
void pool_bags(const Bags& bags, int64_t first, int64_t last, int64_t at) {
  const int64_t dim = DIM ? DIM : bags.dim;
  const I* ids = reinterpret_cast<const I*>(bags.ids);
  const T* rows = reinterpret_cast<const T*>(bags.rows);
  const T* weights = reinterpret_cast<const T*>(bags.weights);
  T* out = reinterpret_cast<T*>(bags.vectors);
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = at + (bags.lengths ? bags.lengths[bag] : 1);
    T* target = out + bag * bags.stride;
    if (bag + AHEAD_OUT < last)
      prefetch_row<1>(reinterpret_cast<const char*>(target + AHEAD_OUT * bags.stride), dim * sizeof(T));
    T sum[DIM ? DIM : 1];
    T* acc = DIM ? sum : target;
    if (DIM) {
      for (int64_t d = 0; d < dim; ++d) acc[d] = bags.add ? target[d] : T(0);
    } else if (!bags.add) {
      std::fill(target, target + dim, T(0));
    }
    for (; at < end; ++at) {
      if (at + AHEAD < bags.num_ids)
        prefetch_row(reinterpret_cast<const char*>(rows + int64_t(ids[at + AHEAD]) * dim), dim * sizeof(T));
      const T* row = rows + int64_t(ids[at]) * dim;
      if (weights) {
        const T weight = weights[at];
        for (int64_t d = 0; d < dim; ++d) acc[d] += weight * row[d];
      } else {
        for (int64_t d = 0; d < dim; ++d) acc[d] += row[d];
      }
    }
    if (DIM)
      for (int64_t d = 0; d < dim; ++d) target[d] = acc[d];
  }
}

template <typename T, typename I>
void pool_any(const Bags& bags, int64_t first, int64_t last, int64_t at) {
  switch (bags.dim) {
    case 8: return pool_bags<T, I, 8>(bags, first, last, at);
    case 16: return pool_bags<T, I, 16>(bags, first, last, at);
    case 32: return pool_bags<T, I, 32>(bags, first, last, at);
    case 64: return pool_bags<T, I, 64>(bags, first, last, at);
    case 128: return pool_bags<T, I, 128>(bags, first, last, at);
    default: return pool_bags<T, I, 0>(bags, first, last, at);
  }
}

template <typename T, typename I>
void scatter_bags(const Bags& bags) {  // rows[id] += weight * vector of the bag
  const int64_t dim = bags.dim;
  const I* ids = reinterpret_cast<const I*>(bags.ids);
  T* rows = reinterpret_cast<T*>(bags.rows);
  const T* weights = reinterpret_cast<const T*>(bags.weights);
  const T* vectors = reinterpret_cast<const T*>(bags.vectors);
  int64_t at = 0;
  for (int64_t bag = 0; bag < bags.num_bags; ++bag) {
    const int64_t end = at + (bags.lengths ? bags.lengths[bag] : 1);
    const T* vector = vectors + bag * bags.stride;
    for (; at < end; ++at) {
      T* row = rows + int64_t(ids[at]) * dim;
      const T weight = weights ? weights[at] : T(1);
      for (int64_t d = 0; d < dim; ++d) row[d] += weight * vector[d];
    }
  }
}

struct Touch {
  uint32_t row;
  uint32_t at;  // which gradient
};

// Memory that a thread keeps from one step to the next.
template <typename T>
class Kept {
 public:
  T* of(size_t count) {
    if (count > capacity_) {
      capacity_ = count + count / 2;
      memory_.reset(new T[capacity_]);
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  size_t capacity_ = 0;
};

constexpr int DIGIT = 11, BUCKETS = 1 << DIGIT, MOST_DIGITS = 3;

// Touches in the order in which they are added, counted by the digits of their rows as a radix sort needs it.
class Touches {
 public:
  Touches(Touch* memory, Touch* spare, uint32_t num_rows) : touches_(memory), spare_(spare) {
    int bits = 1;
    while (bits < 32 && (num_rows - 1) >> bits) ++bits;
    digits_ = (bits + DIGIT - 1) / DIGIT;
    width_ = (bits + digits_ - 1) / digits_;
    mask_ = (1u << width_) - 1;
    for (int digit = 0; digit < digits_; ++digit) std::memset(counts_[digit], 0, sizeof(uint32_t) << width_);
  }

  inline void add(uint32_t row, uint32_t at) {
    touches_[size_++] = {row, at};
    ++counts_[0][row & mask_];
    if (digits_ > 1) ++counts_[1][(row >> width_) & mask_];
    if (digits_ > 2) ++counts_[2][row >> (2 * width_)];
  }

  size_t size() const { return size_; }

  // Sorts by row; stable, so that the sum of a row's gradients has one order.
  const Touch* sorted() {
    for (int digit = 0; digit < digits_; ++digit) {
      uint32_t* starts = counts_[digit];
      uint32_t sum = 0;
      for (uint32_t bucket = 0; bucket <= mask_; ++bucket) {
        const uint32_t count = starts[bucket];
        starts[bucket] = sum;
        sum += count;
      }
      const int shift = digit * width_;
      for (size_t i = 0; i < size_; ++i) spare_[starts[(touches_[i].row >> shift) & mask_]++] = touches_[i];
      std::swap(touches_, spare_);
    }
    return touches_;
  }

 private:
  Touch *touches_, *spare_;
  size_t size_ = 0;
  int digits_, width_;
  uint32_t mask_;
  uint32_t counts_[MOST_DIGITS][BUCKETS];
};

template <typename T>
struct Gradient {
  const T* vector;
  T scale;
};

template <typename T, int DIM>
inline __attribute__((always_inline)) void apply(const Rule& rule, T* row, const T* grad, int64_t any_dim, T* state0, T* state1) {
  const int64_t dim = DIM ? DIM : any_dim;
  const T lr = T(rule.lr), eps = T(rule.eps);
  if (rule.kind == 0) {
    for (int64_t d = 0; d < dim; ++d) row[d] -= lr * grad[d];
  } else if (rule.kind == 1) {
    T squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += grad[d] * grad[d];
    *state0 += squares / T(dim);
    const T factor = lr / (std::sqrt(*state0) + eps);
    for (int64_t d = 0; d < dim; ++d) row[d] -= factor * grad[d];
  } else if (rule.kind == 2) {
    for (int64_t d = 0; d < dim; ++d) {
      state0[d] += grad[d] * grad[d];
      row[d] -= lr * grad[d] / (std::sqrt(state0[d]) + eps);
    }
  } else {
    const T keep0 = T(1 - rule.beta0), keep1 = T(1 - rule.beta1), factor = T(rule.lr * rule.correction);
    for (int64_t d = 0; d < dim; ++d) {
      state0[d] += keep0 * (grad[d] - state0[d]);
      state1[d] += keep1 * (grad[d] * grad[d] - state1[d]);
      row[d] -= factor * state0[d] / (std::sqrt(state1[d]) + eps);
    }
  }
}

// Adds what some bags touch; `first` is the place of their first gradient among all. Returns how many gradients there are.
template <typename T, typename I>
size_t add_touches(const Bags& bags, bool weighted, uint32_t part, uint32_t parts, const T* vectors, int64_t stride,
                   size_t first, Touches& touches, Gradient<T>* gradients) {
  const I* ids = reinterpret_cast<const I*>(bags.ids);
  const T* weights = reinterpret_cast<const T*>(bags.weights);
  const T scale = T(bags.scale);
  size_t count = first;
  int64_t at = 0;
  for (int64_t bag = 0; bag < bags.num_bags; ++bag) {
    const int64_t end = at + (bags.lengths ? bags.lengths[bag] : 1);
    const T* vector = vectors + bag * stride;
    if (!weighted) gradients[count++] = {vector, scale};
    for (; at < end; ++at) {
      const uint32_t row = uint32_t(ids[at]);
      if (parts > 1 && row % parts != part) continue;
      if (weighted) gradients[count++] = {vector, scale * (weights ? weights[at] : T(1))};
      touches.add(row, uint32_t(count - 1));
    }
  }
  return count;
}

// Updates those rows of a shard that fall to one of `parts` threads, each once with the sum of its gradients.
template <typename T, int DIM>
void update_shard(const Shard& shard, const Bags* all, const Rule& rule, uint32_t part, uint32_t parts) {
  static thread_local Kept<Touch> kept_touches, kept_spare;
  static thread_local Kept<Gradient<T>> kept_gradients;
  static thread_local Kept<T> kept_vectors;
  const int64_t dim = DIM ? DIM : shard.dim;
  bool weighted = false;
  size_t num_ids = 0, num_bags = 0, copied = 0;
  const auto worth_copying = [&](const Bags& bags) { return bags.stride != dim && bags.num_ids > OFTEN * bags.num_bags; };
  for (int64_t s = shard.first_bags; s < shard.last_bags; ++s) {
    weighted = weighted || all[s].weights;
    num_ids += all[s].num_ids;
    num_bags += all[s].num_bags;
    if (worth_copying(all[s])) copied += all[s].num_bags * dim;
  }
  if (!num_ids) return;
  Gradient<T>* gradients = kept_gradients.of(weighted ? num_ids : num_bags);
  T* vectors = kept_vectors.of(copied);
  Touches touches(kept_touches.of(num_ids), kept_spare.of(num_ids), uint32_t(shard.num_rows));
  size_t found = 0;
  for (int64_t s = shard.first_bags; s < shard.last_bags; ++s) {
    const Bags& bags = all[s];
    const T* source = reinterpret_cast<const T*>(bags.vectors);
    int64_t stride = bags.stride;
    if (worth_copying(bags)) {  // vectors that are read often lie close together then
      for (int64_t bag = 0; bag < bags.num_bags; ++bag)
        std::memcpy(vectors + bag * dim, source + bag * stride, dim * sizeof(T));
      source = vectors, stride = dim, vectors += bags.num_bags * dim;
    }
    found = bags.wide ? add_touches<T, int64_t>(bags, weighted, part, parts, source, stride, found, touches, gradients)
                      : add_touches<T, int32_t>(bags, weighted, part, parts, source, stride, found, touches, gradients);
  }
  const Touch* sorted = touches.sorted();
  const bool per_weight = rule.kind >= 2;
  T* rows = reinterpret_cast<T*>(shard.rows);
  T* state0 = reinterpret_cast<T*>(shard.state0);
  T* state1 = reinterpret_cast<T*>(shard.state1);
  std::vector<T> any(DIM ? 0 : dim);
  T fixed[DIM ? DIM : 1];
  T* sum = DIM ? fixed : any.data();
  const size_t count = touches.size();
  const auto fetch = [&](const Touch& next, bool is_another_row) {
    prefetch_row(reinterpret_cast<const char*>(gradients[next.at].vector), dim * sizeof(T));
    if (!is_another_row) return;
    const int64_t row = next.row;
    prefetch_row(reinterpret_cast<const char*>(rows + row * dim), dim * sizeof(T));
    if (state0) prefetch_row(reinterpret_cast<const char*>(state0 + (per_weight ? row * dim : row)), per_weight ? dim * sizeof(T) : 1);
    if (state1) prefetch_row(reinterpret_cast<const char*>(state1 + row * dim), dim * sizeof(T));
  };
  for (size_t i = 0; i < count;) {
    const int64_t row = sorted[i].row;
    for (int64_t d = 0; d < dim; ++d) sum[d] = 0;
    for (; i < count && sorted[i].row == row; ++i) {
      if (i + AHEAD < count) fetch(sorted[i + AHEAD], sorted[i + AHEAD].row != sorted[i + AHEAD - 1].row);
      const Gradient<T> gradient = gradients[sorted[i].at];
      for (int64_t d = 0; d < dim; ++d) sum[d] += gradient.scale * gradient.vector[d];
    }
    const int64_t state_at = per_weight ? row * dim : row;
    apply<T, DIM>(rule, rows + row * dim, sum, dim, state0 ? state0 + state_at : nullptr, state1 ? state1 + state_at : nullptr);
  }
}

template <typename T>
void update_any(const Shard& shard, const Bags* all, const Rule& rule, uint32_t part, uint32_t parts) {
  switch (shard.dim) {
    case 8: return update_shard<T, 8>(shard, all, rule, part, parts);
    case 16: return update_shard<T, 16>(shard, all, rule, part, parts);
    case 32: return update_shard<T, 32>(shard, all, rule, part, parts);
    case 64: return update_shard<T, 64>(shard, all, rule, part, parts);
    case 128: return update_shard<T, 128>(shard, all, rule, part, parts);
    default: return update_shard<T, 0>(shard, all, rule, part, parts);
  }
}

inline uint64_t mix(uint64_t id) { return id * 0x9E3779B97F4A7C15ull; }

template <typename I>
int64_t unique_ids(const I* ids, int64_t num_ids, int32_t* unique, int32_t* inverse) {
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * num_ids) ++bits;
  static thread_local std::vector<int32_t> slots;  // 1 + index into unique; 0: free
  slots.assign(size_t(1) << bits, 0);
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  int32_t found = 0;
  for (int64_t i = 0; i < num_ids; ++i) {
    const int32_t id = int32_t(ids[i]);
    uint64_t at = mix(uint64_t(id)) >> (64 - bits);
    while (slots[at] && unique[slots[at] - 1] != id) at = (at + 1) & mask;
    if (!slots[at]) {
      unique[found] = id;
      slots[at] = ++found;
    }
    inverse[i] = slots[at] - 1;
  }
  return found;
}

template <typename I>
int64_t first_outside(const I* ids, int64_t num_ids, int64_t num_rows) {
  uint64_t bad = 0;
  for (int64_t i = 0; i < num_ids; ++i) bad |= uint64_t(int64_t(ids[i])) >= uint64_t(num_rows);
  if (!bad) return -1;
  for (int64_t i = 0; i < num_ids; ++i)
    if (uint64_t(int64_t(ids[i])) >= uint64_t(num_rows)) return i;
  return -1;
}

// Where the rows of a table lie: its part, and the row within the part.
struct Division {
  int64_t hashed, num_rows, parts, multiplier;

  inline void locate(int64_t id, int64_t& part, int64_t& row) const {
    if (hashed) {
      const int64_t hash = id * multiplier % num_rows;
      part = hash % parts;
      row = hash / parts;
    } else {  // part k has the rows from num_rows * k / parts on
      part = ((id + 1) * parts - 1) / num_rows;
      row = id - num_rows * part / parts;
    }
  }
};

template <typename I>
void split_ids(const I* ids, const int32_t* lengths, int64_t num_bags, const Division& division, int64_t* counts,
               int32_t* rows, int32_t* part_lengths, int64_t* places) {
  const int64_t parts = division.parts;
  std::vector<int64_t> at(parts, 0), starts(parts, 0);
  for (int64_t part = 1; part < parts; ++part) starts[part] = starts[part - 1] + counts[part - 1];
  int64_t i = 0;
  for (int64_t bag = 0; bag < num_bags; ++bag) {
    for (int64_t part = 0; part < parts; ++part) part_lengths[part * num_bags + bag] = 0;
    for (const int64_t end = i + (lengths ? lengths[bag] : 1); i < end; ++i) {
      int64_t part, row;
      division.locate(ids[i], part, row);
      const int64_t place = starts[part] + at[part]++;
      rows[place] = int32_t(row);
      places[place] = i;
      ++part_lengths[part * num_bags + bag];
    }
  }
}

template <typename I>
void count_parts(const I* ids, int64_t num_ids, const Division& division, int64_t* counts) {
  for (int64_t i = 0; i < num_ids; ++i) {
    int64_t part, row;
    division.locate(ids[i], part, row);
    ++counts[part];
  }
}

constexpr int64_t NO_MEMORY = -2;

template <typename F>
int64_t guarded(F&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

// The same for each of `count` tasks, on several threads, over whose ends no exception may go.
template <typename F>
int64_t for_all(int64_t count, int64_t threads, F&& task) {
  int64_t result = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    if (guarded([&] { return task(i), int64_t(0); })) {
#pragma omp atomic write
      result = NO_MEMORY;
    }
  }
  return result;
}

constexpr int64_t BLOCK = 256;  // bags that a thread pools at a time

struct Block {
  const Bags* bags;
  int64_t first, last, at;
};

}  // namespace

extern "C" {

int64_t shadow_pool(const Bags* all, int64_t count, int64_t is_double, int64_t threads) {
  std::vector<Block> blocks;
  const auto divide = [&] {
    for (int64_t s = 0; s < count; ++s) {
      int64_t at = 0;
      for (int64_t first = 0; first < all[s].num_bags; first += BLOCK) {
        const int64_t last = std::min(first + BLOCK, all[s].num_bags);
        blocks.push_back({&all[s], first, last, at});
        for (int64_t bag = first; bag < last; ++bag) at += all[s].lengths ? all[s].lengths[bag] : 1;
      }
    }
    return int64_t(0);
  };
  if (const int64_t failed = guarded(divide)) return failed;
  return for_all(int64_t(blocks.size()), threads, [&](int64_t b) {
    const Block& block = blocks[b];
    const Bags& bags = *block.bags;
    if (is_double)
      bags.wide ? pool_any<double, int64_t>(bags, block.first, block.last, block.at)
                : pool_any<double, int32_t>(bags, block.first, block.last, block.at);
    else
      bags.wide ? pool_any<float, int64_t>(bags, block.first, block.last, block.at)
                : pool_any<float, int32_t>(bags, block.first, block.last, block.at);
  });
}

int64_t shadow_scatter(const Bags* all, int64_t count, int64_t is_double, int64_t threads) {
  return for_all(count, threads, [&](int64_t s) {
    if (is_double)
      all[s].wide ? scatter_bags<double, int64_t>(all[s]) : scatter_bags<double, int32_t>(all[s]);
    else
      all[s].wide ? scatter_bags<float, int64_t>(all[s]) : scatter_bags<float, int32_t>(all[s]);
  });
}

int64_t shadow_update(const Shard* shards, int64_t count, const Bags* all, const Rule* rule, int64_t is_double,
                      int64_t threads) {
  return for_all(count * threads, threads, [&](int64_t task) {
    const Shard& shard = shards[task / threads];
    if (is_double)
      update_any<double>(shard, all, *rule, uint32_t(task % threads), uint32_t(threads));
    else
      update_any<float>(shard, all, *rule, uint32_t(task % threads), uint32_t(threads));
  });
}

int64_t shadow_unique(const void* ids, int64_t wide, int64_t num_ids, int32_t* unique, int32_t* inverse) {
  return guarded([&] {
    return wide ? unique_ids(static_cast<const int64_t*>(ids), num_ids, unique, inverse)
                : unique_ids(static_cast<const int32_t*>(ids), num_ids, unique, inverse);
  });
}

int64_t shadow_first_outside(const void* ids, int64_t wide, int64_t num_ids, int64_t num_rows) {
  return wide ? first_outside(static_cast<const int64_t*>(ids), num_ids, num_rows)
              : first_outside(static_cast<const int32_t*>(ids), num_ids, num_rows);
}

void shadow_count_parts(const void* ids, int64_t wide, int64_t num_ids, const Division* division, int64_t* counts) {
  wide ? count_parts(static_cast<const int64_t*>(ids), num_ids, *division, counts)
       : count_parts(static_cast<const int32_t*>(ids), num_ids, *division, counts);
}

int64_t shadow_split(const void* ids, int64_t wide, const int32_t* lengths, int64_t num_bags, const Division* division,
                     int64_t* counts, int32_t* rows, int32_t* part_lengths, int64_t* places) {
  return guarded([&] {
    wide ? split_ids(static_cast<const int64_t*>(ids), lengths, num_bags, *division, counts, rows, part_lengths, places)
         : split_ids(static_cast<const int32_t*>(ids), lengths, num_bags, *division, counts, rows, part_lengths, places);
    return int64_t(0);
  });
}
}
