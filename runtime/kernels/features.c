/* Feature files and arrays -> rows of a batch: float32, checked, one copy.

   Letters:  n steps of a video   T steps of the network   C width of a file or modality */

#define _GNU_SOURCE
#include "kernels.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define CHUNK_BYTES (256 * 1024) /* read and checked at a time: stays in the second-level cache */
#define MOST_VECTORS 256
#define MOST_FILES 16
#define MOST_PATH 4096
#define LEAST_HEADER 64
#define MOST_HEADER 128 /* what numpy.save writes for a matrix */

/* Kind of number: its size, negative where its bytes are swapped. */
enum { HALF = 2, SINGLE = 4, DOUBLE = 8 };

/* What `ccnet_read_videos` says of a video that it did not put into a row. */
enum { NOT_REGULAR = -1, TOO_LONG = -2 };

static inline int is_infinite(uint32_t bits) { return (bits & 0x7F800000u) == 0x7F800000u; }

static inline float single_from_half(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7FFF) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f; /* exact, also for numbers below the normal ones; infinity is told by the caller */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

/* Convert `count` numbers; returns whether all are finite in float32. Neither side needs to be aligned. */
static int convert(int64_t kind, const char *source, int64_t count, float *target) {
    uint32_t infinite = 0;
    if (kind == SINGLE || kind == -SINGLE) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, source + 4 * i, 4);
            if (kind < 0) bits = __builtin_bswap32(bits);
            infinite |= is_infinite(bits);
            memcpy(target + i, &bits, 4);
        }
    } else if (kind == HALF || kind == -HALF) {
        for (int64_t i = 0; i < count; i++) {
            uint16_t half;
            memcpy(&half, source + 2 * i, 2);
            if (kind < 0) half = (uint16_t)(half << 8 | half >> 8);
            infinite |= (half & 0x7C00) == 0x7C00;
            target[i] = single_from_half(half);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            uint64_t wide;
            double value;
            memcpy(&wide, source + 8 * i, 8);
            if (kind < 0) wide = __builtin_bswap64(wide);
            memcpy(&value, &wide, 8);
            target[i] = (float)value;
            uint32_t bits;
            memcpy(&bits, target + i, 4);
            infinite |= is_infinite(bits);
        }
    }
    return !infinite;
}

static int all_finite(const float *values, int64_t count) {
    uint32_t infinite = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        infinite |= is_infinite(bits);
    }
    return !infinite;
}

#define GATHERED_ROWS 16 /* of an array in Fortran order: a cache line of its columns */

#define GATHER(type)                                                                                             \
    for (int64_t i = 0; i < columns; i++)                                                                        \
        for (int64_t row = 0; row < rows; row++)                                                                 \
            memcpy(lines + (row * columns + i) * (int64_t)sizeof(type), source + row * row_stride + i * column_stride, \
                   sizeof(type));

/* Rows of an array whose neighbouring columns are not neighbours in memory. */
static void gather(int64_t size, const char *source, int64_t rows, int64_t columns, int64_t row_stride,
                   int64_t column_stride, char *lines) {
    if (size == SINGLE) {
        GATHER(uint32_t)
    } else if (size == HALF) {
        GATHER(uint16_t)
    } else {
        GATHER(uint64_t)
    }
}

/* Copy an array [n, C] of any strides (in bytes) into rows that are `target_stride` floats apart; rows from `kept` on
   are checked only. Returns 1, 0 where a number is not finite in float32, or OUT_OF_MEMORY. */
EXPORT int64_t ccnet_copy_rows(int64_t kind, const char *source, int64_t steps, int64_t columns, int64_t row_stride,
                               int64_t column_stride, float *target, int64_t target_stride, int64_t kept) {
    const int64_t size = kind < 0 ? -kind : kind;
    const int direct = column_stride == size;
    char *lines = malloc((size_t)(columns * ((direct ? 0 : GATHERED_ROWS) * size + 4)));
    if (lines == NULL) return OUT_OF_MEMORY;
    float *unused = (float *)lines;
    char *gathered = lines + 4 * columns;
    int finite = 1;
    for (int64_t step = 0; step < steps && finite; step += GATHERED_ROWS) {
        const int64_t rows = steps - step < GATHERED_ROWS ? steps - step : GATHERED_ROWS;
        const char *from = source + step * row_stride;
        if (!direct) gather(size, from, rows, columns, row_stride, column_stride, gathered);
        for (int64_t row = 0; row < rows && finite; row++) {
            const char *line = direct ? from + row * row_stride : gathered + row * columns * size;
            const int64_t place = step + row;
            if (kind == SINGLE && place >= kept && ((uintptr_t)line & 3) == 0)
                finite = all_finite((const float *)line, columns);
            else
                finite = convert(kind, line, columns, place < kept ? target + place * target_stride : unused);
        }
    }
    free(lines);
    return finite;
}

