"""`python -m tests.chaos --kills 200 --seed 1 --json`, or `make chaos`: ends with status 1 if anything was lost."""

import argparse
import json
import sys

from tests.chaos.run import LEASE_SECONDS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lease-seconds", type=float, default=LEASE_SECONDS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    verdict = run(
        kills=options.kills, seed=options.seed, lease_seconds=options.lease_seconds,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    if options.json:
        print(json.dumps(verdict.figures))
    return 0 if verdict.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
