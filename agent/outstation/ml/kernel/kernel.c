/* Statistics of drift windows, compiled. NumPy code beside each caller defines every number; these loops give the same
 * bits, on every processor: sums in the order of rows, no fused multiply-add (-ffp-contract=off), no relaxed arithmetic.
 *
 * Arrays are contiguous and row-major; the caller allocates all of them. No function keeps a pointer, allocates or locks.
 * VARIANT is appended to each name, so that one library holds the same code for several sets of instructions.
 */

#include <stddef.h>
#include <stdint.h>
#if defined(SOURCE_DIGEST) && defined(WITH_AVX2)
#include <cpuid.h>
#endif

#define memcpy __builtin_memcpy
#define memset __builtin_memset
#ifndef VARIANT
#define VARIANT baseline
#endif
#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)
#define EXPORT(name) __attribute__((visibility("default"))) NAMED(name, VARIANT)

#ifdef SOURCE_DIGEST
/* The source that this was built from. */
__attribute__((visibility("default"))) const char outstation_kernel_digest[] = SOURCE_DIGEST;

/* Whether the variant avx2 is there and runs: processor and operating system both have to know its registers. */
__attribute__((visibility("default"))) int64_t outstation_kernel_has_avx2(void) {
#ifdef WITH_AVX2
    unsigned a, b, c, d, low, high;
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_PCLMUL;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) != 0;
#else
    return 0;
#endif
}
#endif

enum { CUTS = 33, BINS = 34, SIZES = 64, QUAD = 4, EIGHT = 8 };
/* Of eight bytes the lowest and the highest bits. */
#define ONES 0x0101010101010101u
#define TOPS 0x8080808080808080u
enum { DONE = 0, ABSENT = 1 };
static const double SPIKE_SDS = 10.0, NEIGHBOUR_SDS = 5.0;

/* Whole numbers of 64 bits as double and back: a processor of 32 bits has no instruction for them. Back, what is too
 * large becomes the least number, as by NumPy on most processors.
 */
static inline double to_double(int64_t whole) {
#if __SIZEOF_POINTER__ == 8
    return (double)whole;
#else
    return (double)(int32_t)(whole >> 32) * 4294967296.0 + (double)(uint32_t)whole;
#endif
}

static inline int64_t to_whole(double value) {
    if (!(__builtin_fabs(value) < 9223372036854775808.0)) return INT64_MIN;
#if __SIZEOF_POINTER__ == 8
    return (int64_t)value;
#else
    int32_t high = (int32_t)(value / 4294967296.0);
    high -= (double)high * 4294967296.0 > value;
    return (int64_t)((uint64_t)(uint32_t)high << 32 | (uint32_t)(value - (double)high * 4294967296.0));
#endif
}

/* Order key of a value: whole numbers compare as the values do, and -0 as 0. A missing value is above all others. */
static inline int32_t order_key(float value) {
    int32_t bits;
    float normal = value + 0.0f;
    memcpy(&bits, &normal, sizeof bits);
    bits ^= (int32_t)((uint32_t)(bits >> 31) & 0x7fffffffu);
    return value == value ? bits : INT32_MAX;
}

/* Count the keys below each cut, then the differences: below, in 32 bins, above. */
static void count_bins(const int32_t *keys, int64_t n, int64_t known, const int32_t *cuts, int64_t *bins) {
    int64_t under[CUTS + 2];
    under[0] = 0;
    under[CUTS + 1] = known;
    for (int group = 0; group < CUTS; group += 3) {
        const int32_t a = cuts[group], b = cuts[group + 1], c = cuts[group + 2];
        int32_t below_a = 0, below_b = 0, below_c = 0;
        for (int64_t i = 0; i < n; i++) {
            below_a += keys[i] < a;
            below_b += keys[i] < b;
            below_c += keys[i] < c;
        }
        under[group + 1] = below_a;
        under[group + 2] = below_b;
        under[group + 3] = below_c;
    }
    for (int bin = 0; bin < BINS; bin++) bins[bin] = under[bin + 1] - under[bin];
}

static inline double key_value(int32_t key) {
    int32_t bits = key ^ (int32_t)((uint32_t)(key >> 31) & 0x7fffffffu);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Find the two lowest and the two highest values, and how many rows have each. -inf with 0 rows where there is none. */
static void find_extremes(const int32_t *keys, int64_t n, int64_t known, double *values, int64_t *rows) {
    const double none = -__builtin_inf();
    for (int i = 0; i < 4; i++) {
        values[i] = none;
        rows[i] = 0;
    }
    if (!known) return;
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = keys[i], value = key == INT32_MAX ? INT32_MIN : key;
        low = key < low ? key : low;
        high = value > high ? value : high;
    }
    int32_t next_low = INT32_MAX, next_high = INT32_MIN, lows = 0, highs = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = keys[i];
        int32_t above = key == low ? INT32_MAX : key, below = key >= high ? INT32_MIN : key;
        lows += key == low;
        highs += key == high;
        next_low = above < next_low ? above : next_low;
        next_high = below > next_high ? below : next_high;
    }
    values[0] = -key_value(low) + 0.0;
    rows[0] = lows;
    values[2] = key_value(high) + 0.0;
    rows[2] = highs;
    if (low == high) return;
    int32_t next_lows = 0, next_highs = 0;
    for (int64_t i = 0; i < n; i++) {
        next_lows += keys[i] == next_low;
        next_highs += keys[i] == next_high;
    }
    values[1] = -key_value(next_low) + 0.0;
    rows[1] = next_lows;
    values[3] = key_value(next_high) + 0.0;
    rows[3] = next_highs;
}

typedef uint8_t Bytes __attribute__((vector_size(32), aligned(1), may_alias));

static inline int64_t sum_bytes(Bytes bytes) {
    const uint64_t even = 0x00ff00ff00ff00ffu, each = 0x0001000100010001u;
    uint64_t words[4], sum = 0;
    memcpy(words, &bytes, sizeof words);
    for (int i = 0; i < 4; i++) sum += ((words[i] & even) + (words[i] >> 8 & even)) * each >> 48;
    return (int64_t)sum;
}

/* Count the bytes that are `first`, and those that are one, two and three less. */
static void count_bytes(const uint8_t *bytes, int64_t n, int64_t first, int64_t counts[4]) {
    enum { LANES = sizeof(Bytes), MOST = 255 };
    int64_t i = 0;
    for (int k = 0; k < 4; k++) counts[k] = 0;
    while (i + LANES <= n) {
        Bytes a = {0}, b = a, c = a, d = a;
        /* As long as no count leaves its byte. */
        const int64_t end = i + MOST * LANES < n ? i + MOST * LANES : n;
        for (; i + LANES <= end; i += LANES) {
            const Bytes below = (uint8_t)first - *(const Bytes *)(bytes + i);
            a -= (Bytes)(below == 0);
            b -= (Bytes)(below == 1);
            c -= (Bytes)(below == 2);
            d -= (Bytes)(below == 3);
        }
        counts[0] += sum_bytes(a);
        counts[1] += sum_bytes(b);
        counts[2] += sum_bytes(c);
        counts[3] += sum_bytes(d);
    }
    for (; i < n; i++)
        for (int k = 0; k < 4; k++) counts[k] += bytes[i] == first - k;
}

