"""Find the events of one video.

python examples/one_video.py demo/bundle demo/features test_00031
"""

from __future__ import annotations

import argparse

from ccnet import Localizer
from runtime import FeatureFiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("features", help="folder of feature files")
    parser.add_argument("video", help="video id: the name of its files up to the ending")
    parser.add_argument("--min-score", type=float, default=0.2)
    arguments = parser.parse_args()

    with Localizer.load(arguments.bundle) as localizer:
        video = FeatureFiles(arguments.features, arguments.video).read(localizer.spec)
        detections = localizer(video.visual, video.audio)
        print(f"by {localizer.describe()['engine']}")

    for (start, end), score, label in zip(detections.segments, detections.scores, detections.labels, strict=True):
        if score >= arguments.min_score:
            print(f"{start:7.2f} s to {end:7.2f} s  {score:.2f}  {detections.label_names[label]}")


if __name__ == "__main__":
    main()