typedef struct {
    int file;
    int64_t kind, steps, width, start; /* where the data begin, in bytes */
} Array;

static int64_t read_number(const char **text) {
    int64_t number = 0;
    int digits = 0;
    for (; **text >= '0' && **text <= '9' && digits < 12; digits++) number = 10 * number + (*(*text)++ - '0');
    return digits > 0 ? number : -1;
}

static int skip(const char **text, const char *expected) {
    const size_t size = strlen(expected);
    if (strncmp(*text, expected, size) != 0) return 0;
    *text += size;
    return 1;
}

/* Open a file whose header is, to the letter, what numpy.save writes for a matrix of floats in C order, and that is long
   enough for its data. Anything else, right or wrong, is left to the reader in Python, which says what it is. */
static int open_array(const char *path, Array *array) {
    char header[MOST_HEADER + 1] = {0};
    struct stat facts;
    array->file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (array->file < 0) return 0;
    const ssize_t size = pread(array->file, header, MOST_HEADER, 0);
    if (size < LEAST_HEADER || memcmp(header, "\x93NUMPY\x01\x00", 8) != 0) return 0;
    const int64_t end = 10 + (uint8_t)header[8] + 256 * (uint8_t)header[9];
    if (end > size || header[end - 1] != '\n') return 0;
    header[end - 1] = 0;
    const char *text = header + 10;
    if (!skip(&text, "{'descr': '")) return 0;
    const int swapped = *text == (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '>' : '<');
    if (*text != '<' && *text != '>') return 0;
    text++;
    if (!skip(&text, "f")) return 0;
    array->kind = *text == '2' ? HALF : *text == '4' ? SINGLE : *text == '8' ? DOUBLE : 0;
    if (array->kind == 0) return 0;
    text++;
    if (!skip(&text, "', 'fortran_order': False, 'shape': (")) return 0;
    array->steps = read_number(&text);
    if (!skip(&text, ", ")) return 0;
    array->width = read_number(&text);
    if (!skip(&text, "), }") || text[strspn(text, " ")] != 0) return 0;
    if (array->steps < 1 || array->width < 1 || array->width > INT32_MAX) return 0;
    array->start = end;
    if (fstat(array->file, &facts) != 0 || !S_ISREG(facts.st_mode)) return 0;
    const int64_t present = (facts.st_size - end) / array->kind / array->width;
    if (swapped) array->kind = -array->kind;
    return array->steps <= present;
}

/* Read `size` bytes at `start` into rows that lie `stride` bytes apart; a row is `width` bytes. */
static int read_rows(int file, int64_t start, char *target, int64_t rows, int64_t width, int64_t stride) {
    struct iovec vectors[MOST_VECTORS];
    if (width == stride) {
        width *= rows;
        rows = 1;
    }
    for (int64_t row = 0; row < rows; row++)
        vectors[row] = (struct iovec){target + row * stride, (size_t)width};
    return preadv(file, vectors, (int)rows, start) == rows * width; /* a signal or a cut file: Python looks again */
}

/* Put the first `kept` steps of a file into its columns of a row of the batch; all of its steps are checked. */
static int read_array(const Array *array, float *target, int64_t target_stride, int64_t kept, char *chunk) {
    const int64_t size = array->kind < 0 ? -array->kind : array->kind, width = array->width * size;
    int64_t most = CHUNK_BYTES / width;
    most = most < 1 ? 1 : most > MOST_VECTORS ? MOST_VECTORS : most;
    for (int64_t step = 0; step < array->steps;) {
        int64_t rows = array->steps - step < most ? array->steps - step : most;
        const int64_t start = array->start + step * width;
        if (step < kept && rows > kept - step) rows = kept - step;
        if (array->kind == SINGLE && step < kept) {
            float *into = target + step * target_stride;
            if (!read_rows(array->file, start, (char *)into, rows, width, 4 * target_stride)) return 0;
            for (int64_t row = 0; row < rows; row++)
                if (!all_finite(into + row * target_stride, array->width)) return 0;
        } else {
            if (!read_rows(array->file, start, chunk, rows, width, width)) return 0;
            float *unused = (float *)(chunk + most * width);
            for (int64_t row = 0; row < rows; row++) {
                float *into = step < kept ? target + (step + row) * target_stride : unused;
                if (!convert(array->kind, chunk + row * width, array->width, into)) return 0;
            }
        }
        step += rows;
    }
    return 1;
}

