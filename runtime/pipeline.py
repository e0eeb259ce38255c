"""Videos through reading, the engine and post-processing, one batch at a time.

A thread takes a batch through all stages, so that nothing is handed from thread to thread and the interpreter is
entered a few times for a batch: files are read and outputs post-processed in one compiled call each. `Localizer` runs
a pipeline in its caller's thread, `runtime.stream` in several.

Shapes: n steps of one video   T steps of the network   B rows of a batch   P points of all levels   C classes
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from runtime.backends.base import Float32, Int32
from runtime.batches import Allocate, Batch
from runtime.coverage import Gaps, files_note, find_gaps
from runtime.decode import Candidates
from runtime.detections import Detections
from runtime.errors import CCNetError, FeatureError
from runtime.features import FeatureFiles, VideoFeatures, check_shapes, copy_rows
from runtime.postprocess import PostProcessor
from runtime.spec import ModelSpec, PostProcessing
from runtime.windows import Window, decode_window, merge_windows, plan_windows

LongVideos = Literal["crop", "windows"]
Video: TypeAlias = "VideoFeatures | FeatureFiles | tuple[Any, Any] | tuple[Any, Any, float | None]"
"""Checked features, their files, or arrays: (visual [n, Cv], audio [n, Ca]) or (visual, audio, duration in seconds)."""
Source: TypeAlias = "Video | Callable[[], Video] | CCNetError"
Item: TypeAlias = "tuple[str, Source] | tuple[str, Source, float | None]"


@dataclass(frozen=True)
class Localized:
    """Result of one video of a stream: detections, or the error that it has of its own."""

    video_id: str
    duration: float | None
    """Seconds; None where the video could not be read and no duration was given."""
    detections: Detections | None
    error: CCNetError | None = None
    gaps: Gaps | None = None
    """What of the video its features or the network do not cover."""

    @property
    def note(self) -> str | None:
        """What a person should know about the features: `gaps` as text."""
        return None if self.gaps is None else str(self.gaps)


Results: TypeAlias = Generator[Localized, None, None]
"""What a stream gives; its `close` stops the threads."""


@dataclass(eq=False, slots=True)
class Task:
    """A video on its way; `result` is what became of it, an exception where that is to end the stream."""

    video_id: str
    source: Source | None
    """None once it was opened: a result may wait long, and should not keep the features."""
    duration: float | None = None
    gaps: Gaps | None = None
    windows: Sequence[Window] = ()
    """Empty for a video that is one row of a batch."""
    found: list[Candidates] = field(default_factory=list)
    """Of the windows that went through the engine, which they do in order."""
    result: Localized | BaseException | None = None

    def settle(self, found: Detections | CCNetError) -> None:
        """Make detections, or an error of the video's own, the result."""
        if isinstance(found, CCNetError):
            self.result = Localized(self.video_id, self.duration, None, found, self.gaps)
        else:
            self.result = Localized(self.video_id, self.duration, found, None, self.gaps)


Take: TypeAlias = Callable[[int, bool], Sequence[Task]]
"""(count, wait): at most so many tasks; none where there are none now, or with `wait` where no more will come."""
Finish: TypeAlias = Callable[[Sequence[Task]], None]
"""Is given tasks that have their result."""
Infer: TypeAlias = Callable[[Float32, Float32, Int32], tuple[Float32, Float32]]


@dataclass(frozen=True)
class Workspace:
    """The arrays that a thread uses again for every batch: its inputs, and the events of its outputs."""

    batch: Batch
    post_process: PostProcessor


@dataclass(frozen=True)
class Pipeline:
    """How videos are cut and post-processed. Holds nothing of a run, so any number of threads may run one."""

    spec: ModelSpec
    post: PostProcessing
    long_videos: LongVideos
    window_overlap: float

    def workspace(self, size: int, allocate: Allocate | None = None) -> Workspace:
        """Return what a thread needs for batches of up to `size` rows; `allocate` as for `Batch`."""
        return Workspace(Batch(self.spec, size, allocate), PostProcessor(self.spec, self.post, size))

    def run(self, take: Take, finish: Finish, infer: Infer, workspace: Workspace) -> None:
        """Process tasks until there are none any more, in batches as full as `take` makes them.

        Errors become results of the tasks; what `take` and `finish` raise ends the run.
        """
        run = _Run(self, take, finish, workspace)
        try:
            while run.fill():
                run.process(infer)
        finally:
            workspace.batch.clear()


