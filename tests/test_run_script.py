"""run.py without a network: its decisions one by one, then whole runs against an environment with a pretended pip."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("triptych_run_script", ROOT / "run.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

VERSION = list(sys.version_info[:3])


# Decisions -----------------------------------------------------------------------------------------------------------


def test_the_interpreter_lies_where_each_system_puts_it():
    venv = Path("folder") / ".venv"
    assert PurePath(script.venv_python(venv, "nt")).parts[-3:] == (".venv", "Scripts", "python.exe")
    assert PurePath(script.venv_python(venv, "posix")).parts[-3:] == (".venv", "bin", "python")


def copy_requirements(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_fingerprint_follows_requirements_python_and_place(tmp_path):
    here = copy_requirements(tmp_path / "here")
    first = script.fingerprint(here, VERSION)
    assert first == script.fingerprint(here, VERSION)
    marks = {first, script.fingerprint(copy_requirements(tmp_path / "there"), VERSION)}
    marks.add(script.fingerprint(here, [3, 10, 1]))
    for name in ("pyproject.toml", "requirements.txt"):
        (here / name).write_bytes((here / name).read_bytes() + b"\n# more\n")
        marks.add(script.fingerprint(here, VERSION))
    assert len(marks) == 5


def test_line_endings_do_not_change_the_fingerprint(tmp_path):
    first = script.fingerprint(copy_requirements(tmp_path), VERSION)
    path = tmp_path / "pyproject.toml"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert script.fingerprint(tmp_path, VERSION) == first


def test_a_stamp_serves_its_extras_and_fewer(tmp_path):
    script.write_stamp(tmp_path, "mark", {"train", "test"})
    stamp = script.read_stamp(tmp_path)
    assert script.is_ready(stamp, "mark", set())
    assert script.is_ready(stamp, "mark", {"test", "train"})
    assert not script.is_ready(stamp, "other", set())
    assert not script.is_ready(stamp, "mark", {"matting"})
    assert not script.is_ready({}, "mark", set())
    assert [path.name for path in tmp_path.iterdir()] == [script.STAMP]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"extras": 3}', "\x00\xff"])
def test_a_damaged_stamp_counts_as_none(tmp_path, text):
    (tmp_path / script.STAMP).write_text(text, encoding="latin-1")
    assert script.read_stamp(tmp_path) == {}


@pytest.mark.parametrize(
    ("version", "kept"),
    [("2.13.0+cpu", True), ("2.4.0", True), ("3.0.1", True), ("2.3.1+cu121", False), (None, False), ("dev", False)],
)
def test_a_torch_that_is_new_enough_is_kept(version, kept):
    assert script.torch_is_usable(version) is kept


def test_other_pythons_settings_do_not_reach_the_environment():
    clean = script.child_environment({"PYTHONPATH": "x", "PYTHONHOME": "y", "PIP_USER": "1", "PATH": "p", "CI": "true"})
    assert "PYTHONPATH" not in clean and "PYTHONHOME" not in clean
    assert clean["PIP_USER"] == "0" and clean["PATH"] == "p" and clean["CI"] == "true"


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk space"),
        ("NewConnectionError(...)\nERROR: No matching distribution found for torch", "network"),
        ("SSLError(SSLCertVerificationError ... CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("ERROR: No matching distribution found for xatlas", "3.11 or 3.12"),
        ("error: command '/usr/bin/gcc' failed", "3.11 or 3.12"),
        ("PermissionError: [Errno 13] Permission denied", "writable"),
        ("ModuleNotFoundError: No module named 'numpy'", "run.py clean"),
        ("something new", "read the log"),
    ],
)
def test_every_failure_comes_with_a_remedy(log, advice):
    assert advice in script.remedy(log)


def test_pips_lines_become_a_few_words():
    assert script.short_progress("Collecting numpy>=1.26 (from triptych==0.1.0)") == "collecting numpy>=1.26"
    line = "  Downloading scipy-1.17.1-cp311-cp311-linux_x86_64.whl (35.0 MB)"
    assert script.short_progress(line) == "downloading scipy-1.17.1-cp311-cp311-linux_x86_64.whl (35.0 MB)"
    assert script.short_progress("Installing collected packages: a, b") == "putting the packages in place"
    assert script.short_progress("Requirement already satisfied: numpy") is None


def test_requirements_are_the_dependencies_without_those_of_comfyui():
    """ComfyUI installs requirements.txt and brings its own torch and transformers; exact pins would break others."""
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1])
    assert dependencies[0] == script.TORCH_ANY
    assert dependencies[1].startswith("transformers>=")
    assert requirements == dependencies[2:]
    assert not any(re.match(r"torch|transformers|nvidia|triton", line) or "==" in line for line in requirements)


# Whole runs ----------------------------------------------------------------------------------------------------------

PRETENDED_PIP = """
import json, os, pathlib, sys
site = pathlib.Path(__file__).resolve().parent.parent
log = site / "pip-calls.json"
calls = json.loads(log.read_text()) if log.exists() else []
log.write_text(json.dumps([*calls, sys.argv[1:]]))
behaviour = os.environ.get("PRETEND", "")
print("Collecting", sys.argv[-1])
if behaviour == "no pin" and sys.argv[-1].startswith("torch=="):
    sys.exit("ERROR: No matching distribution found for torch==2.13.0")
