"""Ask a server for the events of one video; numpy and the standard library are all it needs.

python examples/client.py http://127.0.0.1:8000 demo/features test_00031     # beside: ccnet serve demo/bundle
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("features", type=Path, help="folder of feature files")
    parser.add_argument("video", help="video id: the name of its files up to the ending")
    parser.add_argument("--min-score", type=float, default=0.2)
    arguments = parser.parse_args()

    # One archive with all files of the video; the server tells them by the ends of their names.
    files = sorted(arguments.features.glob(f"{arguments.video}_*.npy"))
    body = io.BytesIO()
    np.savez(body, **{path.stem: np.load(path) for path in files})

    query = urllib.parse.urlencode({"id": arguments.video})
    request = urllib.request.Request(f"{arguments.server}/localize?{query}", data=body.getvalue(), method="POST")
    request.add_header("Content-Type", "application/octet-stream")
    if token := os.environ.get("CCNET_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        print(f"{error.code}: {json.load(error)['error']}", file=sys.stderr)
        return 1
    for event in answer["events"]:
        if event["score"] >= arguments.min_score:
            start, end = event["segment"]
            print(f"{start:7.2f} s to {end:7.2f} s  {event['score']:.2f}  {event['label']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
