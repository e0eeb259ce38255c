/* Compiled loops of the runtime: from feature files to a batch, from raw outputs to events, and the metric.

   Every function works on memory that its caller owns, keeps no state between calls and starts no thread, so any number
   of threads may call it at once; Python calls it without the interpreter lock. Arithmetic is IEEE float32 as written:
   -ffp-contract=off, and a fused multiply-add only where the code says fmaf. Results are the same bits on every machine.

   Letters:  T steps   P points of all levels   C classes   N candidates   K events kept */

#ifndef CCNET_KERNELS_H
#define CCNET_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { SOFT, HARD, NONE };

/* Grid and post-processing settings; `runtime/kernels/library.py` has the same fields in the same order. */
typedef struct {
    int64_t steps, levels, classes; /* level l has steps >> l points, 1 << l steps apart */
    int64_t top_k, max_segments;
    int32_t method, multiclass;
    float logit_below; /* a logit slightly below that of pre_nms_score: cheap to compare with */
    float pre_nms_score, min_length;
    float sigma, iou_threshold, min_score, voting_threshold;
    double stride_frames, half_window_frames, fps;
} Settings;

/* Whether classes are suppressed on their own; otherwise all compete as one. */
static inline int by_class(const Settings *settings) { return settings->multiclass || settings->method == NONE; }

/* Errors of `decode`: the detail is a point. */
enum { OUT_OF_MEMORY = -1, LOGITS_NOT_FINITE = -2, OFFSETS_NOT_FINITE = -3, BAD_CANDIDATE = -4 };

/* The part of a video that one engine output covers. */
typedef struct {
    const float *logits;  /* [P, C] */
    const float *offsets; /* [P, C, 2] */
    int64_t first;        /* step of the video at which the output starts, added to the segments */
    int64_t begin, end;   /* only points at these steps of the output count */
} Output;

/* Most candidates that one output can give. */
int64_t most_candidates(const Settings *settings);

/* Fill segments [N, 2] in steps, scores [N], labels [N]; returns N or an error, whose point goes to *detail. */
int64_t decode(const Settings *settings, const Output *output, float *segments, float *scores, int64_t *labels,
               int64_t *detail);

/* Fill kept [K] with indices and kept_scores [K] with final scores; returns K or an error, with the candidate in
   *detail. Labels lie in [first_label, first_label + groups). */
int64_t suppress(const Settings *settings, int64_t count, const float *segments, const float *scores,
                 const int64_t *labels, int64_t first_label, int64_t groups, int64_t *kept, float *kept_scores,
                 int64_t *detail);

/* voted [K, 2] = mean of all segments [N, 2] with IoU >= threshold to segment kept[k], weighted by scores [N]. */
void vote(int64_t count, const float *segments, const float *scores, int64_t kept_count, const int64_t *kept,
          float threshold, float *voted);

#endif