if behaviour == "full disk":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
if behaviour == "die" and "-e" in sys.argv:
    os.kill(os.getppid(), 9)
    sys.exit(0)
for name in ["torch"] if "-e" not in sys.argv else ["numpy", "triptych", "ruff", "mypy", "pytest", "trainer"]:
    folder = site / name
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(
        "import json, os, sys\\n"
        "print(json.dumps([%r, sys.argv[1:], os.getcwd()]), flush=True)\\n"
        "sys.exit(int(os.environ.get('STATUS_%s', 0)))" % (name, name)
    )
    meta = site / (name + "-2.13.0.dist-info")
    meta.mkdir(exist_ok=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\\nName: %s\\nVersion: 2.13.0\\n" % name)
    (meta / "RECORD").write_text("")
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository's outside with an environment whose pip only pretends."""
    root = copy_requirements(tmp_path / "a copy")
    shutil.copy(ROOT / "run.py", root / "run.py")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / ".venv")], check=True, timeout=60)
    plant_pip(root)
    return root


def site_packages(root):
    return next((root / ".venv").glob("lib/python*/site-packages"), root / ".venv" / "Lib" / "site-packages")


def plant_pip(root):
    pip = site_packages(root) / "pip"
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(PRETENDED_PIP)
    meta = site_packages(root) / "pip-99.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 99\n")
    (meta / "RECORD").write_text("")


def run(root, *arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, str(root / "run.py"), *arguments],
        cwd=cwd or root,
        env={**os.environ, "CI": "true", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def pip_calls(root):
    path = site_packages(root) / "pip-calls.json"
    calls = json.loads(path.read_text()) if path.exists() else []
    path.unlink(missing_ok=True)
    return [call[1:] for call in calls]


def commands(done):
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_demo_installs_once_and_passes_arguments_and_folder_on(copy, tmp_path):
    elsewhere = tmp_path / "pictures here"
    elsewhere.mkdir()
    arguments = ["--front", "my front.png", "-o", "result", "--help"]
    first = run(copy, "demo", *arguments, cwd=elsewhere)
    assert first.returncode == 0, first.stderr
    assert commands(first) == [["triptych", ["demo", *arguments], str(elsewhere)]]
    assert pip_calls(copy) == [["torch==2.13.0"], ["-e", "."]]
    started = time.monotonic()
    second = run(copy, "demo", "a.png")
    assert commands(second) == [["triptych", ["demo", "a.png"], str(copy)]]
    assert pip_calls(copy) == []
    assert second.stdout.count("\n") == 1 and time.monotonic() - started < 5


def test_test_adds_its_extras_lints_and_ends_with_pytest(copy):
    run(copy, "demo")
    pip_calls(copy)
    done = run(copy, "test")
    assert done.returncode == 0, done.stderr
    assert pip_calls(copy) == [["-e", ".[test,train]"]]  # torch is there already: it is kept
    called = [["ruff", ["check", "."]], ["mypy", ["triptych", "trainer"]], ["pytest", []]]
    assert commands(done) == [[*call, str(copy)] for call in called]
    assert commands(done)[-1] == json.loads(done.stdout.splitlines()[-1])
    assert commands(run(copy, "test", "-k", "mesh")) == [["pytest", ["-k", "mesh"], str(copy)]]
    assert pip_calls(copy) == []
    run(copy, "demo")
    assert pip_calls(copy) == []


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest"])
def test_one_failing_check_fails_the_run_and_pytest_is_still_last(copy, failing):
    done = run(copy, "test", **{f"STATUS_{failing}": "1"})
    assert done.returncode == 1
    assert [call[0] for call in commands(done)] == ["ruff", "mypy", "pytest"]
    assert done.stdout.splitlines()[-1].startswith('["pytest"')


def test_a_changed_requirement_installs_again_with_all_extras(copy):
    run(copy, "test")
    pip_calls(copy)
    (copy / "requirements.txt").write_text("# changed\n")
    run(copy, "demo")
    assert pip_calls(copy) == [["-e", ".[test,train]"]]


def test_a_missing_pin_falls_back_with_a_sentence(copy):
    done = run(copy, "demo", PRETEND="no pin")
    assert done.returncode == 0, done.stderr
    assert pip_calls(copy) == [["torch==2.13.0"], ["torch>=2.4"], ["-e", "."]]
    assert "torch==2.13.0 is not offered for this Python and platform" in done.stdout


def test_a_failed_installation_says_why_and_leaves_no_stamp(copy):
    done = run(copy, "demo", PRETEND="full disk")
    assert done.returncode == 2
    assert "free some disk space" in done.stderr and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / ".venv" / script.STAMP).exists()
    assert "No space left" in (copy / ".venv" / script.LOG).read_text()
    assert run(copy, "demo").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="kills its parent the POSIX way")