/* The files of one video: 1, or 0 where something about them needs a closer look. */
static int open_video(const char *prefix, const char *suffixes, int64_t visual_files, int64_t files, const int64_t *dims,
                      Array *arrays, int64_t *steps, int64_t *opened) {
    char path[MOST_PATH];
    int64_t widths[2] = {0, 0};
    const size_t length = strlen(prefix);
    for (int64_t i = 0; i < files; i++, suffixes += strlen(suffixes) + 1) {
        if (length + strlen(suffixes) >= sizeof path) return 0;
        memcpy(path, prefix, length);
        strcpy(path + length, suffixes);
        const int regular = open_array(path, arrays + i);
        *opened = i + 1;
        if (!regular) return 0;
        steps[i] = arrays[i].steps;
        widths[i >= visual_files] += arrays[i].width;
    }
    return widths[0] == dims[0] && widths[1] == dims[1];
}

/* Read videos into rows of a batch, one after the other, until the rows are used up.

   prefixes: path of each video up to the suffix, ended by a zero each; suffixes: of the visual files, then of the audio
   files, likewise. visual [rows, T, Cv], audio [rows, T, Ca], lengths [rows].
   found [videos, 1 + files]: the row of the video, or NOT_REGULAR or TOO_LONG, and the steps of each file. `crop`: keep
   the first T steps of a longer video, which is TOO_LONG otherwise. Returns how many videos were looked at, or
   OUT_OF_MEMORY. */
EXPORT int64_t ccnet_read_videos(const char *prefixes, int64_t videos, const char *suffixes, int64_t visual_files,
                                 int64_t files, int64_t visual_dim, int64_t audio_dim, int64_t length,
                                 int64_t crop, float *visual, float *audio, int32_t *lengths, int64_t rows,
                                 int64_t *found) {
    const int64_t dims[2] = {visual_dim, audio_dim};
    const int64_t widest = dims[0] > dims[1] ? dims[0] : dims[1];
    char *chunk = malloc((size_t)(CHUNK_BYTES + 12 * widest));
    if (chunk == NULL) return OUT_OF_MEMORY;
    int64_t row = 0, video = 0;
    for (; video < videos && row < rows; video++, prefixes += strlen(prefixes) + 1) {
        Array arrays[MOST_FILES];
        int64_t opened = 0, *steps = found + video * (files + 1) + 1, shortest = INT64_MAX;
        int good = files <= MOST_FILES &&
                   open_video(prefixes, suffixes, visual_files, files, dims, arrays, steps, &opened);
        for (int64_t i = 0; i < files && good; i++) shortest = steps[i] < shortest ? steps[i] : shortest;
        const int too_long = good && !crop && shortest > length;
        const int64_t kept = shortest < length ? shortest : length;
        int64_t columns[2] = {0, 0};
        for (int64_t i = 0; i < files && good && !too_long; i++) {
            const int modality = i >= visual_files;
            float *target = (modality ? audio : visual) + row * length * dims[modality] + columns[modality];
            good = read_array(arrays + i, target, dims[modality], kept, chunk);
            columns[modality] += arrays[i].width;
        }
        for (int64_t i = 0; i < opened; i++)
            if (arrays[i].file >= 0) close(arrays[i].file);
        steps[-1] = !good ? NOT_REGULAR : too_long ? TOO_LONG : row;
        if (!good || too_long) continue;
        for (int modality = 0; modality < 2; modality++) {
            float *rest = (modality ? audio : visual) + (row * length + kept) * dims[modality];
            memset(rest, 0, (size_t)((length - kept) * dims[modality]) * 4);
        }
        lengths[row++] = (int32_t)kept;
    }
    free(chunk);
    return video;
}