/* Count steps between n values by the power of two of their size; the first count is that of steps of 0. `size` is of each
 * step its place among the counts, SIZES if it is missing. Return the highest place with a step.
 */
static int64_t count_sizes(const float *column, int64_t n, uint8_t *size, int64_t *counts) {
    enum { LEAST = -40 };
    const uint32_t sign = 0x80000000u;
    for (int64_t i = 0; i + 1 < n; i++) {
        const float from = column[i], to = column[i + 1], step = to - from;
        /* Exactly what rounding took from the step. Source: Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. */
        const float back = step - to, rest = (to - (step - back)) - (from + back);
        uint32_t bits, rest_bits;
        memcpy(&bits, &step, sizeof bits);
        memcpy(&rest_bits, &rest, sizeof rest_bits);
        const int32_t magnitude = (int32_t)(bits & ~sign), is_step = magnitude > 0;
        rest_bits ^= ~bits & sign;
        float size_of_step, less;
        memcpy(&size_of_step, &magnitude, sizeof size_of_step);
        memcpy(&less, &rest_bits, sizeof less);
        int32_t place = (magnitude >> 23) - (126 + LEAST);
        /* A power of two may be what a smaller step was rounded to, but by less than float64 rounds off. */
        place -= ((magnitude & 0x7fffff) == 0) & (less > size_of_step * 0x1p-54f);
        place = place < is_step ? is_step : place;
        place = place > SIZES - 1 ? SIZES - 1 : place;
        place += magnitude > 0x7f800000;
        size[i] = (uint8_t)place;
    }
    uint8_t most = 0;
    for (int64_t i = 0; i + 1 < n; i++) most = size[i] > most ? size[i] : most;
    int64_t several[4], highest = 0;
    for (int place = 0; place < SIZES; place++) counts[place] = 0;
    count_bytes(size, n - 1, 0, several);
    counts[0] = several[0];
    for (int64_t place = most, left = n - 1 - several[0]; left > 0; place -= 4) {
        count_bytes(size, n - 1, place, several);
        for (int64_t k = 0; k < 4 && k < place; k++) {
            left -= several[k];
            if (place - k == SIZES) continue;
            counts[place - k] = several[k];
            if (!highest && several[k]) highest = place - k;
        }
    }
    return highest;
}

static int is_among(double value, const double *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (values[i] == value) return 1;
    return 0;
}

/* Find the longest run of one value and the run of the last one. `run` rows before had the value `last`, if any. */
static void find_runs(const float *column, int64_t n, double last, int64_t run, const double *rest, int64_t rests,
                      int64_t *longest, int64_t *open) {
    int64_t most = 1, now = 1;
    if (last == last && run > 1) now = run;
    for (int64_t i = 0; i < n; i++) {
        double value = column[i];
        if (value != value) continue;
        if (value - last == 0 && !is_among(value, rest, rests)) {
            now++;
            most = now > most ? now : most;
        } else {
            now = 1;
        }
        last = value;
    }
    *longest = most;
    *open = now;
}

/* As `find_runs`, where no value is missing and `size` has the steps into the rows from the second on. */
static void find_known_runs(const float *column, int64_t n, double last, int64_t run, const double *rest, int64_t rests,
                            const uint8_t *size, int64_t *longest, int64_t *open) {
    find_runs(column, 1, last, run, rest, rests, longest, open);
    int64_t most = *longest, now = *open;
    for (int64_t i = 1; i < n;) {
        uint64_t word = 0;
        const int64_t end = i + EIGHT < n ? i + EIGHT : n;
        if (end == i + EIGHT) memcpy(&word, size + i - 1, sizeof word);
        if ((word - ONES) & ~word & TOPS) {
            for (; i < end; i++) {
                now = size[i - 1] == 0 && !is_among(column[i], rest, rests) ? now + 1 : 1;
                most = now > most ? now : most;
            }
        } else {
            /* No step is 0. */
            now = 1;
            i = end;
        }
    }
    *longest = most;
    *open = now;
}

/* Count jumps out and back; `highest` is the highest place of a step among the sizes. */
static int64_t count_spikes(const float *column, int64_t n, double jump, int64_t highest) {
    const double far = SPIKE_SDS * jump, near = NEIGHBOUR_SDS * jump;
    const uint64_t bits = (uint64_t)(highest + 1023 - 40) << 52;
    double beyond; /* each step's size, but of those at the last place */
    memcpy(&beyond, &bits, sizeof beyond);
    if (highest < SIZES - 1 && beyond <= far) return 0;
    int64_t spikes = 0;
    for (int64_t i = 1; i + 1 < n; i++) {
        const double left = column[i - 1], value = column[i], right = column[i + 1];
        const double in = __builtin_fabs(value - left), out = __builtin_fabs(right - value);
        const double across = __builtin_fabs(right - left);
        spikes += (in > far) & (out > far) & (across <= near);
    }
    return spikes;
}

/* Count rows that equal the row before in all fields, unless each of them rests or has few levels. */
static int64_t count_repeated(const float *rows, const float *before, int64_t n, int64_t fields, const double *rest,
                              const int64_t *rest_begin, const int64_t *few_levels) {
    int64_t repeated = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *now = rows + i * fields, *earlier = i ? now - fields : before;
        if (!earlier || now[0] != earlier[0]) continue;
        int64_t field = 1;
        while (field < fields && now[field] == earlier[field]) field++;
        if (field < fields) continue;
        for (field = 0; field < fields; field++)
            if (!few_levels[field] &&
                !is_among(now[field], rest + rest_begin[field], rest_begin[field + 1] - rest_begin[field]))
                break;
        repeated += field < fields;
    }
    return repeated;
}

/* Four fields side by side. Compilers lower this to the vectors that a processor has. */
typedef double Quad __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t QuadMask __attribute__((vector_size(32), aligned(8), may_alias));

static inline __attribute__((always_inline)) Quad known_or_zero(Quad value) {
    return (Quad)((QuadMask)value & (QuadMask)(value == value));
}

typedef float Singles __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* Four values as double. */
static inline __attribute__((always_inline)) Quad load(const float *values) {
    return __builtin_convertvector(*(const Singles *)values, Quad);
}

