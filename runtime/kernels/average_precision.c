/* The loops of `runtime.average_precision`.

   Letters:  N predictions   M ground-truth events   G (class, video) pairs with ground truth   C classes
             K thresholds. Predictions stand by class, best first. */

#include "kernels.h"

#include <math.h>

/* The event of a group with the highest tIoU to a prediction, of equal ones the last, if that is at least `threshold`
   and it is not taken; -1 if there is none. */
static int64_t best_match(const double *prediction, const double *truth, const uint8_t *real, const uint8_t *taken,
                          int64_t begin, int64_t end, double threshold) {
    const double start = prediction[0], stop = prediction[1];
    int64_t best = -1;
    double best_tiou = threshold;
    for (int64_t j = begin; j < end; j++) {
        if (!real[j] || taken[j]) continue;
        const double left = start > truth[2 * j] ? start : truth[2 * j];
        const double right = stop < truth[2 * j + 1] ? stop : truth[2 * j + 1];
        const double overlap = right > left ? right - left : 0.0;
        const double tiou = overlap / ((truth[2 * j + 1] - truth[2 * j]) + (stop - start) - overlap);
        if (tiou >= best_tiou) {
            best = j;
            best_tiou = tiou;
        }
    }
    return best;
}

/* Area under the interpolated precision-recall curve, from the last prediction of a class to the first: the precision
   there, and the best one from there on. Each prediction counts `weight` times. */
static double area_under_curve(const uint8_t *hit, const int64_t *weight, int64_t count, int64_t positives) {
    int64_t hits = 0, seen = 0;
    for (int64_t i = 0; i < count; i++) {
        hits += hit[i] * weight[i];
        seen += weight[i];
    }
    double area = 0.0, best_precision = 0.0;
    for (int64_t i = count - 1; i >= 0; i--) {
        if (hit[i] && weight[i]) {
            const double precision = (double)hits / (double)seen;
            if (precision > best_precision) best_precision = precision;
            area += (double)weight[i] * best_precision;
            hits -= weight[i];
        }
        seen -= weight[i];
    }
    return area / (double)positives;
}

/* Fill hit [K, N]: whether a prediction takes an event.

   predictions [N, 2]; group [N] of each, or -1; truth [M, 2] by group; real [M] false for duplicates; group_begin
   [G + 1]. All zero before: hit, and the work space taken [K, M]. */
EXPORT void ccnet_match(int64_t count_thresholds, int64_t count, int64_t count_truth, const double *predictions,
                        const int64_t *group, const double *truth, const uint8_t *real, const int64_t *group_begin,
                        const double *thresholds, uint8_t *taken, uint8_t *hit) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; group[i] >= 0 && k < count_thresholds; k++) {
            const int64_t begin = group_begin[group[i]], end = group_begin[group[i] + 1];
            const int64_t best = best_match(predictions + 2 * i, truth, real, taken + k * count_truth, begin, end,
                                            thresholds[k]);
            if (best < 0) continue;
            taken[k * count_truth + best] = 1;
            hit[k * count + i] = 1;
        }
}

/* Fill result [K, C] from hit [K, N], weight [N], class_begin [C + 1] and positives [C], which are weighted, too. */
EXPORT void ccnet_average_precision(int64_t classes, int64_t count_thresholds, int64_t count, const uint8_t *hit,
                                    const int64_t *weight, const int64_t *class_begin, const int64_t *positives,
                                    double *result) {
    for (int64_t c = 0; c < classes; c++)
        for (int64_t k = 0; k < count_thresholds; k++) {
            const int64_t begin = class_begin[c], number = class_begin[c + 1] - begin;
            const uint8_t *hits = hit + k * count + begin;
            result[k * classes + c] = positives[c] ? area_under_curve(hits, weight + begin, number, positives[c]) : NAN;
        }
}

/* real[j] = no earlier real event of the same group has both ends within `tolerance` seconds of truth[j]. */
EXPORT void ccnet_mark_duplicates(int64_t groups, const double *truth, const int64_t *group_begin, double tolerance,
                                  uint8_t *real) {
    for (int64_t g = 0; g < groups; g++)
        for (int64_t j = group_begin[g]; j < group_begin[g + 1]; j++) {
            real[j] = 1;
            for (int64_t other = group_begin[g]; other < j; other++)
                if (real[other] && fabs(truth[2 * j] - truth[2 * other]) <= tolerance &&
                    fabs(truth[2 * j + 1] - truth[2 * other + 1]) <= tolerance)
                    real[j] = 0;
        }
}
