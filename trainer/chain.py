"""Several runs that make one model: `python -m trainer train flux_tiny --set data=DATA`.

A chain is a folder of its own. Every stage is one command of the trainer, printed before it runs in a process of its
own, so that whatever a chain does can be done by hand. What is done is noted in ``chain.json``; the same command, or
``resume``, goes on in the stage that was interrupted, and a training stage goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import complete_checkpoints, write_text_atomically
from trainer.config import apply_overrides
from trainer.names import nearest
from trainer.recipes import build_recipe
from trainer.runs import read_run
from triptych.errors import TriptychError

FILE = "chain.json"
FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """arguments: of ``python -m trainer``; a path of the chain's folder is written as ``{}/name``. A stage that trains
    names its recipe and run; one that makes a folder in one go names it in out: what an interruption left there is
    removed. gathers: folders whose contents are copied into out, instead of a command. options: of the command, that
    ``--set NAME.option=value`` may change."""

    name: str
    arguments: tuple[str, ...] = ()
    recipe: str = ""
    run: str = ""
    out: str = ""
    gathers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    reads_data: bool = False  # --set data=... is for these


@dataclass(frozen=True)
class Chain:
    """stages: in their order. result: what the last one leaves, and the sentence that says what to do with it."""

    stages: tuple[Stage, ...]
    result: str
    use: str


def _training(name: str, recipe: str, *settings: str, reads_data: bool = False) -> Stage:
    pairs = tuple(word for setting in settings for word in ("--set", setting))
    return Stage(name, ("train", recipe, *pairs), recipe=recipe, run=name, reads_data=reads_data)


def _exporting(name: str, run: str, out: str) -> Stage:
    return Stage(name, ("export", f"{{}}/{run}", "--out", f"{{}}/{out}"), out=out)


FLUX_TINY = Chain(
    stages=(
        _training("vae", "flux_vae_tiny", reads_data=True),
        _exporting("vae-export", "vae", "vae-parts"),
        _training("text", "flux_text_tiny", reads_data=True),
        _exporting("text-export", "text", "text-parts"),
        Stage("parts", gathers=("vae-parts", "text-parts"), out="parts"),
        Stage(
            "sheets",
            ("sheets", "--model", "{}/parts", "--out", "{}/sheets", "--mirrored", "--variants", "8"),
            options=("panel", "variants", "captions", "workers"),
            reads_data=True,
        ),
        _training(
            "views",
            "flux_views_tiny",
            "task_config.cache={}/sheets",
            "task_config.parts={}/parts",
            "task_config.vocabulary={}/parts/vocabulary.json",
        ),
        _exporting("export", "views", "flux"),
    ),
    result="flux",
    use="python -m triptych generate 'a red chair' --views-model {}/flux -o chair.obj",
)
CHAINS: dict[str, Chain] = {"flux_tiny": FLUX_TINY}


@dataclass
class _State:
    """What chain.json holds."""

    recipe: str
    settings: list[str]
    done: list[str] = field(default_factory=list)


def is_chain(folder: Path) -> bool:
    return (folder / FILE).is_file()


def run_chain(recipe: str, folder: Path, settings: list[str], *, processes: int = 1, device: str = "auto") -> str:
    """Runs what is left of a chain. Returns the sentence that says how it ended.

    settings: ``data=FOLDER,...`` and ``STAGE.key=value``, as for the stage's own recipe or command. processes: of each
    training stage, on this machine. Raises TriptychError for unknown stages and keys before anything runs, for a folder
    that holds something else, and when a stage fails.
    """
    chain = CHAINS[recipe]
    if processes < 1:
        raise TriptychError(f"--processes must be at least 1, got {processes}")
    if "RANK" in os.environ:
        raise TriptychError(f"{recipe} starts its own processes: run it without a launcher, with --processes N")
    _check_names(chain, settings)
    commands = {stage.name: _command(stage, folder, settings, device) for stage in chain.stages}
    state = _claimed(folder, _State(recipe, settings))
    for number, stage in enumerate(chain.stages, start=1):
        if stage.name in state.done:
            continue
        print(f"{recipe} {number}/{len(chain.stages)}, {stage.name}: {_told(stage, commands[stage.name])}", flush=True)
        if stage.out:
            shutil.rmtree(folder / stage.out, ignore_errors=True)
        stopped = _gather(stage, folder) if stage.gathers else _run(commands[stage.name], stage, processes)
        if not stopped and stage.run:
            stopped = not _is_trained(folder / stage.run)
        if stopped:
            return f"{recipe} was interrupted in {stage.name} and saved: python -m trainer resume {folder}"
        state.done.append(stage.name)
        _write(folder, state)
    return f"finished: {folder / chain.result} is the model: {chain.use.format(folder)}"


def resume_chain(folder: Path, settings: list[str], *, processes: int = 1, device: str = "auto") -> str:
    """Goes on with the settings that the chain was begun with."""
    if settings:
        raise TriptychError(
            f"{folder} is a chain of runs, --set {settings[0]} does not reach them: resume the run itself with it, "
            f"as in `python -m trainer resume {folder}/NAME --set ...`"
        )
    state = _read(folder)
    return run_chain(state.recipe, folder, state.settings, processes=processes, device=device)


def _command(stage: Stage, folder: Path, settings: Iterable[str], device: str) -> list[str]:
    words = [word.replace("{}", str(folder)) for word in stage.arguments]
    own = [setting.partition(".")[2] for setting in settings if setting.startswith(f"{stage.name}.")]
    data = next((setting.partition("=")[2] for setting in settings if setting.startswith("data=")), "data")
    if stage.recipe:
        more = [f"task_config.data={data}"] if stage.reads_data else []
        # Now, so that a wrong key is told before an hour of the stages before it.
        try:
            apply_overrides(build_recipe(stage.recipe), [*words[3::2], *more, *own])
        except TriptychError as error:
            raise TriptychError(f"stage {stage.name}: {error}") from error
        words += [word for setting in (*more, *own) for word in ("--set", setting)]
        return [*words, "--run-dir", str(folder / stage.run), "--device", device]
    for setting in own:
        key, equals, value = setting.partition("=")
        if not equals or key not in stage.options:
            raise TriptychError(f"--set {stage.name}.{setting}: unknown key {key!r}, {nearest(key, stage.options)}")
        words += [f"--{key}", value]
    if stage.reads_data:
        words[1:1] = data.split(",")
    return [*words, "--device", device] if words[:1] == ["export"] else words


def _check_names(chain: Chain, settings: Iterable[str]) -> None:
    names = ("data", *(stage.name for stage in chain.stages if stage.recipe or stage.options))
    for setting in settings:
        key, equals, _ = setting.partition("=")
        name, dot, _ = key.partition(".")
        if not equals or name not in names or (name == "data") == bool(dot):
            stages = ", ".join(f"{name}.KEY" for name in names[1:])
            raise TriptychError(f"--set {setting}: a chain takes data=FOLDER and the keys of its stages ({stages})")


def _told(stage: Stage, command: list[str]) -> str:
    if stage.gathers:
        return f"copies {' and '.join(stage.gathers)} to {stage.out}"
    return shlex.join(["python", "-m", "trainer", *command])


def _gather(stage: Stage, folder: Path) -> bool:
    for source in stage.gathers:
        shutil.copytree(folder / source, folder / stage.out, dirs_exist_ok=True)
    return False


def _run(command: list[str], stage: Stage, processes: int) -> bool:
    """Whether Ctrl-C or SIGTERM ended it; it has saved what it had."""
    launcher = [sys.executable]
    if stage.recipe and processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    child = subprocess.Popen([*launcher, "-m", "trainer", *command])
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        # Ctrl-C in a terminal reaches the child by itself, a signal sent to this process does not.
        received.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)

    before = _handle(receive)
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and not received:
        raise TriptychError(f"the stage {stage.name} ended with the exit code {code}: see what it said above")
    return bool(received)


def _handle(receive: Callable[[int, Any], None]) -> dict[int, Any]:
    try:
        return {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        return {}


def _is_trained(run: Path) -> bool:
    """A training command also ends well when it was told to stop."""
    config, _ = read_run(run)
    newest = next(complete_checkpoints(run / "checkpoints"), None)
    stale = newest.state.get("stale_validations", 0) if newest else 0
    return newest is not None and (newest.step >= config.steps or 0 < config.early_stop_patience <= stale)


def _claimed(folder: Path, wanted: _State) -> _State:
    """The chain that the folder holds, begun now if there is none."""
    if is_chain(folder):
        found = _read(folder)
        if (found.recipe, found.settings) != (wanted.recipe, wanted.settings):
            began = " ".join(["train", found.recipe, *(f"--set {setting}" for setting in found.settings)])
            raise TriptychError(f"{folder} holds a chain that was begun by `{began}`: choose another --run-dir")
        return found
    if folder.exists() and any(folder.iterdir()):
        raise TriptychError(f"{folder} is not empty and is not a chain: choose another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, wanted)
    return wanted


def _read(folder: Path) -> _State:
    path = folder / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["recipe"] not in CHAINS:
            raise TriptychError(f"{path}: not a chain of format {FORMAT} that this trainer knows")
        return _State(document["recipe"], list(document["settings"]), list(document["done"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TriptychError(f"{path}: not readable ({error})") from error


def _write(folder: Path, state: _State) -> None:
    document = {"format": FORMAT, "recipe": state.recipe, "settings": state.settings, "done": state.done}
    write_text_atomically(folder / FILE, json.dumps(document, indent=1) + "\n")
