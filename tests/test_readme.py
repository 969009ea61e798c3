"""What the README and the pages under docs/ say is so: the file map, the commands, the links, the licences."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made by running, never part of the repository (see .gitignore).
MADE = re.compile(r"(\.git(ignore|attributes)?|\.venv|__pycache__|\..*_cache|.*\.egg-info|out|runs|test-artifacts)$")


def file_map():
    """Path -> description, folders with a slash at their end; two spaces of indent are one level."""
    text = re.search(r"<!-- file map.*?-->\n```\n(.*?)```", README, re.S)[1]
    entries, parent = {}, ""
    for line in text.splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) {2,}(\S.*)", line).groups()
        assert len(indent) in (0, 2), line
        entries[parent + name if indent else name] = description
        parent = parent if indent else name
    return entries


def listed(folder, prefix=""):
    found = [path for path in folder.iterdir() if not MADE.match(path.name)]
    return {prefix + path.name + ("/" if path.is_dir() else "") for path in found}


def test_everything_in_the_file_map_exists():
    missing = [name for name in file_map() if not (ROOT / name).exists()]
    assert missing == []


def test_everything_at_the_top_and_in_the_library_is_in_the_file_map():
    named = {name for name in file_map() if name.count("/") - name.endswith("/") == 0}
    # A working copy may hold more: only what git would keep counts.
    assert kept(listed(ROOT) - {"README.md"}) - named == set()
    rooms = {name for name in file_map() if name.startswith("triptych/")} - {"triptych/"}
    assert listed(ROOT / "triptych", "triptych/") - {"triptych/__init__.py"} == rooms


def kept(names):
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:  # not a git checkout, for instance an unpacked archive
        return names
    tops = {line.split("/")[0] + ("/" if "/" in line else "") for line in done.stdout.splitlines()}
    return names & tops


def commands(page):
    """The argument lists of the lines in shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@cache
def help_of(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


README_COMMANDS = sorted({(*words[2:], "") for words in commands(ROOT / "README.md")})


def test_every_command_line_of_the_readme_goes_through_run_py():
    lines = commands(ROOT / "README.md")
    assert len(lines) >= 12
    assert all(words[:2] == ["python", "run.py"] for words in lines)
    shown = {words[2] for words in lines}
    library = {"generate", "views", "convert", "render", "inspect", "compare", "parity", "api"}
    assert shown == library | {"demo", "test", "web", "trainer"}


@pytest.mark.parametrize("words", README_COMMANDS, ids=" ".join)
def test_the_readmes_commands_and_options_exist(words):
    command, *rest = [word for word in words if word]
    usage = re.sub(r"\s+", " ", help_of("run.py"))
    if command in ("test", "web"):
        assert f"run.py {command}" in usage
        return
    if command == "trainer":
        command, module, rest = rest[0], "trainer", rest[1:]
    else:
        module = "triptych"
        assert re.search(rf"run\.py (\w+\|)*{command}\b", usage)
    text = help_of("-m", module, command)
    unknown = [word for word in rest if word.startswith("-") and not re.search(rf"(?<![\w-]){word}(?![\w-])", text)]
    assert unknown == []


def test_options_on_the_page_about_generation_exist():
    page = ROOT / "docs" / "generation.md"
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
    text = help_of("-m", "triptych", "generate") + help_of("-m", "triptych", "api")
    assert len(named) >= 12 and {word for word in named if not re.search(rf"(?<![\w-]){word}(?![\w-])", text)} == set()
    assert {words[2] for words in commands(page)} == {"generate", "api"}


def test_the_readmes_workflow_is_there_and_needs_no_other_picture():
    from triptych.api.graph import read_workflow
    from triptych.cli.api import workflow_file

    (words,) = [words[3:] for words in commands(ROOT / "README.md") if words[2] == "api"]
    graph = read_workflow(workflow_file(Path(words[0])))
    given = {word.partition("=")[0] for word in words if "=" in word}
    asked = {node["_meta"]["title"] for node in graph.values() if node["class_type"] == "LoadImage"}
    assert given == asked


def test_recipes_named_in_the_readme_exist():
    pytest.importorskip("accelerate", reason="the trainer needs its extra: pip install -e .[train]")
    from trainer.recipes import build_recipe

    names = [words[4] for words in commands(ROOT / "README.md") if words[2:4] == ["trainer", "train"]]
    assert names == ["structure_flow_tiny"]
    for name in names:
        assert build_recipe(name).task in name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.resolve().is_relative_to(ROOT) and place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_extras_named_in_the_pages_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page in PAGES:
        for extras in re.findall(r"\.\[([\w,]+)\]", page.read_text(encoding="utf-8")):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.M), f"{page.name}: {extra}"


# Licences ------------------------------------------------------------------------------------------------------------


def direct_dependencies():
    """Name -> extra ("" for the base), from pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    base = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]
    extras = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.M | re.S)[1]
    found = {name: "" for name in re.findall(r'"([\w-]+)', base)}
    for extra, body in re.findall(r"^(\w+) = \[(.*?)\](?: *#.*)?$", extras, re.M | re.S):
        found.update({name: extra for name in re.findall(r'"([A-Za-z][\w-]*)', body)})
    return found


def licence_rows():
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| (\w*) ?\| ([^|]+) \| [^|]+ \|$", text, re.M)
    return {name: (extra, licence.strip()) for name, extra, licence in rows if name != "package"}


def test_every_direct_dependency_has_a_licence_row_and_no_row_is_left_over():
    assert len(direct_dependencies()) > 15
    assert {name: extra for name, (extra, _) in licence_rows().items()} == direct_dependencies()


SIGNS = {
    "BSD": r"BSD|Redistribution and use in source and binary forms",
    "MIT": r"\bMIT\b|Permission is hereby granted, free of charge",
    "Apache": r"Apache",
    "MPL": r"MPL|Mozilla",
    "GPL": r"GPL|General Public",
}


@pytest.mark.parametrize("name", sorted(licence_rows()))
def test_the_stated_licence_is_the_installed_packages(name):
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here: its row is unchecked")
    fields = [metadata.get("License-Expression"), metadata.get("License"), *metadata.get_all("Classifier", [])]
    stated = " ".join(field for field in fields if field)
    if not stated:
        pytest.skip(f"{name}'s metadata states no licence: its row is unchecked")
    for family in re.findall(r"BSD|MIT|Apache|MPL|GPL", licence_rows()[name][1]):
        assert re.search(SIGNS[family], stated), f"{name}: {stated[:200]}"


def test_the_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text and "END OF TERMS AND CONDITIONS" in text
