"""The API client against a server that fails in every way that servers do."""

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from fake_server import Broken, FakeServer, until

from triptych.api import JobFailed, JobLost, Rejected, Server, Unreachable, job, run, run_workflow
from triptych.api.companions import companions
from triptych.api.files import download, offered, relative_path
from triptych.api.graph import find_file_input, find_node, read_workflow, with_values, without
from triptych.api.run import least_loaded
from triptych.api.websocket import BINARY, TEXT, WebSocket
from triptych.cli import main
from triptych.errors import TriptychError

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "front"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "b.png"}, "_meta": {"title": "back"}},
    "3": {"class_type": "Triptych_Reconstruct", "inputs": {"views": ["1", 0], "seed": 0, "name": "x"}},
    "4": {"class_type": "Save", "inputs": {"mesh": ["3", 0], "back": ["2", 0]}, "_meta": {"title": "save"}},
}
OBJ = {"filename": "a.obj", "subfolder": "mesh", "type": "output"}
PNG = {"filename": "p.png", "subfolder": "", "type": "temp"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(job, "POLL_S", 0.05)
    monkeypatch.setattr(job, "LOST_S", 0.5)
    monkeypatch.setattr(job, "RETRY_S", (0.02, 0.05))
    monkeypatch.setattr("triptych.api.server.PAUSE_S", 0.01)


def makes_files(server, prompt_id, graph):
    server.files["output", "mesh", "a.obj"] = b"v 0 0 0\n"
    server.files["temp", "", "p.png"] = b"picture"
    return {"4": {"3d": [OBJ], "files": [OBJ], "text": ["done", ""]}, "3": {"images": [PNG], "animated": [True]}}


def go(server, out, **more):
    return run_workflow(GRAPH, [Server(server.url)], out, **more)


def test_files_texts_and_progress(tmp_path):
    def work(server, prompt_id, graph):
        until(lambda: server.connections)
        server.send_raw(0x82, struct.pack(">II", 1, 1) + b"jpeg" * 100)
        server.send_raw(0x89, b"ping")
        server.send("progress", node="3", value=7, max=10, prompt_id="another job")
        server.send("progress", node="3", value=1, max=2, prompt_id=prompt_id)
        server.send("crystools.monitor", cpu=1)
        until(lambda: heard)
        return makes_files(server, prompt_id, graph)

    heard = []
    with FakeServer(work) as server:
        result = go(server, tmp_path / "out", progress=lambda node, share: heard.append((node, share)))
        sent = server.bodies[0]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in result.files] == ["mesh/a.obj", "temp/p.png"]
    assert result.files[0].read_bytes() == b"v 0 0 0\n" and result.texts == {"save": ["done"]}
    assert heard == [("Triptych_Reconstruct", 0.5)]
    assert sent["prompt"] == GRAPH and sent["prompt_id"] == result.prompt_id and sent["client_id"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mesh", "temp"]  # no leftovers


def test_inputs_are_uploaded_once_per_content(tmp_path):
    first, second = tmp_path / 'a"[b].png', tmp_path / "b.png"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    with FakeServer() as server:
        for _ in range(2):
            go(server, tmp_path / "out", inputs={"front": first, "2": second})
        assert sorted(server.uploads.values()) == [b"one", b"two"]
        assert server.requests.count(("POST", "/upload/image")) == 2
        for node in "12":
            assert server.bodies[0]["prompt"][node]["inputs"]["image"] in server.uploads
        assert server.bodies[0]["prompt"] == server.bodies[1]["prompt"]
        name = server.bodies[0]["prompt"]["1"]["inputs"]["image"]
        assert name.startswith("triptych/") and not set(name) & set('"[]')
    assert GRAPH["1"]["inputs"]["image"] == "a.png"


def test_an_obj_takes_its_materials_along_and_nothing_from_elsewhere(tmp_path):
    home = tmp_path / "home"
    (home / "maps").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (home / "id_rsa").write_bytes(b"secret")
    (home / "link.png").symlink_to(tmp_path / "secret.png")
    (home / "a b.mtl").write_text(
        "map_Kd -s 1 1 1 maps/c.png\nmap_Ks ../secret.png\nmap_Ke id_rsa\nmap_d link.png\nbump maps\\c.png\n"
    )
    (home / "maps" / "c.png").write_bytes(b"png")
    (home / "m.obj").write_text("mtllib a b.mtl\nmtllib /etc/passwd\nmtllib \0.mtl\nv 0 0 0\n")
    assert companions(home / "m.obj") == [(home / "a b.mtl").resolve(), (home / "maps" / "c.png").resolve()]
    (home / "m.gltf").write_text(json.dumps({"images": [{"uri": "maps/c%2Epng"}, {"uri": "data:x"}], "buffers": [{}]}))
    assert companions(home / "m.gltf") == [(home / "maps" / "c.png").resolve()]
    graph = {"1": {"class_type": "Triptych_LoadMesh", "inputs": {"file": ""}}}
    with FakeServer() as server:
        run_workflow(graph, [Server(server.url)], tmp_path / "out", inputs={"1": home / "m.obj"})
        file = server.bodies[0]["prompt"]["1"]["inputs"]["file"]
        folder = file.removesuffix("/m.obj")
        assert set(server.uploads) == {file, f"{folder}/a b.mtl", f"{folder}/maps/c.png"}


@pytest.mark.parametrize("status", [200, 400])
def test_validation_errors_name_the_node(tmp_path, status):
    errors = {"4": {"errors": [{"message": "Value not in list", "details": "mesh: 'x'"}], "class_type": "Save"}}
    with FakeServer(lambda server, *_: time.sleep(5)) as server:
        if status == 200:
            server.also = errors
        else:
            server.answer = (400, {"error": {"message": "no outputs"}, "node_errors": errors})
        with pytest.raises(Rejected, match=r"save \(node 4, Save\): Value not in list \(mesh: 'x'\)$"):
            go(server, tmp_path)
        assert server.stopped == set(server.running)  # what was queued all the same is taken back


def test_a_refusal_without_nodes(tmp_path):
    with FakeServer() as server:
        server.answer = (400, {"error": {"message": "Prompt has no outputs.", "details": ""}, "node_errors": {}})
        with pytest.raises(Rejected, match="refuses the workflow: Prompt has no outputs$"):
            go(server, tmp_path)


def test_execution_error_names_the_node(tmp_path):
    def work(server, prompt_id, graph):
        raise Broken("execution_error", node_id="3", exception_message="no views: connect some\n", traceback=[])

    with (
        FakeServer(work) as server,
        pytest.raises(JobFailed, match=r"^node 3 \(Triptych_Reconstruct\) failed: no views: connect some$"),
    ):
        go(server, tmp_path)


def test_cancelled_by_somebody_else(tmp_path):
    def work(server, prompt_id, graph):
        raise Broken("execution_interrupted", node_id="4")

    with FakeServer(work) as server, pytest.raises(JobFailed, match="cancelled at save"):
        go(server, tmp_path)


@pytest.mark.parametrize("websockets", [True, False])
def test_a_dropped_or_refused_websocket_loses_nothing(tmp_path, websockets):
    def work(server, prompt_id, graph):
        if websockets:
            until(lambda: server.connections == 1)
            server.drop()
            until(lambda: server.connections == 2)
            server.send("progress", node="3", value=1, max=4, prompt_id=prompt_id)
            until(lambda: heard)
        return makes_files(server, prompt_id, graph)

    heard = []
    with FakeServer(work) as server:
        server.websockets = websockets
        result = go(server, tmp_path, progress=lambda *seen: heard.append(seen))
        assert len(result.files) == 2 and len(server.bodies) == 1
    assert heard == [("Triptych_Reconstruct", 0.25)] * websockets


def test_a_lost_answer_to_the_queueing_is_found_again(tmp_path, monkeypatch):
    real = Server._once

    def once(self, method, path, *more):
        answer = real(self, method, path, *more)
        if path == "/prompt":
            raise Unreachable("the line broke")
        return answer

    monkeypatch.setattr(Server, "_once", once)
    with FakeServer(makes_files) as server:
        assert len(go(server, tmp_path).files) == 2 and len(server.bodies) == 1


def test_a_restarted_server_gets_the_job_again(tmp_path):
    def work(server, prompt_id, graph):
        if len(server.bodies) == 1:
            server.forget()
            return {}
        return makes_files(server, prompt_id, graph)

    said = []
    with FakeServer(work) as server:
        assert len(go(server, tmp_path, notice=said.append).files) == 2
        assert len(server.bodies) == 2 and len({body["prompt_id"] for body in server.bodies}) == 2
    assert any("does not know the job any more" in sentence and "queued again" in sentence for sentence in said)


def test_a_job_that_is_always_lost_is_given_up(tmp_path):
    with FakeServer(lambda server, *_: server.forget() or {}) as server:
        with pytest.raises(JobLost, match="restarted"):
            go(server, tmp_path)
        assert len(server.bodies) == run.TRIES


def test_a_server_that_dies_hands_its_job_to_another(tmp_path):
    with FakeServer(makes_files) as other, FakeServer() as dying:
        dying.work = lambda *_: threading.Thread(target=dying.__exit__).start() or time.sleep(30) or {}
        result = run_workflow(GRAPH, [Server(dying.url), Server(other.url)], tmp_path)
    assert result.server == other.url and len(result.files) == 2


def test_the_least_loaded_server_gets_the_job(tmp_path):
    with FakeServer(makes_files) as busy, FakeServer(makes_files) as idle:
        busy.pending = {"x": {}, "y": {}}
        idle.pending = {"z": {}}
        assert run_workflow(GRAPH, [Server(busy.url), Server(idle.url)], tmp_path).server == idle.url
        idle.pending = {str(number): {} for number in range(3)}
        assert run_workflow(GRAPH, [Server(busy.url), Server(idle.url)], tmp_path).server == busy.url


def test_servers_that_do_not_answer_are_passed_over():
    said = []
    with FakeServer() as gone:
        pass
    with FakeServer() as server:
        chosen = least_loaded([Server(gone.url), Server(server.url)], said.append)
        assert chosen.url == server.url and len(said) == 1 and "does not answer" in said[0]
    with pytest.raises(Unreachable, match="does not answer.*is ComfyUI running there"):
        least_loaded([Server(gone.url)])


def test_a_slow_job_is_cancelled_when_its_time_is_over(tmp_path):
    with FakeServer(lambda server, prompt_id, _: until(lambda: prompt_id in server.stopped) or {}) as server:
        with pytest.raises(TriptychError, match="did not end within 0.3 s and was cancelled"):
            go(server, tmp_path, timeout_s=0.3)
        assert server.stopped == {server.bodies[0]["prompt_id"]}


@pytest.mark.parametrize("waiting", [True, False])
def test_an_interruption_cancels_the_job_and_no_other(tmp_path, waiting):
    def work(server, prompt_id, graph):
        if waiting:
            server.pending[prompt_id] = server.running.pop(prompt_id)
        until(lambda: prompt_id in server.stopped or (waiting and prompt_id not in server.pending))
        return {}

    def stop(node, share):
        raise KeyboardInterrupt

    with FakeServer(work) as server:
        server.pending["other"], server.running["another"] = {}, {}

        def say(sentence):
            def later():
                until(lambda: server.bodies and (not waiting or server.bodies[0]["prompt_id"] in server.pending))
                server.send("progress", node="3", value=1, max=2, prompt_id=server.bodies[0]["prompt_id"])

            threading.Thread(target=later, daemon=True).start()

        with pytest.raises(KeyboardInterrupt):
            go(server, tmp_path, progress=stop, notice=say)
        mine = server.bodies[0]["prompt_id"]
        assert mine not in server.pending and "other" in server.pending and "another" in server.running
        assert server.stopped == (set() if waiting else {mine})


HOSTILE = [
    ("../evil", ""), ("..", ""), ("/etc/cron.d/x", ""), ("a/b.obj", ""), ("a\\..\\b.obj", ""), ("a\0.obj", ""),
    ("", ""),     ("x" * 5000, ""), ("a.obj", "../.."), ("a.obj", "/abs"),
    ("a.obj", "a/../../b"), ("a.obj", "C:\\x"), ("CON.obj", ""),
    (".bashrc", ""), ("a.obj", ".ssh"), ("a.obj", "a\\..\\..\\b"), ("a.obj ", ""), ("a.obj", "/".join("x" * 40)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place"), HOSTILE)
def test_hostile_names_write_nothing(tmp_path, name, place):
    entry = {"filename": name, "subfolder": place, "type": "output"}

    def work(server, prompt_id, graph):
        server.files["output", place, name] = b"evil"
        return {"4": {"files": [OBJ, entry]}}

    out = tmp_path / "deep" / "out"
    with FakeServer(work) as server, pytest.raises(TriptychError, match="no plain name: nothing was written"):
        go(server, out)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["../..", "/", "..", "a/b"])
def test_hostile_types(kind):
    with pytest.raises(TriptychError, match="no plain name"):
        relative_path({"filename": "a.obj", "subfolder": "", "type": kind})


def test_a_link_in_the_folder_leads_nowhere(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "mesh").symlink_to(elsewhere)
    with FakeServer(makes_files) as server, pytest.raises(TriptychError, match="leads out of"):
        go(server, out)
    assert list(elsewhere.iterdir()) == []


def test_a_file_that_cannot_be_fetched_leaves_nothing(tmp_path):
    with FakeServer() as server:
        server.files["output", "mesh", "a.obj"] = b"v"
        missing = {"filename": "b.obj", "subfolder": "", "type": "output"}
        with pytest.raises(TriptychError, match="no longer the file 'b.obj'"):
            download(Server(server.url), [OBJ, missing], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_files_of_the_same_names_stay(tmp_path):
    out = tmp_path / "out"
    with FakeServer(makes_files) as server:
        first = go(server, out, previews=False).files
        again = go(server, out, previews=False).files
        assert first == again == (out / "mesh" / "a.obj",)
        (out / "mesh" / "a.obj").write_bytes(b"mine")
        third = go(server, out, previews=False).files
        assert third == (out / "run_00002" / "mesh" / "a.obj",) and first[0].read_bytes() == b"mine"
        assert go(server, out, previews=False, overwrite=True).files == first and first[0].read_bytes() == b"v 0 0 0\n"


def test_offered_lists_every_file_once():
    outputs = {"1": {"files": [OBJ, PNG], "3d": [OBJ], "text": ["x"], "result": ["mesh/a.obj", None]}, "2": None}
    assert offered(outputs) == [OBJ, PNG]


def test_nodes_are_found_by_id_title_and_class():
    assert [find_node(GRAPH, name) for name in ("3", "Front", "reconstruct", "Triptych_Reconstruct")] == list("3133")
    with pytest.raises(TriptychError, match="'LoadImage' could be front .*, back .*: use the id"):
        find_node(GRAPH, "LoadImage")
    with pytest.raises(TriptychError, match="no node 'left'; it has front"):
        find_node(GRAPH, "left")
    assert find_file_input(GRAPH, "back") == ("2", "image") and find_file_input(GRAPH, "save.mesh") == ("4", "mesh")
    with pytest.raises(TriptychError, match="no input 'left'; its inputs are: front, back"):
        find_file_input(GRAPH, "left")
    with pytest.raises(TriptychError, match="not known to load files.*save.file"):
        find_file_input(GRAPH, "save")


def test_values_keep_their_types_and_unknown_names_are_refused():
    changed = with_values(
        GRAPH, ["3.seed=12", "reconstruct.name=007", "3.new=[1, 2]", "3.views=null"], lambda _: {"new"}
    )
    assert changed["3"]["inputs"] == {"views": None, "seed": 12, "name": "007", "new": {"__value__": [1, 2]}}
    assert GRAPH["3"]["inputs"]["seed"] == 0
    for text in ("seed=1", "3.seed", "=1", "3.=1"):
        with pytest.raises(TriptychError, match="write node.input=value"):
            with_values(GRAPH, [text], lambda _: set())
    with pytest.raises(TriptychError, match="has no input 'sed'; its inputs are: name, seed, views"):
        with_values(GRAPH, ["3.sed=1"], lambda _: set())


def test_a_node_can_be_left_out():
    left = without(GRAPH, ["back"])
    assert set(left) == {"1", "3", "4"} and left["4"]["inputs"] == {"mesh": ["3", 0]}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": 1}', '{"a": {"inputs": {}}}', "\x00"])
def test_what_is_no_workflow(tmp_path, text):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(TriptychError, match="is no (JSON file|ComfyUI workflow)"):
        read_workflow(tmp_path / "w.json")


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://x?y"])
def test_what_is_no_server(url):
    with pytest.raises(TriptychError, match="no server's address"):
        Server(url)


def test_another_kind_of_server_is_recognised(tmp_path):
    with FakeServer() as server:
        with pytest.raises(TriptychError, match="answered 404: is it a ComfyUI"):
            Server(f"{server.url}/other").load()
        server.answer = (500, {})
        with pytest.raises(TriptychError, match="answered 500: look at its log"):
            go(server, tmp_path)


def test_websocket_messages_in_pieces():
    with FakeServer() as server:
        socket = WebSocket(f"{server.url}/ws?clientId=x")
        until(lambda: server.connections)
        assert socket.receive(0.02) is None
        server.send_raw(0x01, b"one ")
        assert socket.receive(0.05) is None
        server.send_raw(0x89, b"")
        server.send_raw(0x80, b"two")
        server.send_raw(0x82, b"x" * 70)
        server.send_raw(0x82, b"y" * 40_000)
        assert socket.receive(2) == (TEXT, b"one two") and socket.receive(2) == (BINARY, b"x" * 70)
        assert socket.receive(2) == (BINARY, b"y" * 40_000)
        server.send_raw(0x88, b"")
        with pytest.raises(ConnectionError, match="closed"):
            socket.receive(2)
        socket.close()


@pytest.mark.parametrize("frame", [b"\xc1\x00", b"\x81\x80abcd", b"\x82\x7f" + b"\xff" * 8])
def test_websocket_frames_that_are_refused(frame):
    with FakeServer() as server:
        socket = WebSocket(f"{server.url}/ws")
        until(lambda: server._sockets)
        server._sockets[0].sendall(frame)
        with pytest.raises(ConnectionError, match="refuse|larger"):
            socket.receive(2)
        socket.close()


def test_command_line(tmp_path, capsys):
    workflow, picture = tmp_path / "w.json", tmp_path / "a.png"
    workflow.write_text(json.dumps(GRAPH))
    picture.write_bytes(b"one")
    words = ["api", str(workflow), "--input", f"front={picture}", "--set", "reconstruct.seed=5", "--without", "back"]
    with FakeServer(makes_files) as server:
        assert main([*words, "--server", server.url, "-o", str(tmp_path / "out"), "--no-previews"]) == 0
        out, err = capsys.readouterr()
        summary = json.loads(out)
        assert summary["files"] == [str(tmp_path / "out" / "mesh" / "a.obj")] and Path(summary["files"][0]).exists()
        assert summary["server"] == server.url and f"running on {server.url}" in err
        queued = server.bodies[0]["prompt"]
        assert queued["3"]["inputs"]["seed"] == 5 and "2" not in queued
        assert main([*words, "--server", server.url, "--print-api"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["3"]["inputs"]["seed"] == 5 and len(server.bodies) == 1
        server.work = _fails
        assert main([*words, "--server", server.url, "-o", str(tmp_path / "out")]) == 1
        assert "error: node 3 (Triptych_Reconstruct) failed: too little light\n" in capsys.readouterr().err


def _fails(server, prompt_id, graph):
    raise Broken("execution_error", node_id="3", exception_message="too little light")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "add --out DIR"),
        (["-o", "{out}", "--input", "front"], 2, "write NAME=FILE"),
        (["-o", "{out}", "--input", "front=a", "--input", "front=b"], 2, "given twice"),
        (["-o", "{out}", "--input", "front=missing.png"], 1, "no file missing.png"),
        (["-o", "{workflow}"], 1, "is a file where a folder is needed"),
        (["-o", "{out}", "--timeout", "0"], 2, "positive number of seconds"),
        (["-o", "{out}", "--server", "nowhere:x"], 1, "no server's address"),
    ],
)
def test_command_line_mistakes(tmp_path, capsys, words, code, sentence):
    workflow = tmp_path / "w.json"
    workflow.write_text(json.dumps(GRAPH))
    filled = [word.format(out=tmp_path / "out", workflow=workflow) for word in words]
    assert main(["api", str(workflow), *filled]) == code
    assert sentence in capsys.readouterr().err and not os.path.exists(tmp_path / "out")
