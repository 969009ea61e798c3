"""The command line: views, generate, demo, convert, render, inspect, compare, parity, api.

Exit codes: 0 done; 1 the user can mend it (one sentence on stderr that begins with ``error:``); 2 wrong usage (and
for ``parity`` a file that it cannot run); 130 interrupted. Results go to stdout, progress and warnings to stderr. A
command that fails leaves no new file.

Heavy imports wait for the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import TriptychError
from .arguments import UsageError, parse

# Command -> the module of its function of the same name.
_HOMES = {"views": "reconstruct", "generate": "generate", "demo": "reconstruct", "inspect": "inspect",
          "convert": "meshes", "render": "meshes", "compare": "meshes", "parity": "parity", "api": "api"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. argv: without the program's name, None takes the process's own."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse(argv)
        run = getattr(import_module(f"{__name__}.{_HOMES[args.command]}"), args.command)
        return int(run(args) or 0)
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except MemoryError:
        print("error: out of memory; use a smaller --texture-size, --faces or --ensemble", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output went away; keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{place}: check the path and the free space", file=sys.stderr)
    return 1