/* Add values less their origin, and their squares, in the order of rows; a missing value adds nothing. */
static void add_rows(const float *rows, int64_t n, int64_t fields, const double *origin, double *total,
                     double *squares) {
    int64_t f = 0;
    for (; f + 4 < fields; f += 8) {
        /* Of five to seven fields left, some are in both quads, which store the same sums of them. */
        const int64_t g = f + 8 <= fields ? f + 4 : fields - 4;
        const Quad from = *(const Quad *)(origin + f), next_from = *(const Quad *)(origin + g);
        Quad sum = *(const Quad *)(total + f), next_sum = *(const Quad *)(total + g);
        Quad square = *(const Quad *)(squares + f), next_square = *(const Quad *)(squares + g);
        for (int64_t i = 0; i < n; i++) {
            const float *row = rows + i * fields;
            const Quad value = known_or_zero(load(row + f) - from), next = known_or_zero(load(row + g) - next_from);
            sum += value;
            square += value * value;
            next_sum += next;
            next_square += next * next;
        }
        *(Quad *)(total + f) = sum;
        *(Quad *)(total + g) = next_sum;
        *(Quad *)(squares + f) = square;
        *(Quad *)(squares + g) = next_square;
    }
    for (; f + 4 <= fields; f += 4) {
        const Quad from = *(const Quad *)(origin + f);
        Quad sum = *(const Quad *)(total + f), square = *(const Quad *)(squares + f);
        for (int64_t i = 0; i < n; i++) {
            const Quad value = known_or_zero(load(rows + i * fields + f) - from);
            sum += value;
            square += value * value;
        }
        *(Quad *)(total + f) = sum;
        *(Quad *)(squares + f) = square;
    }
    for (; f < fields; f++) {
        double sum = total[f], square = squares[f];
        for (int64_t i = 0; i < n; i++) {
            double value = rows[i * fields + f] - origin[f];
            value = value == value ? value : 0.0;
            sum += value;
            square += value * value;
        }
        total[f] = sum;
        squares[f] = square;
    }
}

/* Write fields of n rows, `fields` apart, to columns `stride` apart: four of them or, of fewer fields, all. */
static void transpose(const float *rows, int64_t n, int64_t fields, float *columns, int64_t stride) {
    int64_t i = 0;
    if (fields >= QUAD)
        for (; i + QUAD <= n; i += QUAD, rows += QUAD * fields) {
            const Singles a = *(const Singles *)rows, b = *(const Singles *)(rows + fields);
            const Singles c = *(const Singles *)(rows + 2 * fields), d = *(const Singles *)(rows + 3 * fields);
            const Singles ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
            const Singles ef = SHUFFLE(a, b, 2, 6, 3, 7), gh = SHUFFLE(c, d, 2, 6, 3, 7);
            *(Singles *)(columns + i) = SHUFFLE(ab, cd, 0, 1, 4, 5);
            *(Singles *)(columns + stride + i) = SHUFFLE(ab, cd, 2, 3, 6, 7);
            *(Singles *)(columns + 2 * stride + i) = SHUFFLE(ef, gh, 0, 1, 4, 5);
            *(Singles *)(columns + 3 * stride + i) = SHUFFLE(ef, gh, 2, 3, 6, 7);
        }
    for (; i < n; i++, rows += fields)
        for (int64_t field = 0; field < fields && field < QUAD; field++) columns[field * stride + i] = rows[field];
}

/* Count the rows of drift windows; see `count_rows` in row_counts.py.
 *
 * `rows` (windows, n, fields), after `before` (earlier <= 2, fields) if there is one window; `last` and `run` (fields)
 * end the rows before. Per field: `cuts` (33), `limits` (3): low, high, jump; `rest` from rest_begin[field] on; whether it
 * has few levels. Out: `counted` holds per window and field 34 bins, missing, outside, spikes, longest, open run, 4 rows
 * of extremes and 64 sizes (106 in all), then one count of repeated rows per window; `extremes` (windows, fields, 4);
 * sums are added to. `scratch`: 21 * (n + 2) bytes, aligned for float.
 */
int64_t EXPORT(count_rows)(int64_t windows, int64_t n, int64_t fields, int64_t earlier, const float *rows,
                           const float *before, const double *last, const int64_t *run, const float *cuts,
                           const double *limits, const double *rest, const int64_t *rest_begin,
                           const int64_t *few_levels, const double *origin, int64_t *counted, double *extremes,
                           int64_t *known, double *total, double *squares, float *scratch) {
    enum { MISSING = BINS, OUTSIDE, SPIKE, LONGEST, OPEN, EXTREME_ROWS, SIZE = EXTREME_ROWS + 4, PER_FIELD = SIZE + SIZES };
    const int64_t stride = n + 2;
    int32_t *keys = (int32_t *)(scratch + QUAD * stride);
    uint8_t *size = (uint8_t *)(keys + stride);
    int64_t *repeated = counted + windows * fields * PER_FIELD;
    for (int64_t window = 0; window < windows; window++) {
        const float *first = rows + window * n * fields;
        int64_t held = 0;
        for (int64_t field = 0; field < fields; field++) {
            int64_t *out = counted + (window * fields + field) * PER_FIELD;
            double *ends = extremes + (window * fields + field) * 4;
            const double low = limits[3 * field], high = limits[3 * field + 1], jump = limits[3 * field + 2];
            int32_t cut_keys[CUTS];
            for (int i = 0; i < CUTS; i++) cut_keys[i] = order_key(cuts[field * CUTS + i]);
            /* The last four are transposed together, though some may be for the second time. */
            const int64_t group = field / QUAD * QUAD, begins = group + QUAD <= fields || fields < QUAD ? group : fields - QUAD;
            if (field == group) transpose(first + begins, n, fields, scratch + earlier, stride);
            float *column = scratch + (field - begins) * stride;
            for (int64_t i = 0; i < earlier; i++) column[i] = before[i * fields + field];
            int32_t missing = 0;
            for (int64_t i = 0; i < n; i++) {
                keys[i] = order_key(column[earlier + i]);
                missing += keys[i] == INT32_MAX;
            }
            count_bins(keys, n, n - missing, cut_keys, out);
            out[MISSING] = missing;
            known[window * fields + field] += n - missing;
            find_extremes(keys, n, n - missing, ends, out + EXTREME_ROWS);
            out[OUTSIDE] = 0;
            if (-ends[0] < low || ends[2] > high)
                for (int64_t i = 0; i < n; i++)
                    out[OUTSIDE] += column[earlier + i] < low || column[earlier + i] > high;
            int64_t begin = earlier ? earlier - 1 : 0;
            const int64_t highest = count_sizes(column + begin, n + earlier - begin, size, out + SIZE);
            int has_gaps = missing > 0 || (earlier && column[0] != column[0]) || column[begin] != column[begin];
            out[LONGEST] = out[OPEN] = 1;
            const double *resting = rest + rest_begin[field];
            const int64_t rests = rest_begin[field + 1] - rest_begin[field];
            if (has_gaps)
                find_runs(column + earlier, n, last[field], run[field], resting, rests, out + LONGEST, out + OPEN);
            else if (out[SIZE] || n + earlier < 2)
                find_known_runs(column + earlier, n, last[field], run[field], resting, rests, size + (earlier ? 1 : 0),
                                out + LONGEST, out + OPEN);
            out[SPIKE] = 0;
            if (jump > 0 && (earlier || !(ends[2] + ends[0] <= SPIKE_SDS * jump)))
                out[SPIKE] = count_spikes(column, n + earlier, jump, highest);
            if (!field) held = out[SIZE];
        }
        repeated[window] = held ? count_repeated(first, earlier ? before + (earlier - 1) * fields : NULL, n, fields, rest,
                                                 rest_begin, few_levels)
                                : 0;
        add_rows(first, n, fields, origin, total + window * fields, squares + window * fields);
    }
    return DONE;
}

