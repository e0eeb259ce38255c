/* The loops of `runtime.average_precision`.

   Letters:  N predictions   M ground-truth events   G (class, video) pairs with ground truth   C classes
             K thresholds */

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
   there, and the best one from there on. */
static double area_under_curve(const uint8_t *hit, int64_t count, int64_t positives) {
    int64_t hits = 0;
    for (int64_t i = 0; i < count; i++) hits += hit[i];
    double area = 0.0, best_precision = 0.0;
    for (int64_t i = count - 1; i >= 0; i--) {
        if (!hit[i]) continue;
        const double precision = (double)hits / (double)(i + 1);
        if (precision > best_precision) best_precision = precision;
        area += best_precision;
        hits--;
    }
    return area / (double)positives;
}

/* Match all predictions and fill result [K, C].

   predictions [N, 2] by class, best first; group [N] of each, or -1; class_begin [C + 1]; truth [M, 2] by group; real
   [M] false for duplicates; group_begin [G + 1]; positives [C]. Work space, all zero: taken [K, M], hit [K, N]. */
EXPORT void ccnet_average_precision(int64_t classes, int64_t count_thresholds, int64_t count, int64_t count_truth,
                                    const double *predictions, const int64_t *group, const int64_t *class_begin,
                                    const double *truth, const uint8_t *real, const int64_t *group_begin,
                                    const int64_t *positives, const double *thresholds, uint8_t *taken, uint8_t *hit,
                                    double *result) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; group[i] >= 0 && k < count_thresholds; k++) {
            const int64_t begin = group_begin[group[i]], end = group_begin[group[i] + 1];
            const int64_t best = best_match(predictions + 2 * i, truth, real, taken + k * count_truth, begin, end,
                                            thresholds[k]);
            if (best < 0) continue;
            taken[k * count_truth + best] = 1;
            hit[k * count + i] = 1;
        }
    for (int64_t c = 0; c < classes; c++)
        for (int64_t k = 0; k < count_thresholds; k++) {
            const uint8_t *hits = hit + k * count + class_begin[c];
            const int64_t number = class_begin[c + 1] - class_begin[c];
            result[k * classes + c] = positives[c] ? area_under_curve(hits, number, positives[c]) : NAN;
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
