"""``parity``: reference files of an original implementation against this one."""

from __future__ import annotations

import argparse
import sys

from ..errors import TriptychError


def parity(args: argparse.Namespace) -> int:
    """A line for each output. 0: all within their tolerances; 1: one is over; 2: a file could not be run."""
    from ..parity import compare, read_case, run_case

    over, broken, outputs = 0, 0, 0
    for path in args.files:
        try:
            case = read_case(path)
            rows = compare(case, run_case(case))
        except TriptychError as error:
            print(f"error: {error}", file=sys.stderr)
            broken += 1
            continue
        print(f"{path.name}: {case.class_name}")
        width = max(len(row.name) for row in rows)
        for row in rows:
            allowed = f"allowed {row.tolerance:.1e}" if row.tolerance else "must be equal"
            verdict = "ok" if row.passed else f"OVER{': ' * bool(row.note)}{row.note}"
            print(f"  {row.name:<{width}}  error {row.error:.1e}  {allowed}  {verdict}")
        outputs += len(rows)
        over += sum(not row.passed for row in rows)
    print(_summary(len(args.files) - broken, outputs, over, broken))
    return 2 if broken else int(over > 0)


def _summary(files: int, outputs: int, over: int, broken: int) -> str:
    run = f"{files} file{'s' * (files != 1)}"
    if over:
        verdict = f"{over} of {outputs} outputs {'is over its tolerance' if over == 1 else 'are over their tolerances'}"
    else:
        verdict = f"all {outputs} outputs are within their tolerances"
    return f"{run}: {verdict}" + (f"; {broken} could not be run" if broken else "")