/* Add the values of n rows less their origin, and their squares, to the sums of each row's group, in the order of rows.
 * `groups` (n) are below the caller's count; `known`, `total` and `squares` (groups, width) are added to. Values are
 * `singles`, or `values` if there are none.
 */
int64_t EXPORT(add_groups)(int64_t n, int64_t width, const double *values, const float *singles, const double *origin,
                           const int64_t *groups, int64_t *known, double *total, double *squares) {
    for (int64_t i = 0; i < n; i++) {
        const double *row = values + i * width;
        const float *single = singles + i * width;
        int64_t *count = known + groups[i] * width;
        double *sum = total + groups[i] * width, *square = squares + groups[i] * width;
        for (int64_t f = 0; f < width; f++) {
            double value = (singles ? (double)single[f] : row[f]) - origin[f];
            count[f] += value == value;
            value = value == value ? value : 0.0;
            sum[f] += value;
            square[f] += value * value;
        }
    }
    return DONE;
}

/* Count n values per drift window by the edges (31) below them: bins (windows, 32). NaN is left out. */
int64_t EXPORT(count_scores)(int64_t windows, int64_t n, const double *values, const double *edges, int64_t *bins) {
    enum { EDGES = 31 };
    for (int64_t window = 0; window < windows; window++) {
        const double *part = values + window * n;
        int64_t *out = bins + window * (EDGES + 1), above[EDGES + 2];
        above[0] = above[EDGES + 1] = 0;
        for (int64_t i = 0; i < n; i++) above[0] += part[i] == part[i];
        for (int edge = 0; edge < EDGES; edge++) {
            int64_t count = 0;
            for (int64_t i = 0; i < n; i++) count += part[i] >= edges[edge];
            above[edge + 1] = count;
        }
        for (int bin = 0; bin <= EDGES; bin++) out[bin] = above[bin] - above[bin + 1];
    }
    return DONE;
}

/* Add the products of residuals (n, width), whose width is a multiple of 4, to those of fields i to i + 3 with fields j to
 * j + 3: (width, width). They are whole numbers far below 2**53 in sum, so that their order does not matter.
 */
static void add_products(const double *residuals, int64_t n, int64_t width, int64_t i, int64_t j, double *products) {
    Quad a = {0, 0, 0, 0}, b = a, c = a, d = a;
    for (int64_t row = 0; row < n; row++) {
        const double *left = residuals + row * width + i;
        const Quad right = *(const Quad *)(residuals + row * width + j);
        a += left[0] * right;
        b += left[1] * right;
        c += left[2] * right;
        d += left[3] * right;
    }
    products += i * width + j;
    *(Quad *)products += a;
    *(Quad *)(products + width) += b;
    *(Quad *)(products + 2 * width) += c;
    *(Quad *)(products + 3 * width) += d;
}

/* Sum the products of rows' residuals, in whole steps, by group: see `quantize_residuals` and `sum_products` in
 * correlation.py. Of each row: values less the mean of its class, in its sd, clipped to `limits[0]` sd, times `limits[1]`,
 * rounded. `order` (n) lists rows by group, of which there are `counts` (groups). Out (groups, width, width): products of
 * fields, and of a field that is always 1, which stands first; those of the upper half. `width`: 1 + fields, rounded up
 * to 4. `scratch`: 64 * width.
 */
int64_t EXPORT(sum_residuals)(int64_t total, int64_t fields, int64_t width, const float *values, const int64_t *classes,
                              const double *mean, const double *sd, const int64_t *order, const int64_t *counts,
                              const double *limits, double *products, double *scratch) {
    enum { BLOCK = 64 };
    const double clip = limits[0], scale = limits[1], magic = 6755399441055744.0; /* 1.5 * 2**52: adding it rounds */
    memset(scratch, 0, sizeof(double) * (size_t)(BLOCK * width));
    for (int64_t begin = 0; begin < total; products += width * width, counts++) {
        const int64_t end = begin + *counts;
        while (begin < end) {
            const int64_t n = end - begin < BLOCK ? end - begin : BLOCK;
            for (int64_t i = 0; i < n; i++) {
                const int64_t place = order[begin + i], class = classes[place];
                const double *from = mean + class * fields, *by = sd + class * fields;
                const float *row = values + place * fields;
                double *out = scratch + i * width;
                out[0] = 1.0;
                for (int64_t f = 0; f < fields; f++) {
                    double residual = (row[f] - from[f]) / by[f];
                    residual = residual < -clip ? -clip : residual;
                    residual = residual > clip ? clip : residual;
                    residual = residual == residual ? residual : 0.0;
                    out[1 + f] = (residual * scale + magic) - magic;
                }
            }
            for (int64_t i = 0; i < width; i += 4)
                for (int64_t j = i; j < width; j += 4) add_products(scratch, n, width, i, j, products);
            begin += n;
        }
    }
    return DONE;
}

/* Write n rows as double into rows that are `width` apart. */
static void widen(const float *rows, int64_t n, int64_t fields, double *out, int64_t width) {
    if (fields < QUAD)
        for (int64_t i = 0; i < n; i++)
            for (int64_t f = 0; f < fields; f++) out[i * width + f] = rows[i * fields + f];
    else
        for (int64_t f = 0; f < fields; f += QUAD) {
            /* Of five to seven fields left, some are written twice. */
            const int64_t place = f + QUAD <= fields ? f : fields - QUAD;
            for (int64_t i = 0; i < n; i++) *(Quad *)(out + i * width + place) = load(rows + i * fields + place);
        }
}

#define INLINE static inline __attribute__((always_inline))

/* Measure eight fields of n rows, `width` apart: means, variances, at least `least`, and mean squares, NaN of fields that do
 * not move. `whole` takes their values less the mean, rounded to whole steps of a fraction of 1 sd.
 */
INLINE void measure_moments(int has_missing, const double *padded, int64_t n, int64_t width, double steps, const double *least,
                            double *whole, double *means, double *variances, double *squares) {
    const double unknown = __builtin_nan(""), rows = (double)(int32_t)n;
    const double magic = 6755399441055744.0; /* 1.5 * 2**52: adding it rounds */
    Quad mean[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, square[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, scale[2];
    QuadMask count[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    double known[EIGHT], scales[EIGHT];
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 2; k++) {
            const Quad value = *(const Quad *)(padded + i * width + 4 * k);
            mean[k] += has_missing ? known_or_zero(value) : value;
            if (has_missing) count[k] -= value == value;
        }
    memcpy(means, mean, sizeof mean);
    for (int lane = 0; lane < EIGHT; lane++) {
        known[lane] = has_missing ? (double)(int32_t)count[lane / 4][lane % 4] : rows;
        means[lane] /= known[lane] > 0 ? known[lane] : 1.0;
    }
    memcpy(mean, means, sizeof mean);
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 2; k++) {
            const Quad off = *(const Quad *)(padded + i * width + 4 * k) - mean[k];
            const Quad value = has_missing ? known_or_zero(off) : off;
            *(Quad *)(whole + i * width + 4 * k) = value;
            square[k] += value * value;
        }
    memcpy(squares, square, sizeof square);
    for (int lane = 0; lane < EIGHT; lane++) {
        const double sum = squares[lane], mean_square = sum / rows;
        const double variance = sum / (known[lane] > 0 ? known[lane] : 1.0);
        const int is_known = 2 * known[lane] > rows, moves = is_known & (mean_square > least[lane]);
        means[lane] = is_known ? means[lane] : unknown;
        variances[lane] = is_known ? (variance > least[lane] ? variance : least[lane]) : unknown;
        squares[lane] = moves ? mean_square : unknown;
        scales[lane] = steps / __builtin_sqrt(squares[lane]);
    }
    memcpy(scale, scales, sizeof scale);
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 2; k++) {
            Quad *place = (Quad *)(whole + i * width + 4 * k);
            *place = (*place * scale[k] + magic) - magic;
        }
}

