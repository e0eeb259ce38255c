"""What of a video its features and the network cover, and what a person should know where that is not all of it.

Every command that reads features says it in these words: `find_gaps` looks at one video, `common_gaps` at many.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.spec import FeatureLayout, TimeBase

log = logging.getLogger(__name__)

SHOWN = 20
"""Videos that a list of many names."""
NEARLY_ALL = 0.9
"""What holds for this share of the videos is no accident of some files but a wrong setting."""

# A difference by more than this share, and by more than some steps, is worth a note.
_NOTED_SHARE = 0.1
_NOTED_STEPS = 2

_FEWEST_STEPS = 4
"""Steps from which on a duration tells the seconds between them."""


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """What is not covered of one video, each fact in words; None where all is well. As text: all of them."""

    lengths: str | None = None
    """Files or modalities of clearly different numbers of steps, which were cut to the shortest."""
    duration: str | None = None
    """The stated duration is clearly another than the time that the features cover."""
    cropped: str | None = None
    """The network takes fewer steps than there are."""
    step_seconds: float | None = None
    """With `duration`: the seconds between two steps if the features do cover the video."""

    def __str__(self) -> str:
        return "; ".join(fact for fact in (self.lengths, self.duration, self.cropped) if fact)


def find_gaps(
    steps: int,
    lengths: str | None,
    *,
    time_base: TimeBase,
    duration: float | None,
    longest: int | None,
    hint: str = "--long-videos windows sees all of it",
) -> Gaps | None:
    """Compare the steps of a video with its duration and with what the network takes; None where nothing is missing.

    Args:
        steps: that all files or modalities have.
        lengths: what `files_note` or `length_note` says.
        duration: seconds as annotated or given; None where nobody said.
        longest: T, beyond which steps are left out; None where none are.
        hint: how all of a longer video could be used.
    """
    covered = time_base.covered_seconds(steps)
    cropped = longest is not None and steps > longest + _NOTED_STEPS
    differs = duration is not None and abs(duration - covered) > max(
        _NOTED_SHARE * max(duration, covered), (time_base.stride_frames + time_base.window_frames) / time_base.fps
    )
    if lengths is None and not cropped and not differs:
        return None
    said = beyond = step_seconds = None
    if duration is not None and differs:
        said = f"the features cover {covered:.1f} s, the duration is {duration:.1f} s"
        if lengths is None and steps >= _FEWEST_STEPS:
            step_seconds = max(0.0, duration - time_base.window_frames / time_base.fps) / (steps - 1)
    if longest is not None and cropped:
        whole = duration if duration is not None and not differs else covered
        seen = min(whole, time_base.covered_seconds(longest))
        beyond = f"{seen:.1f} of {whole:.1f} s are used, T = {longest} of {steps} steps; {hint}"
    return Gaps(lengths=lengths, duration=said, cropped=beyond, step_seconds=step_seconds)


def common_gaps(gaps: Mapping[str, Gaps], videos: int, time_base: TimeBase, *, cropped: bool = True) -> list[str]:
    """Say what holds for nearly all of so many videos; empty where each gap is a matter of a few files.

    `cropped`: count longer videos among it; they are none of it where a part of them is used by design.
    """
    said = []
    unequal = [found for found in gaps.values() if found.lengths]
    other_time = [found for found in gaps.values() if found.duration]
    longer = [found for found in gaps.values() if found.cropped]
    if _nearly_all(unequal, videos):
        said.append(
            f"the modalities of {len(unequal)} of {videos} videos differ in their number of steps, and what only one "
            "has is not used: extract both with the same stride"
        )
    if _nearly_all(other_time, videos):
        base = f"{time_base.step_seconds:.3g} s (time_base: fps {time_base.fps:g}, stride {time_base.stride_frames:g})"
        steps = [found.step_seconds for found in other_time if found.step_seconds]
        found = f"they seem to have a step every {statistics.median(steps):.3g} s, " if steps else ""
        said.append(
            f"the features of {len(other_time)} of {videos} videos do not cover the annotated duration; {found}"
            f"expected is a step every {base}. Events are at the wrong times: extract the features as the network "
            "expects them, or give the time base that they have when training"
        )
    if cropped and _nearly_all(longer, videos):
        said.append(f"{len(longer)} of {videos} videos are longer than the network's T, and the rest of each is unseen")
    return said


def report_gaps(
    gaps: Mapping[str, Gaps], videos: int, time_base: TimeBase, *, limit: int = SHOWN, cropped: bool = True
) -> None:
    """Warn of what is not covered of some of so many videos, and once more where that holds for nearly all of them."""
    if not gaps:
        return
    log.warning("%d of %d videos are not covered as a whole:\n%s", len(gaps), videos, video_list(gaps, limit=limit))
    for fact in common_gaps(gaps, videos, time_base, cropped=cropped):
        log.warning("NEARLY ALL VIDEOS: %s", fact)


def video_list(videos: Mapping[str, object], *, limit: int = SHOWN) -> str:
    """Return one indented line for each of the first `limit` videos: its id and what there is to say about it."""
    lines = [f"  {video_id}: {text}" for video_id, text in itertools.islice(videos.items(), limit)]
    if len(videos) > limit:
        lines.append(f"  ... and {len(videos) - limit} more")
    return "\n".join(lines)


def _nearly_all(found: Sequence[Gaps], videos: int) -> bool:
    return len(found) > 0 and len(found) >= NEARLY_ALL * videos


def files_note(prefix: str, layout: FeatureLayout, steps: Sequence[int]) -> str | None:
    """Return the `length_note` of the files of one video, given the steps of each."""
    if max(steps) - min(steps) <= _NOTED_STEPS:
        return None
    names = (f"{os.path.basename(prefix)}{suffix}.npy" for suffix in (*layout.visual, *layout.audio))
    return length_note(dict(zip(names, steps, strict=True)))


def length_note(lengths: dict[str, int]) -> str | None:
    """Say what was cut where the lengths, in steps by file or modality, clearly differ."""
    shortest, longest = min(lengths.values()), max(lengths.values())
    if longest - shortest <= max(_NOTED_STEPS, _NOTED_SHARE * longest):
        return None
    found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
    return f"lengths differ: {found} steps; cut to {shortest}"