def test_a_killed_installation_leaves_no_stamp_and_is_done_again(copy):
    killed = run(copy, "demo", PRETEND="die")
    assert killed.returncode == -9
    assert not (copy / ".venv" / script.STAMP).exists()
    pip_calls(copy)
    assert run(copy, "demo").returncode == 0
    assert pip_calls(copy) == [["-e", "."]]


def test_an_environment_that_does_not_start_is_made_again(tmp_path, monkeypatch):
    """A half-made .venv: its configuration and an interpreter that is a dangling link."""
    root = copy_requirements(tmp_path)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").write_text("home = gone\n")
    (root / ".venv" / "left over").write_text("")
    setup = script.Setup(root)
    assert script.probe(setup.python) is None
    installed = []
    monkeypatch.setattr(script.Setup, "_install", lambda self, extras, torch: installed.append((extras, torch)))
    monkeypatch.setattr(script.Setup, "_step", lambda self, what, arguments: pytest.fail("pip was made with it"))
    assert setup.ensure(set()) == setup.python
    assert installed == [(set(), None)]
    assert script.probe(setup.python)["pip"] is not None
    assert not (root / ".venv" / "left over").exists()
    assert (root / ".venv" / script.STAMP).exists()


def test_a_folder_of_somebody_elses_is_never_emptied(tmp_path):
    root = copy_requirements(tmp_path)
    (root / ".venv").mkdir()
    (root / ".venv" / "thesis.txt").write_text("years of work")
    with pytest.raises(script.SetupError, match="not a virtual environment: move it away"):
        script.Setup(root).ensure(set())
    with pytest.raises(script.SetupError, match="not a virtual environment"):
        script.clean(root)
    assert (root / ".venv" / "thesis.txt").read_text() == "years of work"


def test_a_python_without_venv_names_the_package(tmp_path, monkeypatch, capsys):
    copy_requirements(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ensurepip" else find(name))
    assert script.main(["demo"], tmp_path) == 2
    assert "sudo apt install python3-venv" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()


def test_unknown_commands_and_help(tmp_path, capsys):
    assert script.main(["dmeo"], tmp_path) == 2
    assert "there is no command 'dmeo'" in capsys.readouterr().err
    assert script.main(["--help"], tmp_path) == 0
    assert script.main([], tmp_path) == 2
    assert list(tmp_path.iterdir()) == []


def test_clean_removes_the_environment(copy):
    assert run(copy, "clean").returncode == 0
    assert not (copy / ".venv").exists()
    assert run(copy, "clean").returncode == 0


def test_the_script_needs_the_standard_library_only():
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "run.py").read_text(encoding="utf-8"), re.M))
    assert imported <= set(sys.stdlib_module_names) | {"__future__"}


def test_continuous_integration_runs_the_readmes_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "exec python3 run.py test"
    assert os.name == "nt" or os.access(ROOT / ".ci" / "run", os.X_OK)