/* Compute mean square differences of eight fields' values `lag` rows apart, as shares of their mean `squares`. */
INLINE void measure_steps(int has_missing, const double *padded, int64_t n, int64_t width, int64_t lag,
                          const double *squares, double *shares) {
    const double unknown = __builtin_nan("");
    Quad square[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    QuadMask count[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    for (int64_t i = lag; i < n; i++)
        for (int k = 0; k < 2; k++) {
            const double *later = padded + i * width + 4 * k;
            const Quad step = *(const Quad *)later - *(const Quad *)(later - lag * width);
            const Quad known = has_missing ? known_or_zero(step) : step;
            square[k] += known * known;
            if (has_missing) count[k] -= step == step;
        }
    memcpy(shares, square, sizeof square);
    for (int lane = 0; lane < EIGHT; lane++) {
        const double known = (double)(int32_t)(has_missing ? count[lane / 4][lane % 4] : n > lag ? n - lag : 0);
        const double moved = shares[lane] / (known > 0 ? known : 1.0);
        shares[lane] = moved > 0 ? moved / squares[lane] : unknown;
    }
}

/* Correlate the first `pairs` pairs of fields by distance, of n rows of values in whole `steps`. */
static void correlate(const double *whole, int64_t n, int64_t fields, int64_t width, int64_t pairs, double steps,
                      double most, double *place) {
    const double scale = (double)(int32_t)n * (steps * steps);
    enum { AT_ONCE = 4 };
    for (int64_t distance = 1, left = pairs; left > 0; distance += AT_ONCE) {
        int64_t count[AT_ONCE];
        for (int k = 0; k < AT_ONCE; k++) {
            count[k] = left < fields - distance - k ? left : fields - distance - k;
            count[k] = count[k] > 0 ? count[k] : 0;
            left -= count[k];
        }
        for (int64_t f = 0; f < count[0]; f += 4) {
            /* Whole numbers below 2**53 in sum: their order does not matter. */
            Quad sums[AT_ONCE] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
            int64_t i = 0;
            /* A single distance: four rows at once, as one sum would wait for itself. */
            for (; i + AT_ONCE <= n && count[1] <= f; i += AT_ONCE)
                for (int k = 0; k < AT_ONCE; k++) {
                    const double *row = whole + (i + k) * width + f;
                    sums[k] += *(const Quad *)row * *(const Quad *)(row + distance);
                }
            if (i) sums[0] += (sums[1] + sums[2]) + sums[3];
            for (; i < n; i++) {
                const double *row = whole + i * width + f, *other = row + distance;
                const Quad values = *(const Quad *)row;
                sums[0] += values * *(const Quad *)other;
                sums[1] += values * *(const Quad *)(other + 1);
                sums[2] += values * *(const Quad *)(other + 2);
                sums[3] += values * *(const Quad *)(other + 3);
            }
            double *to = place + f;
            for (int k = 0; k < AT_ONCE; to += count[k], k++)
                for (int lane = 0; lane < 4 && f + lane < count[k]; lane++) {
                    double share = sums[k][lane] / scale;
                    share = share < -most ? -most : share;
                    to[lane] = share > most ? most : share;
                }
        }
        for (int k = 0; k < AT_ONCE; k++) place += count[k];
    }
}

INLINE void measure_window(int has_missing, int64_t n, int64_t fields, int64_t width, int64_t pairs, const double *least,
                           const int64_t *lags, const double *limits, double *out, double *padded) {
    double *whole = padded + n * width, moments[3][EIGHT], shares[EIGHT];
    for (int64_t f = 0; f < fields; f += EIGHT) {
        const size_t bytes = sizeof(double) * (size_t)(fields - f < EIGHT ? fields - f : EIGHT);
        measure_moments(has_missing, padded + f, n, width, limits[0], least + f, whole + f, moments[0], moments[1],
                        moments[2]);
        memcpy(out + f, moments[0], bytes);
        memcpy(out + fields + f, moments[1], bytes);
        for (int which = 0; which < 2 && lags[0]; which++) {
            measure_steps(has_missing, padded + f, n, width, lags[which], moments[2], shares);
            memcpy(out + (2 + which) * fields + f, shares, bytes);
        }
    }
    correlate(whole, n, fields, width, pairs, limits[0], limits[1], out + (lags[0] ? 4 : 2) * fields);
}

/* Compute statistics of model windows (windows, n, fields) without the logarithms: see `ModelWindows` in detector.py.
 *
 * Out (windows, 2 * fields + 2 * fields + pairs), the second part only with lags: means; variances, at least `floor`; mean
 * square differences of values `lags` rows apart, as shares of the mean square; correlations of the first `pairs` pairs
 * of fields by distance, of values rounded to steps of the field's sd / `limits[0]`, of at most `limits[1]`. NaN where
 * half of the values are missing or, but for means and variances, a field does not move more than its `floor`.
 * `scratch`: (2 * n + 1) * `width` + 4; the width is fields + 3, rounded up to 8.
 */
int64_t EXPORT(measure_windows)(int64_t windows, int64_t n, int64_t fields, int64_t width, int64_t pairs,
                                const float *values, const double *floor, const int64_t *lags, const double *limits,
                                double *out, double *scratch) {
    double *least = scratch, *padded = scratch + width;
    memset(scratch, 0, sizeof(double) * (size_t)(width * (1 + 2 * n) + 4));
    memcpy(least, floor, sizeof(double) * (size_t)fields);
    for (int64_t window = 0; window < windows; window++) {
        widen(values, n, fields, padded, width);
        int32_t missing = 0;
        for (int64_t i = 0; i < n * fields; i++) missing += values[i] - values[i] != 0;
        if (missing)
            measure_window(1, n, fields, width, pairs, least, lags, limits, out, padded);
        else
            measure_window(0, n, fields, width, pairs, least, lags, limits, out, padded);
        values += n * fields;
        out += pairs + (lags[0] ? 4 : 2) * fields;
    }
    return DONE;
}

/* Add values (n, width), `stride` apart and NaN left out, in whole steps of 1 / scale, to each row's group: counts, then
 * sums (groups, 2 * width), in whole numbers as int64 at the end.
 */
int64_t EXPORT(add_steps)(int64_t n, int64_t width, int64_t stride, int64_t groups, const double *values,
                          const double *scale, const int64_t *group, double *sums) {
    const double by = *scale, reach = 4503599627370496.0; /* 2**52: adding it rounds; from there on values are whole */
    for (int64_t i = 0; i < n; i++) {
        const double *row = values + i * stride;
        double *count = sums + group[i] * 2 * width, *sum = count + width;
        for (int64_t f = 0; f < width; f++) {
            const double value = row[f] * by, shift = __builtin_copysign(reach, value);
            const double step = __builtin_fabs(value) < reach ? (value + shift) - shift : value;
            count[f] += value == value ? 1.0 : 0.0;
            sum[f] += value == value ? step : 0.0;
        }
    }
    for (int64_t i = 0; i < groups * 2 * width; i++) {
        const int64_t whole = to_whole(sums[i]);
        memcpy(sums + i, &whole, sizeof whole);
    }
    return DONE;
}

/* Return 1 if one of n values is infinite. */
int64_t EXPORT(has_infinite)(int64_t n, const float *values) {
    uint32_t infinite = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        infinite |= (bits & 0x7fffffffu) == 0x7f800000u;
    }
    return infinite != 0;
}

/* Compare moments `n`, `mean`, `m2` (windows, classes, width) with `usual` means, `step` apart from window to window, and
 * `sd` (classes, width), over all classes. Out, by `kind`: VALUES (windows, 3, width): see `compute_test_values` in
 * moments.py; SQUARES (windows, width): mean squares in sd; MISFIT (windows, width): these less 1.
 */
int64_t EXPORT(compare_moments)(int64_t windows, int64_t classes, int64_t width, int64_t step, int64_t kind,
                                const int64_t *n, const double *mean, const double *m2, const double *usual,
                                const double *sd, double *out) {
    enum { VALUES, SQUARES, MISFIT };
    const int64_t size = classes * width;
    for (int64_t window = 0; window < windows; window++, n += size, mean += size, m2 += size, usual += step) {
        for (int64_t i = 0; i < width; i++) {
            int64_t count = 0;
            double value = 0, effect = 0, square = 0;
            for (int64_t class = 0; class < classes; class++) {
                const int64_t place = class * width + i;
                const double times = to_double(n[place]), off = mean[place] - usual[place], by = sd[place] * sd[place];
                count += n[place];
                if (kind == VALUES) {
                    const double shift = times * off, share = shift / sd[place], part = (m2[place] + shift * off) / by;
                    value += share;
                    effect += shift;
                    square += part;
                } else {
                    const double part = (m2[place] + times * (off * off)) / by - (kind == MISFIT ? times : 0.0);
                    square += part;
                }
            }
            const double rows = count > 1 ? to_double(count) : 1.0;
            if (kind == VALUES) {
                value /= rows;
                const double variance = square / rows - value * value;
                out[i] = value;
                out[width + i] = effect / rows;
                out[2 * width + i] = variance < 0 ? 0.0 : variance;
            } else {
                out[i] = square / rows;
            }
        }
        out += kind == VALUES ? 3 * width : width;
    }
    return DONE;
}

/* Average deviations of class means from `expected` (classes, width): see `compute_deviations` in class_means.py. `sums`
 * (windows, classes, 2 * width): counts, then sums in steps of 1 / scale. Out (windows, width); NaN without a count.
 */
int64_t EXPORT(average_deviations)(int64_t windows, int64_t classes, int64_t width, const int64_t *sums,
                                   const double *scale, const double *expected, double *out) {
    const double unknown = __builtin_nan(""), by = *scale;
    for (int64_t window = 0; window < windows; window++, sums += 2 * classes * width, out += width)
        for (int64_t i = 0; i < width; i++) {
            int64_t total = 0;
            double sum = 0;
            for (int64_t class = 0; class < classes; class++) {
                const int64_t n = sums[2 * class * width + i];
                const double times = to_double(n), mean = to_double(sums[(2 * class + 1) * width + i]) / by / (n > 1 ? times : 1.0);
                const double part = times * (mean - expected[class * width + i]);
                total += n;
                sum += part;
            }
            out[i] = total > 0 ? sum / to_double(total) : unknown;
        }
    return DONE;
}

/* Run two-sided CUSUMs of `tests` scores over windows, from the sums `before` (2, tests): see `run_windows` in cusum.py.
 * `z` (windows, tests), of which what is not finite is left out. Out: `values` (windows, 2, tests), and which windows
 * have a sum above its limit.
 */
int64_t EXPORT(run_cusums)(int64_t windows, int64_t tests, const double *z, const double *before, const double *slack,
                           const double *limit, const double *clip, double *values, int64_t *exceeds) {
    const double most = *clip;
    for (int64_t window = 0; window < windows; window++, z += tests, before = values, values += 2 * tests) {
        int64_t above = 0;
        for (int64_t test = 0; test < tests; test++) {
            const int is_tested = z[test] - z[test] == 0;
            double score = z[test] < -most ? -most : z[test];
            score = score > most ? most : score;
            score = is_tested ? score : 0.0;
            const double less = is_tested ? slack[test] : 0.0;
            const double high = before[test] + score - less, low = before[tests + test] - score - less;
            values[test] = high > 0 ? high : 0.0;
            values[tests + test] = low > 0 ? low : 0.0;
            above |= (values[test] > limit[test]) | (values[tests + test] > limit[test]);
        }
        exceeds[window] = above;
    }
    return DONE;
}

/* Add windows at `t` to the periods since each of the CUSUMs left zero: `count`, `effect` and `since` (2, tests). */
int64_t EXPORT(extend_periods)(int64_t windows, int64_t tests, const double *z, const double *before,
                               const double *values, const double *effects, const int64_t *t, int64_t *count,
                               double *effect, int64_t *since) {
    for (int64_t window = 0; window < windows; window++, z += tests, effects += tests, before = values, values += 2 * tests)
        for (int64_t side = 0; side < 2; side++)
            for (int64_t test = 0; test < tests; test++) {
                const int64_t place = side * tests + test;
                const int is_tested = z[test] - z[test] == 0, goes = values[place] > 0, went = before[place] > 0;
                count[place] = goes ? count[place] + is_tested : 0;
                effect[place] = goes ? effect[place] + (is_tested ? effects[test] : 0.0) : 0.0;
                since[place] = goes ? (went ? since[place] : t[window]) : 0;
            }
    return DONE;
}

/* Run weighted means of scores over windows, from those `before` (scores): see `run_windows` in mewma.py. `z` and `effects`
 * are `stride` apart; `numbers` is weight, clip, slack. Out: `means` (windows, scores) and a statistic of each.
 */
int64_t EXPORT(run_means)(int64_t windows, int64_t scores, int64_t stride, const double *z, const double *before,
                          const double *numbers, double *means, double *statistics) {
    const double weight = numbers[0], clip = numbers[1], slack = numbers[2];
    for (int64_t window = 0; window < windows; window++, z += stride, before = means, means += scores) {
        double sum = 0.0;
        for (int64_t i = 0; i < scores; i++) {
            double score = z[i] < -clip ? -clip : z[i];
            score = score > clip ? clip : score;
            const double moved = before[i] + weight * (score - before[i]);
            means[i] = z[i] - z[i] == 0 ? moved : before[i];
            double beyond = __builtin_fabs(means[i]) - slack;
            beyond = beyond > 0 ? beyond : 0.0;
            sum += beyond * beyond;
        }
        statistics[window] = sum;
    }
    return DONE;
}

/* Add windows at `t` to the periods since each of the means changed its sign: `count`, `effect` and `since` (scores). */
int64_t EXPORT(extend_signs)(int64_t windows, int64_t scores, int64_t stride, const double *z, const double *before,
                             const double *means, const double *effects, const int64_t *t, int64_t *count,
                             double *effect, int64_t *since) {
    for (int64_t window = 0; window < windows; window++, z += stride, effects += stride, before = means, means += scores)
        for (int64_t i = 0; i < scores; i++) {
            const int is_tested = z[i] - z[i] == 0, goes_on = (means[i] > 0) == (before[i] > 0);
            since[i] = goes_on && count[i] > 0 ? since[i] : t[window];
            count[i] = (goes_on ? count[i] : 0) + is_tested;
            effect[i] = (goes_on ? effect[i] : 0.0) + (is_tested ? effects[i] : 0.0);
        }
    return DONE;
}

/* Add scores (windows, fields), `stride` apart and NaN left out, to running means of float32 and their counts. */
int64_t EXPORT(add_means)(int64_t windows, int64_t fields, int64_t stride, const double *z, int64_t *count, float *mean) {
    for (int64_t window = 0; window < windows; window++, z += stride)
        for (int64_t i = 0; i < fields; i++) {
            const int is_tested = z[i] == z[i];
            count[i] += is_tested;
            const double so_far = mean[i], divisor = count[i] ? (double)(int32_t)count[i] : 1.0;
            mean[i] = (float)(so_far + (is_tested ? (z[i] - so_far) / divisor : 0.0));
        }
    return DONE;
}

/* A number of a producer's column, wherever it begins. */
typedef float LooseFloat __attribute__((aligned(1), may_alias));
typedef double LooseDouble __attribute__((aligned(1), may_alias));
typedef uint16_t LooseCode __attribute__((aligned(1), may_alias));

#define STACK(type)                                                                        \
    for (int64_t i = 0; i < count; i++) to[i * fields] = (float)((const type *)from)[first + i];

/* Stack `fields` columns of n values as float32: out (n, fields). `columns` holds their addresses, `kinds` their types:
 * 0 float32, 1 float64, 2 uint16.
 */
int64_t EXPORT(stack_columns)(int64_t n, int64_t fields, const int64_t *columns, const int64_t *kinds, float *out) {
    enum { VALUES = 2048 };
    int64_t block = VALUES;
    while (block > 8 && block * fields > VALUES) block >>= 1;
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        for (int64_t field = 0; field < fields; field++) {
            const void *from = (const void *)(uintptr_t)columns[field];
            float *to = out + first * fields + field;
            if (kinds[field] == 0) {
                STACK(LooseFloat)
            } else if (kinds[field] == 1) {
                STACK(LooseDouble)
            } else {
                STACK(LooseCode)
            }
        }
    }
    return DONE;
}

