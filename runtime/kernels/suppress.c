/* Of many overlapping candidates, the best events.

   The released program suppresses every class to its end, then keeps the best of all. Here the classes advance
   together: the class whose best remaining segment has the highest score gives up that segment and suppresses its
   others. As suppression never raises a score, segments come out in their final order, and the first `max_segments` are
   the result; most classes are never touched beyond the search for their best segment. Within a class the arithmetic
   (float32, decays multiplied in one by one) and the order in memory, which decides ties, are the released program's. */

#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    float start, stop, length, score;
} Row;

typedef struct {
    int64_t first, last, best; /* rows of a class, and its best one */
} Group;

/* 2^(i/32) / 2^(i/32 exponent): the table and polynomial of the exp that glibc, musl and Arm share (MIT licence, Arm
   Limited), written out so that every machine gets the same bits. Within 0.502 ulp. */
static const uint64_t POWERS[32] = {
    0x3ff0000000000000, 0x3fefd9b0d3158574, 0x3fefb5586cf9890f, 0x3fef9301d0125b51, 0x3fef72b83c7d517b,
    0x3fef54873168b9aa, 0x3fef387a6e756238, 0x3fef1e9df51fdee1, 0x3fef06fe0a31b715, 0x3feef1a7373aa9cb,
    0x3feedea64c123422, 0x3feece086061892d, 0x3feebfdad5362a27, 0x3feeb42b569d4f82, 0x3feeab07dd485429,
    0x3feea47eb03a5585, 0x3feea09e667f3bcd, 0x3fee9f75e8ec5f74, 0x3feea11473eb0187, 0x3feea589994cce13,
    0x3feeace5422aa0db, 0x3feeb737b0cdc5e5, 0x3feec49182a3f090, 0x3feed503b23e255d, 0x3feee89f995ad3ad,
    0x3feeff76f2fb5e47, 0x3fef199bdd85529c, 0x3fef3720dcef9069, 0x3fef5818dcfba487, 0x3fef7c97337b9b5f,
    0x3fefa4afa2a490da, 0x3fefd0765b6e4540,
};

/* exp(x) for x <= 0. */
static inline float decay(float x) {
    if (x < -103.0f) return 0.0f;
    const double scaled = 0x1.71547652b82fep+5 * (double)x;
    double rounded = scaled + 0x1.8p52;
    uint64_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    rounded -= 0x1.8p52;
    const double rest = scaled - rounded;
    bits = POWERS[bits % 32] + (bits << 47);
    double power;
    memcpy(&power, &bits, sizeof power);
    const double upper = 0x1.c6af84b912394p-20 * rest + 0x1.ebfce50fac4f3p-13;
    return (float)((upper * (rest * rest) + (0x1.62e42ff0c52d6p-6 * rest + 1.0)) * power);
}

/* Group the candidates that take part by class, in their order; returns 0 or BAD_CANDIDATE. */
static int64_t fill_rows(const Settings *settings, int64_t count, const float *segments, const float *scores,
                         const int64_t *labels, int64_t first_label, int64_t groups, Row *rows, int64_t *index,
                         Group *group, float *best_score, int64_t *detail) {
    const float least = settings->min_score;
    const int soft = settings->method == SOFT, none = settings->method == NONE;
    for (int64_t i = 0; i < count; i++) {
        const float length = segments[2 * i + 1] - segments[2 * i];
        if (!(length >= 0.0f && length < INFINITY && scores[i] - scores[i] == 0.0f)) {
            *detail = i;
            return BAD_CANDIDATE;
        }
        if (soft || scores[i] > least || (none && scores[i] == least))
            group[groups > 1 ? labels[i] - first_label : 0].last++;
    }
    int64_t row = 0;
    for (int64_t g = 0; g < groups; g++) {
        group[g].first = row;
        row += group[g].last;
        group[g].last = group[g].first;
        best_score[g] = -INFINITY;
    }
    for (int64_t i = 0; i < count; i++) {
        if (!(soft || scores[i] > least || (none && scores[i] == least))) continue;
        const int64_t g = groups > 1 ? labels[i] - first_label : 0;
        row = group[g].last++;
        index[row] = i;
        const float start = segments[2 * i], stop = segments[2 * i + 1];
        rows[row] = (Row){start, stop, stop - start + 1e-6f, scores[i]};
        if (scores[i] > best_score[g]) {
            best_score[g] = scores[i];
            group[g].best = row;
        }
    }
    return 0;
}

static inline float iou_with(Row chosen, Row other, float *overlap) {
    const float left = chosen.start > other.start ? chosen.start : other.start;
    const float right = chosen.stop < other.stop ? chosen.stop : other.stop;
    *overlap = right > left ? right - left : 0.0f;
    return *overlap / (chosen.length + other.length - *overlap);
}

