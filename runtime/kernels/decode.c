/* Raw outputs -> candidates, level by level, best first within a level; of equal logits the earlier entry first. */

#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#define BLOCK 32
#define RADIX 256
#define PREFETCHED 24 /* candidates ahead: offsets come from memory */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A number that is lower the higher the value; both zeros are equal. Its own inverse but for the sign of zero. */
static inline uint32_t descending(float value) {
    uint32_t bits = bits_of(value + 0.0f);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
}

static inline float ascending(uint32_t key) { return float_of(key >> 31 ? key : ~key & 0x7FFFFFFFu); }

/* Indices of the values above the threshold, in order; returns their number, or -1 - i for a value that is not finite.
   A block of which nothing passes, the usual case of a trained network, costs two vector compares. */
static int64_t find_above(const float *values, int64_t count, float threshold, uint32_t *found) {
    int64_t number = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t stop = start + BLOCK < count ? start + BLOCK : count;
        uint32_t any = 0, infinite = 0;
        if (stop - start == BLOCK) {
            for (int64_t i = 0; i < BLOCK; i++) {
                any |= values[start + i] > threshold ? 1u : 0u;
                infinite |= (bits_of(values[start + i]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
            }
        } else {
            for (int64_t i = start; i < stop; i++) {
                any |= values[i] > threshold ? 1u : 0u;
                infinite |= (bits_of(values[i]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
            }
        }
        if (infinite)
            for (int64_t i = start; i < stop; i++)
                if (!isfinite(values[i])) return -1 - i;
        if (any)
            for (int64_t i = start; i < stop; i++) {
                found[number] = (uint32_t)i;
                number += values[i] > threshold;
            }
    }
    return number;
}

/* Keep the `best` highest of the values at `found`, in their order; of equal ones the first. best < number. */
static void select_best(const float *values, uint32_t *found, int64_t number, int64_t best, uint32_t *keys) {
    uint32_t counts[2048];
    uint32_t prefix = 0, decided = 0;
    int64_t wanted = best; /* of those that share the decided bits with the last one kept */
    for (int64_t i = 0; i < number; i++) keys[i] = descending(values[found[i]]);
    for (int shift = 21; shift >= -1; shift -= 11) {
        const int low = shift < 0 ? 0 : shift, bits = shift < 0 ? 10 : 11;
        memset(counts, 0, sizeof counts);
        for (int64_t i = 0; i < number; i++)
            if ((keys[i] & decided) == prefix) counts[keys[i] >> low & ((1u << bits) - 1)]++;
        uint32_t digit = 0;
        while (wanted > (int64_t)counts[digit]) wanted -= counts[digit++];
        prefix |= digit << low;
        decided |= ((1u << bits) - 1) << low;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < number; i++) {
        const int equal = keys[i] == prefix;
        found[kept] = found[i];
        kept += keys[i] < prefix || (equal && wanted > 0);
        wanted -= equal;
    }
}

/* Sort by the upper halves, equal ones in their order; returns where the result is, `items` or `spare`. */
static uint64_t *sort_items(uint64_t *items, uint64_t *spare, int64_t number) {
    if (number <= 32) {
        for (int64_t i = 1; i < number; i++) {
            const uint64_t item = items[i];
            int64_t hole = i;
            for (; hole > 0 && items[hole - 1] > item; hole--) items[hole] = items[hole - 1];
            items[hole] = item;
        }
        return items;
    }
    uint32_t counts[4][RADIX] = {{0}};
    for (int64_t i = 0; i < number; i++)
        for (int digit = 0; digit < 4; digit++) counts[digit][items[i] >> (32 + 8 * digit) & 255]++;
    for (int digit = 0; digit < 4; digit++) {
        const int shift = 32 + 8 * digit;
        if (counts[digit][items[0] >> shift & 255] == number) continue;
        uint32_t position[RADIX], sum = 0;
        for (int value = 0; value < RADIX; value++) {
            position[value] = sum;
            sum += counts[digit][value];
        }
        for (int64_t i = 0; i < number; i++) spare[position[items[i] >> shift & 255]++] = items[i];
        uint64_t *swapped = items;
        items = spare;
        spare = swapped;
    }
    return items;
}

/* exp as NumPy computes it in float32 where the machine fuses multiply and add; x in [-87, 80]. */
static inline __attribute__((always_inline)) float exponential(float x) {
    const float rounded = (x * 1.44269504088896341f + 0x1.8p+23f) - 0x1.8p+23f;
    const float rest = fmaf(rounded, -1.42860677e-6f, fmaf(rounded, -6.93145752e-1f, x));
    float over = fmaf(5.082762527590693718096e-04f, rest, 6.757896990527504603057e-03f);
    over = fmaf(over, rest, 5.114512081637298353406e-02f);
    over = fmaf(over, rest, 2.473615434895520810817e-01f);
    over = fmaf(over, rest, 7.257664613233124478488e-01f);
    over = fmaf(over, rest, 9.999999999980870924916e-01f);
    float under = fmaf(2.159509375685829852307e-02f, rest, -2.742335390411667452936e-01f);
    under = fmaf(under, rest, 1.0f);
    return float_of(bits_of(over / under) + ((uint32_t)(int32_t)rounded << 23));
}

static inline __attribute__((always_inline)) void sigmoid_loop(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float negative = -values[i];
        negative = negative < 80.0f ? negative : 80.0f; /* no overflow; and below -87 the sum is 1 anyway */
        negative = negative > -87.0f ? negative : -87.0f;
        values[i] = 1.0f / (1.0f + exponential(negative));
    }
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void sigmoid_fused(float *values, int64_t count) {
    sigmoid_loop(values, count);
}

/* Asked once: on a virtual machine the question takes longer than the sigmoids. Not every compiler's library has
   __builtin_cpu_supports. */
static int can_fuse(void) {
    static volatile int known = -1;
    if (known < 0) {
        unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
        const unsigned needed = bit_FMA | bit_AVX | bit_OSXSAVE;
        int able = __get_cpuid(1, &a, &b, &c, &d) && (c & needed) == needed;
        if (able) __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* does the system keep the wide registers? */
        able = able && (low & 6) == 6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
        known = able;
    }
    return known;
}
#endif

static void sigmoid(float *values, int64_t count) {
#ifdef __x86_64__
    if (can_fuse()) {
        sigmoid_fused(values, count);
        return;
    }
#endif
    sigmoid_loop(values, count); /* the same bits: fmaf rounds once, in hardware or not */
}

int64_t most_candidates(const Settings *settings) {
    int64_t total = 0;
    for (int64_t level = 0; level < settings->levels; level++) {
        const int64_t entries = (settings->steps >> level) * settings->classes;
        total += entries < settings->top_k ? entries : settings->top_k;
    }
    return total;
}

typedef struct {
    uint32_t *found, *keys; /* [steps * classes]: entries of one level */
    uint64_t *items, *spare;
    float *segments;  /* [top_k, 2] in entry order, and */
    uint32_t *labels; /* [top_k] likewise */
} Workspace;

static int64_t ceiling(int64_t value, int64_t stride) { return value > 0 ? (value + stride - 1) / stride : 0; }

/* One level of an output; returns the number of candidates, scores still being logits, or an error. */
static int64_t decode_level(const Settings *settings, const Output *output, int64_t level, int64_t level_point,
                            Workspace work, float *segments, float *scores, int64_t *labels, int64_t *bad_offset,
                            int64_t *detail) {
    const int64_t classes = settings->classes, stride = (int64_t)1 << level;
    const int64_t begin = ceiling(output->begin, stride), end = ceiling(output->end, stride);
    if (end <= begin) return 0;
    const int64_t first = (level_point + begin) * classes;
    const float *logits = output->logits + first, *offsets = output->offsets + 2 * first;
    int64_t number = find_above(logits, (end - begin) * classes, settings->logit_below, work.found);
    if (number < 0) {
        *detail = level_point + begin + (-1 - number) / classes;
        return LOGITS_NOT_FINITE;
    }
    if (number > settings->top_k) {
        select_best(logits, work.found, number, settings->top_k, work.keys);
        number = settings->top_k;
    }
    const double per_class = 1.0 / (double)classes; /* (i + 0.5) / classes never rounds across an integer */
    const float scale = (float)stride, shift = (float)output->first;
    uint32_t infinite = 0;
    for (int64_t i = 0; i < number; i++) {
        const uint32_t entry = work.found[i];
        const uint32_t point = (uint32_t)(((double)entry + 0.5) * per_class);
        __builtin_prefetch(offsets + 2 * work.found[i + PREFETCHED < number ? i + PREFETCHED : i]);
        const float centre = (float)((begin + point) * stride);
        work.labels[i] = entry - point * (uint32_t)classes;
        const float left = offsets[2 * entry], right = offsets[2 * entry + 1];
        infinite |= (bits_of(left) & 0x7F800000u) == 0x7F800000u || (bits_of(right) & 0x7F800000u) == 0x7F800000u;
        work.segments[2 * i] = centre - left * scale;
        work.segments[2 * i + 1] = centre + right * scale;
        work.items[i] = (uint64_t)descending(logits[entry]) << 32 | (uint64_t)i;
    }
    const uint64_t *sorted = sort_items(work.items, work.spare, number);
    for (int64_t i = 0; i < number; i++) {
        const uint32_t place = (uint32_t)sorted[i];
        if (infinite && *bad_offset < 0) {
            const int64_t entry = work.found[place];
            if (!(isfinite(offsets[2 * entry]) && isfinite(offsets[2 * entry + 1])))
                *bad_offset = level_point + begin + entry / classes;
        }
        segments[2 * i] = work.segments[2 * place];
        segments[2 * i + 1] = work.segments[2 * place + 1];
        scores[i] = ascending((uint32_t)(sorted[i] >> 32));
        labels[i] = work.labels[place];
    }
    sigmoid(scores, number);
    int64_t kept = 0;
    for (int64_t i = 0; i < number; i++) {
        const float start = segments[2 * i], stop = segments[2 * i + 1], score = scores[i];
        const int good = score > settings->pre_nms_score && stop - start > settings->min_length;
        segments[2 * kept] = start + shift;
        segments[2 * kept + 1] = stop + shift;
        scores[kept] = score;
        labels[kept] = labels[i];
        kept += good;
    }
    return kept;
}

int64_t decode(const Settings *settings, const Output *output, float *segments, float *scores, int64_t *labels,
               int64_t *detail) {
    const int64_t entries = settings->steps * settings->classes;
    const int64_t best = entries < settings->top_k ? entries : settings->top_k;
    char *memory = malloc((size_t)(entries * 8 + best * 28));
    if (memory == NULL) return OUT_OF_MEMORY;
    uint64_t *items = (uint64_t *)memory;
    uint32_t *found = (uint32_t *)(items + 2 * best), *labels_at = found + 2 * entries;
    const Workspace work = {found, found + entries, items, items + best, (float *)(labels_at + best), labels_at};
    int64_t total = 0, point = 0, bad_offset = -1;
    for (int64_t level = 0; level < settings->levels && total >= 0; level++) {
        const int64_t number = decode_level(settings, output, level, point, work, segments + 2 * total, scores + total,
                                            labels + total, &bad_offset, detail);
        total = number < 0 ? number : total + number;
        point += settings->steps >> level;
    }
    free(memory);
    if (total >= 0 && bad_offset >= 0) {
        *detail = bad_offset;
        return OFFSETS_NOT_FINITE;
    }
    return total;
}

/* `decode` for Python. */
EXPORT int64_t ccnet_decode(const Settings *settings, const float *logits, const float *offsets, int64_t first,
                            int64_t begin, int64_t end, float *segments, float *scores, int64_t *labels,
                            int64_t *detail) {
    const Output output = {logits, offsets, first, begin, end};
    return decode(settings, &output, segments, scores, labels, detail);
}
