"""Walk a folder of videos and print how long each class is present; bad videos are listed at the end.

python examples/stream_folder.py demo/bundle demo/features
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from ccnet import Localizer
from runtime import FeatureFiles
from runtime.features import find_videos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("features", help="folder of feature files")
    parser.add_argument("--min-score", type=float, default=0.2)
    arguments = parser.parse_args()

    seconds: Counter[str] = Counter()
    failed: dict[str, Exception] = {}
    begun, videos = time.perf_counter(), 0
    with Localizer.load(arguments.bundle) as localizer:
        names = find_videos(arguments.features, localizer.spec.layout)
        sources = ((name, FeatureFiles(arguments.features, name)) for name in names)
        # Reading, inference and post-processing overlap; results come in order, and memory stays bounded.
        for result in localizer.stream(sources):
            videos += 1
            if result.detections is None:
                failed[result.video_id] = result.error or Exception("no result")
                continue
            found = result.detections
            for (start, end), score, label in zip(found.segments, found.scores, found.labels, strict=True):
                if score >= arguments.min_score:
                    seconds[found.label_names[label]] += end - start

    print(f"{videos} videos, {videos / (time.perf_counter() - begun):.0f} a second")
    for label, total in seconds.most_common():
        print(f"{total:9.1f} s  {label}")
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
