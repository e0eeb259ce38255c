/* Raw outputs of a batch -> events in seconds. */

#include "kernels.h"

#include <stdlib.h>

typedef struct {
    float *segments, *scores, *event_segments, *event_scores;
    int64_t *labels, *kept;
} Workspace;

static int64_t detect_one(const Settings *settings, const Output *output, double duration, double first_step,
                          Workspace work, double *segments, float *scores, int64_t *labels) {
    int64_t detail;
    const int64_t count = decode(settings, output, work.segments, work.scores, work.labels, &detail);
    if (count <= 0) return count;
    const int64_t number = suppress(settings, count, work.segments, work.scores, work.labels, 0,
                                    by_class(settings) ? settings->classes : 1, work.kept, work.event_scores, &detail);
    if (number < 0) return number;
    const int votes = !by_class(settings) && settings->voting_threshold > 0;
    if (votes)
        vote(count, work.segments, work.scores, number, work.kept, settings->voting_threshold, work.event_segments);
    int64_t inside = 0;
    for (int64_t k = 0; k < number; k++) {
        const float *segment = votes ? work.event_segments + 2 * k : work.segments + 2 * work.kept[k];
        for (int side = 0; side < 2; side++) {
            const double frames = ((double)segment[side] + first_step) * settings->stride_frames;
            double seconds = (frames + settings->half_window_frames) / settings->fps;
            seconds = seconds > 0.0 ? seconds : 0.0;
            segments[2 * inside + side] = seconds < duration ? seconds : duration;
        }
        scores[inside] = work.event_scores[k];
        labels[inside] = work.labels[work.kept[k]];
        inside += segments[2 * inside + 1] > segments[2 * inside];
    }
    return inside;
}

/* Events of `batch` videos, one output each: logits [B, P, C], offsets [B, P, C, 2], valid steps `lengths` [B],
   `durations` [B] in seconds -> segments [B, K, 2] in seconds, scores [B, K], labels [B, K] and how many of the K each
   video has, `counts` [B], or an error. */
EXPORT void ccnet_detect(const Settings *settings, int64_t batch, const float *logits, const float *offsets,
                         const int32_t *lengths, const double *durations, double first_step, double *segments,
                         float *scores, int64_t *labels, int64_t *counts, int64_t most) {
    const int64_t candidates = most_candidates(settings);
    int64_t points = 0;
    for (int64_t level = 0; level < settings->levels; level++) points += settings->steps >> level;
    char *memory = malloc((size_t)(candidates * 20 + most * 20));
    int64_t *labels_at = (int64_t *)memory, *kept_at = labels_at + candidates;
    float *rest = (float *)(kept_at + most);
    const Workspace work = {rest, rest + 2 * candidates, rest + 3 * candidates, rest + 3 * candidates + 2 * most,
                            labels_at, kept_at};
    for (int64_t b = 0; b < batch; b++) {
        const int64_t entry = b * points * settings->classes;
        const Output output = {logits + entry, offsets + 2 * entry, 0, 0, lengths[b]};
        counts[b] = memory == NULL ? OUT_OF_MEMORY
                                   : detect_one(settings, &output, durations[b], first_step, work,
                                                segments + 2 * b * most, scores + b * most, labels + b * most);
    }
    free(memory);
}