class _Run:
    """One thread's way through a pipeline."""

    def __init__(self, pipeline: Pipeline, take: Take, finish: Finish, workspace: Workspace) -> None:
        self._pipeline, self._take, self._finish = pipeline, take, finish
        self._batch, self._detect = workspace.batch, workspace.post_process
        self._rows: list[tuple[Task, int]] = []  # task and index of its window, of each row of the batch
        self._waiting: deque[tuple[Task, VideoFeatures, int]] = deque()  # windows that are not in a batch yet

    def fill(self) -> bool:
        """Fill the batch; False where there is nothing to fill it with any more."""
        self._batch.clear()
        self._rows = []
        while self._batch.free:
            if self._waiting:
                self._add(*self._waiting.popleft())
                continue
            tasks = self._take(self._batch.free, not self._rows)
            if not tasks:
                break
            self._place(tasks)
        return bool(self._rows)

    def process(self, infer: Infer) -> None:
        """Run the engine on the batch and post-process its outputs."""
        tasks = list(dict.fromkeys(task for task, _ in self._rows if task.result is None))
        inputs = self._batch.inputs()
        try:
            self._post_process(inputs[2], *infer(*inputs))
        except BaseException as error:  # noqa: BLE001  it is for the consumer of the videos
            for task in tasks:
                task.result = error
        self._finish([task for task in tasks if task.result is not None])

    def _place(self, tasks: Sequence[Task]) -> None:
        """Put new videos, no more than the batch has free rows, into it; what is cut into windows waits."""
        files: list[tuple[Task, FeatureFiles]] = []
        arrays: list[tuple[Task, VideoFeatures]] = []
        for task in tasks:
            video = self._open(task)
            if isinstance(video, FeatureFiles):
                files.append((task, video))
            elif video is not None:
                arrays.append((task, video))
        if files:
            self._read(files)
        for task, features in arrays:
            self._plan(task, features)

    def _open(self, task: Task) -> VideoFeatures | FeatureFiles | None:
        """Return what the source of a video gives, arrays checked but for their values; None for one that fails."""
        source, task.source = task.source, None
        try:
            if isinstance(source, CCNetError):
                raise source
            video = source() if callable(source) else source
            return video if isinstance(video, FeatureFiles) else self._check(task, video)
        except BaseException as error:  # noqa: BLE001  it is for the consumer of the video
            self._fail(task, error)
            return None

    def _read(self, files: Sequence[tuple[Task, FeatureFiles]]) -> None:
        spec, crop = self._pipeline.spec, self._pipeline.long_videos == "crop"
        looked_at = self._batch.read([video for _, video in files], crop=crop)
        for (task, video), (row, steps) in zip(files, looked_at, strict=True):
            if row >= 0:
                self._settle(task, min(steps), files_note(video.video_id, spec.layout, steps))
                self._rows.append((task, 0))
        for (task, video), (row, _) in zip(files, looked_at, strict=True):
            if row < 0:
                self._look_closer(task, video)

    def _look_closer(self, task: Task, video: FeatureFiles) -> None:
        """Read files that are long, of an unusual format, or wrong: then the error says what is."""
        try:
            features = video.read(self._pipeline.spec)
        except BaseException as error:  # noqa: BLE001  as above
            self._fail(task, error)
        else:
            self._plan(task, features)

    def _check(self, task: Task, video: Any) -> VideoFeatures:
        spec = self._pipeline.spec
        if not isinstance(video, VideoFeatures):
            visual, audio, *rest = video
            if rest and rest[0] is not None:
                task.duration = float(rest[0])
            return check_shapes(visual, audio, spec, name=task.video_id)
        found = (video.visual.shape[1], video.audio.shape[1])
        if found != (spec.visual_dim, spec.audio_dim):
            expected = (spec.visual_dim, spec.audio_dim)
            raise FeatureError(
                f"{task.video_id}: features are {found} wide (visual, audio), the network takes {expected}"
            )
        return video

    def _plan(self, task: Task, features: VideoFeatures) -> None:
        """Cut a video that is in memory: into windows, or to its first T steps."""
        pipeline, length = self._pipeline, self._pipeline.spec.length
        self._settle(task, features.steps, features.note)
        if pipeline.long_videos == "windows" and features.steps > length:
            task.windows = plan_windows(features.steps, length, pipeline.window_overlap)
            self._waiting.extend((task, features, index) for index in range(len(task.windows)))
        else:
            self._add(task, features, 0)

    def _add(self, task: Task, features: VideoFeatures, index: int) -> None:
        """Put a window, or a video that is not cut into any, into the batch."""
        if task.result is not None:
            return
        length = self._pipeline.spec.length
        try:
            if task.windows:
                self._batch.add(features, task.windows[index].start, task.windows[index].stop, task.video_id)
            else:
                if features.steps > length:  # what is cut off is checked too
                    for array, modality in zip(features, ("visual", "audio"), strict=True):
                        copy_rows(array[length:], None, f"{task.video_id}: {modality}", first_step=length)
                self._batch.add(features, 0, min(features.steps, length), task.video_id)
        except FeatureError as error:
            self._fail(task, error)
        else:
            self._rows.append((task, index))

    def _post_process(self, lengths: Int32, logits: Float32, offsets: Float32) -> None:
        whole = [row for row, (task, _) in enumerate(self._rows) if not task.windows]
        durations = [self._rows[row][0].duration or 0.0 for row in whole]
        if len(whole) < len(self._rows):
            found = self._detect(logits[whole], offsets[whole], lengths[whole], durations)
        else:
            found = self._detect(logits, offsets, lengths, durations)
        for row, detections in zip(whole, found, strict=True):
            self._rows[row][0].settle(detections)
        for row, (task, index) in enumerate(self._rows):
            if task.windows and task.result is None:
                self._add_window_outputs(task, task.windows[index], logits[row], offsets[row])

    def _add_window_outputs(self, task: Task, window: Window, logits: Float32, offsets: Float32) -> None:
        spec, post = self._pipeline.spec, self._pipeline.post
        try:
            task.found.append(decode_window(window, logits, offsets, spec, post))
            if len(task.found) == len(task.windows):
                task.settle(merge_windows(task.found, duration=task.duration or 0.0, spec=spec, post=post))
        except CCNetError as error:
            task.settle(error)

    def _settle(self, task: Task, steps: int, lengths: str | None) -> None:
        """Note what is not covered of a video of so many steps, and take what is for its duration if none was given."""
        spec, crop = self._pipeline.spec, self._pipeline.long_videos == "crop"
        longest = spec.length if crop else None
        task.gaps = find_gaps(steps, lengths, time_base=spec.time_base, duration=task.duration, longest=longest)
        if task.duration is None:
            task.duration = spec.time_base.covered_seconds(steps)

    def _fail(self, task: Task, error: BaseException) -> None:
        """Make an error of a video's own its result; any other one ends the stream."""
        if isinstance(error, CCNetError):
            task.settle(error)
        else:
            task.result = error
        self._finish([task])