/* Fold n bytes, a multiple of 16 and at least 64, into 16 bytes: after a register of 0 they leave that CRC-32 register which
 * the data leave after `crc`. Source: Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ, Intel
 * 2009; the factors are x^(4*128 +- 32) and x^(128 +- 32) modulo the reflected polynomial. Return ABSENT without that
 * instruction.
 */
#ifdef __PCLMUL__
typedef long long Block __attribute__((vector_size(16), aligned(1), may_alias));

static inline Block fold_block(Block block, Block factors, const Block *next) {
    return __builtin_ia32_pclmulqdq128(block, factors, 0x00) ^ __builtin_ia32_pclmulqdq128(block, factors, 0x11) ^ *next;
}
#endif

int64_t EXPORT(fold_crc)(int64_t n, int64_t crc, const uint8_t *data, uint8_t *folded) {
#ifdef __PCLMUL__
    const Block far = {0x154442bd4, 0x1c6e41596}, near = {0x1751997d0, 0x0ccaa009e};
    const Block *next = (const Block *)data, *end = (const Block *)(data + n);
    Block sums[4] = {next[0] ^ (Block){crc, 0}, next[1], next[2], next[3]};
    for (next += 4; end - next >= 4; next += 4)
        for (int k = 0; k < 4; k++) sums[k] = fold_block(sums[k], far, next + k);
    for (int k = 1; k < 4; k++) sums[0] = fold_block(sums[0], near, sums + k);
    for (; next < end; next++) sums[0] = fold_block(sums[0], near, next);
    *(Block *)folded = sums[0];
    return DONE;
#else
    (void)n, (void)crc, (void)data, (void)folded;
    return ABSENT;
#endif
}