/* Decay the others of a class, drop what falls below `min_score`, and find its new best; returns that one's score.
   The chosen row leaves by trading places with the first; the last one takes the place of a dropped one. */
static float advance_soft(const Settings *settings, Row *rows, int64_t *index, Group *group) {
    const float sigma = settings->sigma, least = settings->min_score;
    const Row chosen = rows[group->best];
    int64_t row = group->first, last = group->last;
    float best = -INFINITY;
    rows[group->best] = rows[row];
    index[group->best] = index[row];
    group->first = ++row;
    while (row < last) {
        float overlap;
        const float iou = iou_with(chosen, rows[row], &overlap);
        if (overlap > 0.0f) rows[row].score *= decay(-(iou * iou) / sigma);
        if (rows[row].score < least) {
            last--;
            rows[row] = rows[last];
            index[row] = index[last];
            continue;
        }
        if (rows[row].score > best) {
            best = rows[row].score;
            group->best = row;
        }
        row++;
    }
    group->last = last;
    return best;
}

/* Remove the chosen one and those with an IoU of at least `threshold`; order stays. Returns the new best score. */
static float advance_hard(float threshold, Row *rows, int64_t *index, Group *group) {
    const int64_t taken = group->best;
    const Row chosen = rows[taken];
    int64_t free_row = group->first;
    float best = -INFINITY;
    for (int64_t row = group->first; row < group->last; row++) {
        float overlap;
        const float iou = iou_with(chosen, rows[row], &overlap);
        if (row == taken || iou >= threshold) continue;
        rows[free_row] = rows[row];
        index[free_row] = index[row];
        if (rows[free_row].score > best) {
            best = rows[free_row].score;
            group->best = free_row;
        }
        free_row++;
    }
    group->last = free_row;
    return best;
}

int64_t suppress(const Settings *settings, int64_t count, const float *segments, const float *scores,
                 const int64_t *labels, int64_t first_label, int64_t groups, int64_t *kept, float *kept_scores,
                 int64_t *detail) {
    char *memory = malloc((size_t)(count * (sizeof(Row) + 8) + groups * (sizeof(Group) + 4)));
    if (memory == NULL) return OUT_OF_MEMORY;
    Row *rows = (Row *)memory;
    int64_t *index = (int64_t *)(rows + count);
    Group *group = (Group *)(index + count);
    float *best_score = (float *)(group + groups);
    memset(group, 0, (size_t)groups * sizeof(Group));
    int64_t number = fill_rows(settings, count, segments, scores, labels, first_label, groups, rows, index, group,
                               best_score, detail);
    const float threshold = settings->method == NONE ? INFINITY : settings->iou_threshold;
    while (number >= 0 && number < settings->max_segments) {
        int64_t top = 0;
        for (int64_t g = 1; g < groups; g++)
            if (best_score[g] > best_score[top]) top = g;
        if (best_score[top] == -INFINITY) break;
        kept[number] = index[group[top].best];
        kept_scores[number] = best_score[top];
        number++;
        best_score[top] = settings->method == SOFT ? advance_soft(settings, rows, index, group + top)
                                                   : advance_hard(threshold, rows, index, group + top);
    }
    free(memory);
    return number;
}

void vote(int64_t count, const float *segments, const float *scores, int64_t kept_count, const int64_t *kept,
          float threshold, float *voted) {
    for (int64_t k = 0; k < kept_count; k++) {
        const float left = segments[2 * kept[k]], right = segments[2 * kept[k] + 1];
        double weight = 0, start = 0, stop = 0;
        for (int64_t i = 0; i < count; i++) {
            const float begin = segments[2 * i], end = segments[2 * i + 1];
            const float overlap = (right < end ? right : end) - (left > begin ? left : begin);
            if (overlap > 0.0f && overlap / ((right - left) + (end - begin) - overlap) >= threshold) {
                weight += scores[i];
                start += (double)scores[i] * begin;
                stop += (double)scores[i] * end;
            }
        }
        voted[2 * k] = weight > 0 ? (float)(start / weight) : left;
        voted[2 * k + 1] = weight > 0 ? (float)(stop / weight) : right;
    }
}

/* `suppress`, then `vote` where it applies, for Python: events [K, 2], their scores and the indices `kept`. */
EXPORT int64_t ccnet_suppress(const Settings *settings, int64_t count, const float *segments, const float *scores,
                              const int64_t *labels, int64_t first_label, int64_t groups, float *events,
                              float *event_scores, int64_t *kept, int64_t *detail) {
    const int64_t number = suppress(settings, count, segments, scores, labels, first_label, groups, kept, event_scores,
                                    detail);
    if (number > 0 && !by_class(settings) && settings->voting_threshold > 0)
        vote(count, segments, scores, number, kept, settings->voting_threshold, events);
    else
        for (int64_t k = 0; k < number; k++) memcpy(events + 2 * k, segments + 2 * kept[k], 2 * sizeof(float));
    return number;
}
