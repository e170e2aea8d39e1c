"""`python -m fuzz [-n INPUTS] [--seed WORD] [--keep] [TARGET ...]`: each target's corpus, then so many inputs more."""

from __future__ import annotations

import argparse
import json
import sys
import time

from fuzz.run import Outcome, fuzz, save
from fuzz.target import Target
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=20_000, help="inputs for a cheap parser; costly ones get a share")
    parser.add_argument("--seed", default="0", help="other words, other inputs")
    parser.add_argument("--keep", action="store_true", help="write what is found into the corpus")
    parser.add_argument("--json", action="store_true", help="one object a target")
    parser.add_argument("targets", nargs="*", help="names, or their beginnings; none: all")
    given = parser.parse_args()
    chosen = [each for each in TARGETS if not given.targets or each.name.startswith(tuple(given.targets))]
    n_found = 0
    for target in chosen:
        started = time.monotonic()
        outcome = fuzz(target, max(int(given.n * target.weight), 1), given.seed)
        n_found += len(outcome.findings)
        _tell(target, outcome, time.monotonic() - started, as_json=given.json, keep=given.keep)
    return 1 if n_found else 0


def _tell(target: Target, outcome: Outcome, seconds: float, *, as_json: bool, keep: bool) -> None:
    out = sys.stdout
    found = [(each.place, each.what, len(each.data)) for each in outcome.findings.values()]
    if as_json:
        told = {"target": target.name, "n": outcome.n, "kinds": outcome.kinds, "cpu_s": outcome.cpu_s, "found": found}
        out.write(json.dumps(told) + "\n")
    else:
        kinds = ", ".join(f"{n} {kind}" for kind, n in outcome.kinds.most_common())
        out.write(f"{target.name:18} {outcome.n:8} inputs  {outcome.cpu_s:7.1f} s  {seconds:7.1f} s  {kinds}\n")
        for place, what, size in found:
            out.write(f"    FOUND {place}  ({size} bytes)\n          {what}\n")
    if keep:
        for finding in outcome.findings.values():
            out.write(f"    kept {save(finding, target)}\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