enum { INT8, UINT8, INT16, FLOAT32 };

static inline float scaled(float value, float mean, float std) {
    value = (value - mean) / std;
    return value - value == 0 ? value : 0.0f;
}

/* Round values / scale to whole numbers, half to even, add `zero`, clip to `low` and `high`; NaN becomes `fill`.
 * `numbers` is scale, zero, low, high, fill.
 */
#define QUANTIZE(type, real)                                                          \
    for (int64_t i = 0; i < n; i++) {                                                 \
        float value = (real) / scale;                                                 \
        /* Beyond all limits, and small enough that adding `magic` rounds. */         \
        value = value < -reach ? -reach : value;                                      \
        value = value > reach ? reach : value;                                        \
        value = (value + magic) - magic + zero;                                       \
        value = value < low ? low : value;                                            \
        value = value > high ? high : value;                                          \
        ((type *)out)[i] = (type)(int32_t)(value == value ? value : fill);            \
    }
#define QUANTIZE_NUMBERS                                                                                       \
    const float scale = numbers[0], zero = numbers[1], low = numbers[2], high = numbers[3], fill = numbers[4]; \
    const float reach = 1048576.0f, magic = 12582912.0f; /* 2**20, 1.5 * 2**23 */

int64_t EXPORT(quantize)(int64_t n, int64_t kind, const float *values, const float *numbers, void *out) {
    QUANTIZE_NUMBERS
    if (kind == INT8) {
        QUANTIZE(int8_t, values[i])
    } else if (kind == UINT8) {
        QUANTIZE(uint8_t, values[i])
    } else {
        QUANTIZE(int16_t, values[i])
    }
    return DONE;
}

/* Build a model's input: windows of n values each, which begin at row `starts` (windows) of `rows` (_, columns), scaled
 * as (value - mean) / std with `mean` and `std` (n); what is not finite becomes 0. Then they are quantized as by
 * `quantize`, unless `kind` is FLOAT32. Out: out (windows, n), and how many values of each window are not finite.
 */
