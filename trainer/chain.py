"""Several runs that make one model: `python -m trainer train flux_tiny --set data=DATA`.

A chain is a folder of its own. Every stage is one command of the trainer, printed before it runs in a process of its
own, so that whatever a chain does can be done by hand. What is done is noted in ``chain.json``; the same command, or
``resume``, goes on in the stage that was interrupted, and a training stage goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
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
from trainer.order import check_shares
from trainer.recipes import build_recipe
from trainer.runs import CONFIG_NAME, read_run
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
        _training("proportions", "proportions_tiny", reads_data=True),
        _exporting("proportions-export", "proportions", "proportions-parts"),
        Stage("parts", gathers=("vae-parts", "text-parts", "proportions-parts"), out="parts"),
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
    settings: dict[str, str]
    done: list[str] = field(default_factory=list)


def is_chain(folder: Path) -> bool:
    return (folder / FILE).is_file()


def run_chain(recipe: str, folder: Path, settings: list[str], *, processes: int = 1, device: str = "auto") -> str:
    """Runs what is left of a chain. Returns the sentence that says how it ended.

    settings: ``data=FOLDER,...`` and ``STAGE.key=value``, as for the stage's own recipe or command; those of stages
    that have not begun may change. processes: of each training stage, on this machine. Raises TriptychError for unknown
    stages, keys and values, and for data that is not prepared, before anything runs; for a folder that holds something
    else; and when a stage fails.
    """
    chain = CHAINS[recipe]
    if processes < 1:
        raise TriptychError(f"--processes must be at least 1, got {processes}")
    if "RANK" in os.environ:
        raise TriptychError(f"{recipe} starts its own processes: run it without a launcher, with --processes N")
    chosen = _checked_names(chain, settings)
    commands = {stage.name: _command(stage, folder, chosen, processes, device) for stage in chain.stages}
    state = _claimed(chain, folder, _State(recipe, chosen))
    if any(stage.reads_data and stage.name not in state.done for stage in chain.stages):
        _check_data(chosen)
    for number, stage in enumerate(chain.stages, start=1):
        if stage.name in state.done:
            continue
        print(f"{recipe} {number}/{len(chain.stages)}, {stage.name}: {_told(stage, commands[stage.name])}", flush=True)
        if stage.out:
            shutil.rmtree(folder / stage.out, ignore_errors=True)
        stopped, whole = (_gather if stage.gathers else _run)(stage, folder, commands[stage.name], processes)
        if whole and (not stage.run or _is_trained(folder / stage.run)):
            state.done.append(stage.name)
            _write(folder, state)
        if stopped or stage.name not in state.done:
            again = ["python", "-m", "trainer", "resume", str(folder)]
            again += ["--processes", str(processes)] if processes > 1 else []
            again += ["--device", device] if device != "auto" else []
            return f"{recipe} was interrupted in {stage.name} and saved: {shlex.join(again)}"
    return f"finished: {folder / chain.result} is the model: {chain.use.format(folder)}"


def resume_chain(folder: Path, settings: list[str], *, processes: int = 1, device: str = "auto") -> str:
    """Goes on with the settings that the chain was begun with; ``settings`` change those of stages that wait."""
    state = _read(folder)
    _checked_names(CHAINS[state.recipe], settings)
    both = [*(f"{key}={value}" for key, value in state.settings.items()), *settings]
    return run_chain(state.recipe, folder, both, processes=processes, device=device)


def _command(stage: Stage, folder: Path, settings: dict[str, str], processes: int, device: str) -> list[str]:
    """What to give ``python -m trainer``, checked now: a wrong value shall not be told after hours of other stages."""
    words = [word.replace("{}", str(folder)) for word in stage.arguments]
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{stage.name}.")}
    try:
        if stage.recipe:
            return _training_command(stage, folder, words, own, settings, processes, device)
        for key, value in own.items():
            if key not in stage.options:
                raise TriptychError(f"--set {stage.name}.{key}: unknown key {key!r}, {nearest(key, stage.options)}")
            words += [f"--{key}", value]
        if stage.reads_data:
            words[1:1] = _data_of(settings)
        if words[:1] == ["sheets"]:
            _check_sheets(words[1:])
    except TriptychError as error:
        raise TriptychError(f"stage {stage.name}: {error}") from error
    return [*words, "--device", device] if words[:1] == ["export"] else words


def _training_command(
    stage: Stage,
    folder: Path,
    words: list[str],
    own: dict[str, str],
    settings: dict[str, str],
    processes: int,
    device: str,
) -> list[str]:
    run = folder / stage.run
    if (run / CONFIG_NAME).is_file():  # its config is its own since: `resume --set` may have changed it
        check_shares(read_run(run)[0], processes)
        return ["resume", str(run), "--device", device]
    own = ({"task_config.data": ",".join(_data_of(settings))} if stage.reads_data else {}) | own
    pairs = [f"{key}={value}" for key, value in own.items()]
    check_shares(apply_overrides(build_recipe(stage.recipe), [*words[3::2], *pairs]), processes)
    words += [word for pair in pairs for word in ("--set", pair)]
    return [*words, "--run-dir", str(run), "--device", device]


def _check_sheets(words: list[str]) -> None:
    from trainer.prepare.sheet_cache import add_arguments, options_of

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    try:
        options_of(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise TriptychError(str(error)) from error


def _data_of(settings: dict[str, str]) -> list[str]:
    return [folder.strip() for folder in settings.get("data", "data").split(",")]


def _check_data(settings: dict[str, str]) -> None:
    for name in _data_of(settings):
        if not (Path(name) / "index.json").is_file():
            raise TriptychError(
                f"{name} is not a prepared folder: run `python -m trainer prepare SOURCE --out {name} --view-size 128`"
                ", or name another with --set data=FOLDER"
            )


def _checked_names(chain: Chain, settings: Iterable[str]) -> dict[str, str]:
    """The settings by key; the last of equal keys counts."""
    names = ("data", *(stage.name for stage in chain.stages if stage.recipe or stage.options))
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, dot, _ = key.strip().partition(".")
        if not equals or name not in names or (name == "data") == bool(dot):
            stages = ", ".join(f"{name}.KEY" for name in names[1:])
            raise TriptychError(f"--set {setting}: a chain takes data=FOLDER and the keys of its stages ({stages})")
        found[key.strip()] = value.strip()
    return found


def _told(stage: Stage, command: list[str]) -> str:
    if stage.gathers:
        return f"copies {', '.join(stage.gathers)} to {stage.out}"
    return shlex.join(["python", "-m", "trainer", *command])


def _gather(stage: Stage, folder: Path, command: list[str], processes: int) -> tuple[bool, bool]:
    for source in stage.gathers:
        shutil.copytree(folder / source, folder / stage.out, dirs_exist_ok=True)
    return False, True


def _run(stage: Stage, folder: Path, command: list[str], processes: int) -> tuple[bool, bool]:
    """Whether a signal asked to stop, and whether the command came to its end. Raises TriptychError when it failed."""
    launcher = [sys.executable]
    if stage.recipe and processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    received: list[int] = []
    children: list[subprocess.Popen] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for child in children:
            _pass_on(child, number)

    before = _handle(receive)
    try:
        # In a session of its own, so that Ctrl-C in a terminal comes once, from here. Windows has no sessions: there
        # it comes from the terminal.
        children.append(subprocess.Popen([*launcher, "-m", "trainer", *command], start_new_session=os.name != "nt"))
        for number in received:
            _pass_on(children[0], number)
        code = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A launcher of several processes that was told to stop ends with 1, whatever they did.
    told_to_stop = bool(received) and (code < 0 or code == 130 or processes > 1)
    if code and not told_to_stop:
        raise TriptychError(f"the stage {stage.name} ended with the exit code {code}: see what it said above")
    return bool(received), code == 0


def _pass_on(child: subprocess.Popen, number: int) -> None:
    if os.name != "nt":
        child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    elif number != signal.SIGINT:
        child.terminate()


def _handle(receive: Callable[[int, Any], None]) -> dict[int, Any]:
    wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    try:
        return {number: signal.signal(number, receive) for number in wanted}
    except ValueError:  # not the main thread: signals go elsewhere
        return {}


def _is_trained(run: Path) -> bool:
    """A training command also ends well when it was told to stop."""
    config, _ = read_run(run)
    newest = next(complete_checkpoints(run / "checkpoints"), None)
    stale = newest.state.get("stale_validations", 0) if newest else 0
    return newest is not None and (newest.step >= config.steps or 0 < config.early_stop_patience <= stale)


def _claimed(chain: Chain, folder: Path, wanted: _State) -> _State:
    """The chain that the folder holds, begun now if there is none, with the wanted settings."""
    if is_chain(folder):
        found = _read(folder)
        if found.recipe != wanted.recipe:
            raise TriptychError(f"{folder} holds a chain of {found.recipe}: choose another --run-dir")
        for stage in chain.stages:
            begun = stage.name in found.done or bool(stage.run and (folder / stage.run / CONFIG_NAME).is_file())
            changed = [key for key in found.settings | wanted.settings if _concerns(key, stage, found, wanted)]
            if begun and changed:
                itself = f"change the run itself (`resume {folder / stage.run} --set ...`)" if stage.run else ""
                raise TriptychError(
                    f"{folder} was begun with another {changed[0]} ({found.settings.get(changed[0], 'the default')}), "
                    f"and its stage {stage.name} has used it: {itself}{' or ' * bool(itself)}choose another --run-dir"
                )
        found.settings = wanted.settings
        _write(folder, found)
        return found
    if folder.exists() and any(folder.iterdir()):
        raise TriptychError(f"{folder} is not empty and is not a chain: choose another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, wanted)
    return wanted


def _concerns(key: str, stage: Stage, found: _State, wanted: _State) -> bool:
    """Whether a setting differs and is one of the stage's."""
    if found.settings.get(key) == wanted.settings.get(key):
        return False
    return stage.reads_data if key == "data" else key.startswith(f"{stage.name}.")


def _read(folder: Path) -> _State:
    path = folder / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["recipe"] not in CHAINS:
            raise TriptychError(f"{path}: not a chain of format {FORMAT} that this trainer knows")
        return _State(document["recipe"], dict(document["settings"]), list(document["done"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TriptychError(f"{path}: not readable ({error})") from error


def _write(folder: Path, state: _State) -> None:
    document = {"format": FORMAT, "recipe": state.recipe, "settings": state.settings, "done": state.done}
    write_text_atomically(folder / FILE, json.dumps(document, indent=1) + "\n")
