"""python -m trainer COMMAND: prepare, structure, predict, drawn, latents, primitives, sheets, plan, train, resume,
evaluate, export, join.

Exit codes: 0 when the run finished, stopped early, or was interrupted by Ctrl-C or SIGTERM and saved; 1 for an error
(one sentence on stderr); 2 for wrong arguments; 130 when a second Ctrl-C, or one before training began, cut it short.

Several processes: ``accelerate launch --multi_gpu --num_processes N -m trainer train ...``; on CPUs the same with
``--device cpu`` after the trainer's arguments (accelerate's own --cpu starts one process unless MPI is installed).

Heavy imports wait for the command that needs them, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from triptych.errors import TriptychError


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser(arguments).parse_args(arguments)
    try:
        return int(args.command(args) or 0)
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder without permission: the operating system says it best
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{place}: nothing that was saved is lost", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        from trainer.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"error: {_without_memory(args)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; what was saved before is intact", file=sys.stderr)
        return 130
    return 1


def _without_memory(args: argparse.Namespace) -> str:
    """For commands other than training, which knows more (trainer.memory.explained)."""
    remedies = ["close what else uses the memory"]
    import torch

    device = getattr(args, "device", "cpu")
    is_elsewhere = torch.cuda.is_available() or torch.backends.mps.is_available()
    if device not in ("cpu", "auto") or (device == "auto" and is_elsewhere):
        remedies.append("--device cpu")
    if getattr(args, "workers", 0) != 0:
        remedies.append("fewer --workers")
    return f"out of memory, what was saved before is intact: {', or '.join(remedies)}"


def _train(args: argparse.Namespace) -> None:
    from trainer.chain import CHAINS, run_chain
    from trainer.config import apply_overrides
    from trainer.loop import train
    from trainer.recipes import build_recipe

    if args.recipe in CHAINS:
        folder = args.run_dir or Path("runs") / args.recipe
        _say(run_chain(args.recipe, folder, args.set, processes=args.processes, device=args.device))
        return
    _refuse_processes(args)
    config = apply_overrides(build_recipe(args.recipe), args.set)
    run_dir = args.run_dir or Path("runs") / config.name
    _say(train(config, run_dir, recipe=args.recipe, device=args.device))


def _resume(args: argparse.Namespace) -> None:
    from trainer.chain import is_chain, resume_chain
    from trainer.config import apply_overrides
    from trainer.loop import train
    from trainer.runs import check_resume, find_run, read_run, run_lock, write_run

    for folder in (Path(args.run), Path("runs") / args.run):
        if is_chain(folder):
            _say(resume_chain(folder, args.set, processes=args.processes, device=args.device))
            return
    _refuse_processes(args)
    run_dir = find_run(args.run)
    saved, recipe = read_run(run_dir)
    config = apply_overrides(saved, args.set)
    changed = check_resume(saved, config)
    if changed and _is_main_process():
        with run_lock(run_dir, enabled=True):
            write_run(run_dir, config, recipe)
        _say(f"changed: {', '.join(changed)}")
    _say(train(config, run_dir, recipe=recipe, device=args.device))


def _refuse_processes(args: argparse.Namespace) -> None:
    if args.processes != 1:
        raise TriptychError(
            f"--processes {args.processes} is for recipes of several runs (flux_tiny): start one run as "
            f"`accelerate launch --multi_gpu --num_processes {args.processes} -m trainer ...`"
        )


def _evaluate(args: argparse.Namespace) -> None:
    from trainer.loop import evaluate, open_trained
    from trainer.runs import find_run

    if args.objects is not None:
        _evaluate_views(args)
        return
    run, checkpoint = open_trained(find_run(args.run), args.checkpoint, args.device)
    print(json.dumps({"run": str(run.run_dir), "step": checkpoint.step, **evaluate(run)}, indent=1))


def _evaluate_views(args: argparse.Namespace) -> None:
    """The fixed protocol, on the model as users would load it."""
    import tempfile

    import torch

    from trainer.loop import export
    from trainer.runs import find_run, read_run
    from trainer.views_evaluation import evaluate_views
    from trainer.views_tables import markdown
    from trainer.views_truth import load_protocol
    from triptych.flux.backend import load_flux_views

    run_dir = find_run(args.run)
    config, _ = read_run(run_dir)
    if config.task != "flux_views":
        raise TriptychError(
            f"--objects is for runs of the task flux_views, {args.run} is one of {config.task}: leave it out"
        )
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / run_dir.name
        export(run_dir, exported, args.checkpoint, args.device)
        device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
        model = load_flux_views(str(exported), device=device, offload=args.offload, quantisation=args.quantisation)
        report = evaluate_views(
            model,
            load_protocol(),
            args.objects,
            objects=args.count,
            out=args.out,
            meshes=args.meshes,
            text=args.meshes,
            device=device,
            report=lambda sentence: print(sentence, file=sys.stderr),
        )
        model.unload()
    print(markdown(report))


def _export(args: argparse.Namespace) -> None:
    from trainer.loop import export
    from trainer.runs import find_run

    provenance = export(find_run(args.run), args.out, args.checkpoint, args.device)
    _say(f"exported step {provenance['step']} to {args.out}")


def _prepare(args: argparse.Namespace) -> int:
    from trainer.prepare.run import main as prepare

    return int(prepare(args) or 0)


def _structure(args: argparse.Namespace) -> int:
    from trainer.prepare.structured import main as structure

    return structure(args)


def _predict(args: argparse.Namespace) -> int:
    from trainer.prepare.predicted import main as predict

    return predict(args)


def _drawn(args: argparse.Namespace) -> int:
    from trainer.prepare.drawn import main as drawn

    return drawn(args)


def _latents(args: argparse.Namespace) -> int:
    from trainer.prepare.latents import main as latents

    return latents(args)


def _sheets(args: argparse.Namespace) -> int:
    from trainer.prepare.sheet_cache import main as sheets

    return sheets(args)


def _join(args: argparse.Namespace) -> int:
    from trainer.join import main as join

    return join(args)


def _primitives(args: argparse.Namespace) -> int:
    from trainer.prepare.primitives import main as primitives

    return primitives(args)


def _plan(args: argparse.Namespace) -> None:
    from trainer.config import apply_overrides
    from trainer.plan import plan
    from trainer.recipes import build_recipe

    print(plan(apply_overrides(build_recipe(args.recipe), args.set), args.gpu))


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # the launcher sets it; accelerate is not loaded yet


def _say(sentence: str) -> None:
    if _is_main_process():
        print(sentence, flush=True)


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Trains the networks of Triptych.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="turn folders of 3D objects into training data")
    prepare.set_defaults(command=_prepare)
    if "prepare" in arguments[:1]:
        from trainer.prepare.run import add_arguments

        add_arguments(prepare)

    structure = commands.add_parser("structure", help="add the second stage's arrays to a prepared folder")
    structure.set_defaults(command=_structure)
    if "structure" in arguments[:1]:
        from trainer.prepare.structured import add_arguments as add_structure_arguments

        add_structure_arguments(structure)

    sheets = commands.add_parser("sheets", help="cache view sheets, their latents and captions for Flux multiview")
    sheets.set_defaults(command=_sheets)
    if "sheets" in arguments[:1]:
        from trainer.prepare.sheet_cache import add_arguments as add_sheets_arguments

        add_sheets_arguments(sheets)
    predict = commands.add_parser("predict", help="add what a first stage makes of the structured samples")
    predict.set_defaults(command=_predict)
    if "predict" in arguments[:1]:
        from trainer.prepare.predicted import add_arguments as add_predict_arguments

        add_predict_arguments(predict)

    drawn = commands.add_parser("drawn", help="add what a views model draws of the prepared objects' photographs")
    drawn.set_defaults(command=_drawn)
    if "drawn" in arguments[:1]:
        from trainer.prepare.drawn import add_arguments as add_drawn_arguments

        add_drawn_arguments(drawn)

    latents = commands.add_parser("latents", help="encode prepared objects for training at the published shape")
    latents.set_defaults(command=_latents)
    if "latents" in arguments[:1]:
        from trainer.prepare.latents import add_arguments as add_latents_arguments

        add_latents_arguments(latents)

    join = commands.add_parser("join", help="make one bundle of stages that were exported one by one")
    join.set_defaults(command=_join)
    if "join" in arguments[:1]:
        from trainer.join import add_arguments as add_join_arguments

        add_join_arguments(join)

    primitives = commands.add_parser("primitives", help="write procedural objects to prepare and train on")
    primitives.set_defaults(command=_primitives)
    if "primitives" in arguments[:1]:
        from trainer.prepare.primitives import add_arguments as add_primitive_arguments

        add_primitive_arguments(primitives)

    train = commands.add_parser("train", help="train a recipe, or go on with the same run")
    train.add_argument("recipe", help="a recipe's name, or module:function")
    train.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/NAME)")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="say what a recipe of the published shape takes of a card's memory")
    plan.add_argument("recipe", help="a recipe's name, or module:function")
    plan.add_argument("--gpu", type=int, nargs="+", metavar="GB", help="memory of the cards (default: the usual ones)")
    plan.set_defaults(command=_plan)

    resume = commands.add_parser("resume", help="go on with a run from its newest complete checkpoint")
    resume.set_defaults(command=_resume)
    evaluate = commands.add_parser("evaluate", help="validate a run's EMA weights and print JSON")
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument(
        "--objects", type=Path, metavar="DATA", help="flux_views: the fixed protocol on the evaluation objects of DATA"
    )
    evaluate.add_argument("--count", type=int, metavar="N", help="with --objects: about N of them, evenly spread")
    evaluate.add_argument("--offload", default="auto", help="with --objects: of the views model, see load_flux_views")
    evaluate.add_argument("--quantisation", default="none", help="with --objects: int8, fp8 or nf4")
    evaluate.add_argument("--out", type=Path, help="with --objects: a folder for report.json and contact sheets")
    evaluate.add_argument(
        "--no-meshes",
        dest="meshes",
        action="store_false",
        help="with --objects: neither meshes nor prompts, minutes less",
    )
    export = commands.add_parser("export", help="write a run's EMA weights as bundle components")
    export.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    export.set_defaults(command=_export)

    for command in (resume, evaluate, export):
        command.add_argument("run", help="a run folder, or its name under runs/")
    for command in (evaluate, export):
        command.add_argument("--checkpoint", default="last", help="last (default), best, or a step number")
    for command in (train, resume, plan):
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override one config value"
        )
    for command in (train, resume):
        command.add_argument(
            "--processes", type=int, default=1, metavar="N", help="for each run of a recipe of several (flux_tiny)"
        )
    for command in (train, resume, evaluate, export):
        command.add_argument("--device", choices=("auto", "cpu"), default="auto")
    return parser


def _leave(status: int) -> None:
    """Ends the process. One of several goes at once: threads of gloo that outlive the interpreter sometimes abort it
    at exit, after everything was saved, and the launcher would call the whole run failed."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _leave(main())