int64_t EXPORT(build_windows)(int64_t windows, int64_t n, int64_t columns, int64_t kind, const float *rows,
                              const int64_t *starts, const float *mean, const float *std, const float *numbers,
                              char *out, int64_t *missing) {
    QUANTIZE_NUMBERS
    for (int64_t window = 0; window < windows; window++) {
        const float *values = rows + starts[window] * columns;
        int32_t unknown = 0;
        for (int64_t i = 0; i < n; i++) unknown += !(values[i] - values[i] == 0);
        missing[window] = unknown;
        if (kind == INT8) {
            QUANTIZE(int8_t, scaled(values[i], mean[i], std[i]))
            out += n;
        } else if (kind == UINT8) {
            QUANTIZE(uint8_t, scaled(values[i], mean[i], std[i]))
            out += n;
        } else if (kind == INT16) {
            QUANTIZE(int16_t, scaled(values[i], mean[i], std[i]))
            out += 2 * n;
        } else {
            for (int64_t i = 0; i < n; i++) ((float *)out)[i] = scaled(values[i], mean[i], std[i]);
            out += 4 * n;
        }
    }
    return DONE;
}

/* Sum n values in the order of NumPy's sum of contiguous values: by eight in blocks of up to 128, blocks by halves. */
static double sum_pairwise(const double *values, int64_t n) {
    if (n < 8) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += values[i];
        return sum;
    }
    if (n > 128) {
        const int64_t half = n / 2 - n / 2 % 8;
        return sum_pairwise(values, half) + sum_pairwise(values + half, n - half);
    }
    Quad low = *(const Quad *)values, high = *(const Quad *)(values + 4);
    int64_t i = 8;
    for (; i + 8 <= n; i += 8) {
        low += *(const Quad *)(values + i);
        high += *(const Quad *)(values + i + 4);
    }
    double sum = ((low[0] + low[1]) + (low[2] + low[3])) + ((high[0] + high[1]) + (high[2] + high[3]));
    for (; i < n; i++) sum += values[i];
    return sum;
}

#define SQUARE(type)                                                                          \
    for (int64_t i = 0; i < n; i++) {                                                         \
        const float output = ((float)((const type *)outputs)[i] - zero) * scale;              \
        const double error = (double)output - (double)scaled(values[i], mean[i], std[i]);     \
        scratch[i] = error * error;                                                           \
    }

/* Mean squared differences (windows) between a model's outputs (windows, n), in numbers of `kind`, and its input, which is
 * given as to `build_windows`. `numbers` is scale, zero of the outputs. `scratch`: n.
 */
int64_t EXPORT(mean_errors)(int64_t windows, int64_t n, int64_t columns, int64_t kind, const float *rows,
                            const int64_t *starts, const float *mean, const float *std, const float *numbers,
                            const char *outputs, double *scratch, double *errors) {
    const float scale = numbers[0], zero = numbers[1];
    for (int64_t window = 0; window < windows; window++) {
        const float *values = rows + starts[window] * columns;
        if (kind == INT8) {
            SQUARE(int8_t)
            outputs += n;
        } else if (kind == UINT8) {
            SQUARE(uint8_t)
            outputs += n;
        } else if (kind == INT16) {
            SQUARE(int16_t)
            outputs += 2 * n;
        } else {
            SQUARE(float)
            outputs += 4 * n;
        }
        errors[window] = sum_pairwise(scratch, n) / (double)(int32_t)n;
    }
    return DONE;
}

enum { SHARES = BINS - 2 };
static const double LEAST_SHARE = 1e-4, TINY = 1e-300;

static inline double larger(double a, double b) {
    return a > b ? a : b;
}

/* Compare `counts` (n, 34) with shares of the `reference` (fields, 32), whose fields n runs through again and again: see
 * `compute_all` in divergence.py. `bounds` (fields, 33), `sd` (fields). Out: `shares` (n, 32) of the counts; `ratios`
 * (3, n, 32), of which `sum_divergences` needs the logarithms; and the last two of `sizes` (n, 4).
 */
int64_t EXPORT(compare_shares)(int64_t n, int64_t fields, const int64_t *counts, const double *reference,
                               const double *bounds, const double *sd, double *shares, double *ratios, double *sizes) {
    for (int64_t row = 0, field = 0; row < n; row++, field = field + 1 < fields ? field + 1 : 0, counts += BINS, shares += SHARES, ratios += SHARES, sizes += 4) {
        const double *p = reference + field * SHARES, *bound = bounds + field * (SHARES + 1);
        double before = 0, gap = 0, area[SHARES];
        int64_t total = 0;
        for (int bin = 0; bin < BINS; bin++) total += counts[bin];
        for (int bin = 0; bin < SHARES; bin++) {
            int64_t count = counts[1 + bin];
            if (bin == 0) count += counts[0];
            if (bin == SHARES - 1) count += counts[BINS - 1];
            const double q = to_double(count) / (total > 1 ? to_double(total) : 1.0);
            const double middle = larger((p[bin] + q) / 2, TINY);
            shares[bin] = q;
            ratios[bin] = larger(p[bin], LEAST_SHARE) / larger(q, LEAST_SHARE);
            ratios[n * SHARES + bin] = larger(p[bin], TINY) / middle;
            ratios[2 * n * SHARES + bin] = larger(q, TINY) / middle;
            const double after = bin ? before + (q - p[bin]) : q - p[bin];
            double height = __builtin_fabs(before + after) / 2;
            if (before * after < 0)
                height = (before * before + after * after) / (2 * __builtin_fabs(after - before));
            area[bin] = height * (bound[bin + 1] - bound[bin]);
            gap = larger(gap, __builtin_fabs(after));
            before = after;
        }
        const double scale = sd[field];
        sizes[2] = gap;
        sizes[3] = sum_pairwise(area, SHARES) / (scale > 0 ? scale : __builtin_inf());
    }
    return DONE;
}

/* Sum the first two of `sizes` (n, 4), of `shares` and the logarithms of `ratios` that `compare_shares` gave. */
int64_t EXPORT(sum_divergences)(int64_t n, int64_t fields, const double *reference, const double *shares,
                                const double *logs, double *sizes) {
    for (int64_t row = 0, field = 0; row < n; row++, field = field + 1 < fields ? field + 1 : 0) {
        const double *p = reference + field * SHARES;
        double parts[SHARES], surprise[SHARES];
        for (int bin = 0; bin < SHARES; bin++) {
            parts[bin] = (larger(p[bin], LEAST_SHARE) - larger(shares[bin], LEAST_SHARE)) * logs[bin];
            surprise[bin] = p[bin] * logs[n * SHARES + bin] + shares[bin] * logs[2 * n * SHARES + bin];
        }
        sizes[0] = sum_pairwise(parts, SHARES);
        sizes[1] = __builtin_sqrt(larger(sum_pairwise(surprise, SHARES) / 2, 0.0));
        shares += SHARES;
        logs += SHARES;
        sizes += 4;
    }
    return DONE;
}
