"""How good are a Flux model's views, and what are reconstructions from them worth? Prints tables, writes a report.

    python -m benchmarks.views_quality [--model weights/triptych-tiny/flux] [--data ../shared/data] [--objects N]
        [--no-meshes] [--no-prompts] [--out DIR] [--lora FILE] [--device cpu]

The protocol is trainer/views_protocol.json; docs/views_evaluation.md says what is measured and how. --out keeps
report.json and contact sheets (photograph | generated front, left, back, right | true left, back, right), and what does
not depend on the model, so that a second run is quicker.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.machine import describe
from trainer.views_evaluation import evaluate_views
from trainer.views_tables import markdown
from trainer.views_truth import PROTOCOL_FILE, load_protocol
from triptych.errors import TriptychError
from triptych.flux.backend import load_flux_views

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        protocol = load_protocol(args.protocol)
        model = load_flux_views(
            args.model, device=args.device, offload=args.offload, quantisation=args.quantisation, lora=args.lora
        )
        report = evaluate_views(
            model,
            protocol,
            args.data,
            objects=args.objects,
            meshes=not args.no_meshes,
            text=not args.no_prompts,
            bundle=args.bundle,
            out=args.out,
            device=args.device,
            report=lambda sentence: print(sentence, file=sys.stderr, flush=True),
        )
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{describe()}\n\n{markdown(report)}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="triptych-tiny", help="a folder, a repository id, or triptych-tiny")
    parser.add_argument("--lora", default=None, help="a LoRA file for the model")
    parser.add_argument("--bundle", default=None, help="that reconstructs (default: the embedded one)")
    parser.add_argument("--data", type=Path, default=os.environ.get("TRIPTYCH_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--protocol", type=Path, default=PROTOCOL_FILE)
    parser.add_argument("--objects", type=int, default=None, help="about so many of the protocol's objects")
    parser.add_argument("--no-meshes", action="store_true", help="do not reconstruct")
    parser.add_argument("--no-prompts", action="store_true", help="do not draw the grid of prompts")
    parser.add_argument("--out", type=Path, default=None, help="a folder for report.json and contact sheets")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--offload", default="auto", choices=("auto", "none", "model", "sequential"))
    parser.add_argument("--quantisation", default="none", choices=("none", "int8", "nf4", "fp8"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
