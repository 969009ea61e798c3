"""Bundles from published folders: what is published loads, is fetched when it is needed, and nothing else passes."""

import hashlib
import json
import pickle
import re
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from published_folder import MEAN, SMALL, STD, pipeline_json, small_network, write_published_folder
from safetensors.torch import load_file, save_file
from tiny_bundle import make_tiny_bundle

from triptych.bundles import hub
from triptych.bundles.access import refusal
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.bundles.hub import HubFolder
from triptych.bundles.published import PublishedBundle, weightless
from triptych.errors import TriptychError
from triptych.geometry.flexicubes import features_to_mesh
from triptych.models.structure_vae import occupied_coords
from triptych.sampling.flow_euler import Cancelled, flow_euler_sample
from triptych.sampling.slat import denormalize_slat, slat_noise
from triptych.sparse.tensor import SparseTensor

# Class -> published constructor arguments and bytes of the published file (shared/research/trellis.md 1.4, 1.5).
_SWIN = dict(
    resolution=64, model_channels=768, latent_channels=8, num_blocks=12, num_heads=12, mlp_ratio=4, attn_mode="swin",
    window_size=8, use_fp16=True,
)  # fmt: skip
_VAE = dict(latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, use_fp16=True)
_DIT = dict(
    in_channels=8, out_channels=8, model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, mlp_ratio=4,
    pe_mode="ape", qk_rms_norm=True, use_fp16=True,
)  # fmt: skip
_GS = SMALL["slat_decoder_gs"][3]["representation_config"] | {"num_gaussians": 32}
PUBLISHED = {
    "SparseStructureDecoder": (_VAE | dict(out_channels=1, channels=[512, 128, 32]), 147_591_972),
    "SparseStructureFlowModel": (_DIT | dict(resolution=16, patch_size=1), 1_130_770_840),
    "SLatFlowModel": (
        _DIT | dict(resolution=64, patch_size=2, num_io_res_blocks=2, io_block_channels=[128]), 1_203_755_136,
    ),
    "SLatMeshDecoder": (_SWIN | dict(representation_config={"use_color": True}), 181_903_412),
    "SLatGaussianDecoder": (_SWIN | dict(representation_config=_GS), 171_450_952),
    "SLatRadianceFieldDecoder": (_SWIN | dict(representation_config={"rank": 16, "dim": 8}), 171_450_488),
    "SparseStructureEncoder": (_VAE | dict(in_channels=1, channels=[32, 128, 512]), 119_068_016),
    "SLatEncoder": (_SWIN | dict(in_channels=1024), 173_242_816),
}  # fmt: skip

_WIDTH = {"float32": 4, "float16": 2}
_CODES = {"float32": "F32", "float16": "F16"}


def safetensors_size(table: dict[str, tuple[list[int], str]]) -> int:
    """Bytes of a safetensors file without metadata: length, header padded to 8, tensors, wide ones first, by name."""
    header, end = {}, 0
    for name, (shape, dtype) in sorted(table.items(), key=lambda item: (-_WIDTH[item[1][1]], item[0])):
        size = torch.Size(shape).numel() * _WIDTH[dtype]
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def table_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[list[int], str]]:
    return {name: (list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}


def published_table(path: Path, class_name: str) -> dict[str, tuple[list[int], str]]:
    """Key -> shape and dtype of one published file; a row ending in xN stands for blocks 0..N-1."""
    found = re.search(
        rf"^=====[^\n]* (?:Elastic)?{class_name} [^\n]*\n(.*?)(?=^=====|\Z)", path.read_text(), re.M | re.S
    )
    assert found, f"{class_name} is not in {path.name}"
    table = {}
    for key, shape, dtype, repeat in re.findall(r"^ +(\S+) \[([\d, ]*)\] (\w+) ?(?:x(\d+))?", found[1], re.M):
        for i in range(int(repeat or 1)):
            table[key.replace("{i}", str(i))] = ([int(n) for n in shape.split(",")], dtype)
    return table


# ---- the published set


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published") / "small")


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_names_shapes_dtypes_and_file_sizes_are_the_published_ones(fixtures_dir: Path, class_name: str) -> None:
    config, published_bytes = PUBLISHED[class_name]
    ours = table_of(weightless(class_name, config).state_dict())
    assert ours == published_table(fixtures_dir / "published_keys.txt", class_name)
    assert safetensors_size(ours) == published_bytes


def test_the_size_of_a_file_follows_from_its_table(folder: Path) -> None:
    for _, stem, _, _ in SMALL.values():
        file = folder / "ckpts" / f"{stem}.safetensors"
        assert safetensors_size(table_of(load_file(file))) == file.stat().st_size


# ---- a local folder


def example(component: str) -> tuple:
    """Inputs of a small network, two samples."""
    generator = torch.Generator().manual_seed(5)
    xyz = torch.stack([torch.randperm(16**3, generator=generator)[:40] for _ in range(2)]).flatten()
    coords = torch.stack([torch.arange(2).repeat_interleave(40), xyz // 256, xyz // 16 % 16, xyz % 16], dim=1).int()
    width = SMALL[component][3].get("in_channels", 8)
    sparse = SparseTensor(torch.randn(80, width, generator=generator), coords, resolution=16)
    times, cond = torch.tensor([100.0, 900.0]), torch.randn(2, 5, 24, generator=generator)
    return {
        "structure_encoder": (torch.randn(2, 1, 16, 16, 16, generator=generator),),
        "structure_decoder": (torch.randn(2, 8, 4, 4, 4, generator=generator),),
        "structure_flow": (torch.randn(2, 8, 4, 4, 4, generator=generator), times, cond),
        "slat_flow": (sparse, times, cond),
    }.get(component, (sparse,))


def values(result: SparseTensor | torch.Tensor) -> torch.Tensor:
    return result.feats if isinstance(result, SparseTensor) else result


@pytest.mark.parametrize("seed", range(len(SMALL)))
def test_every_network_loads_strict_and_computes_what_was_saved(seed: int, folder: Path) -> None:
    component = list(SMALL)[seed]
    bundle = load_bundle(folder)
    inputs, saved = example(component), small_network(component, seed)
    half = bundle.network(component, torch.float16)
    assert table_of(half.state_dict()) == table_of(saved.state_dict())
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in half.state_dict().items())
    full = bundle.network(component)
    assert type(full) is type(saved) and not full.training
    assert {(p.dtype, p.requires_grad) for p in full.parameters()} == {(torch.float32, False)}
    saved.convert_to(torch.float32)
    assert torch.equal(values(full(*inputs)), values(saved(*inputs)))
    low = values(bundle.network(component, torch.bfloat16)(*inputs))
    assert low.dtype == torch.float32 and bundle.network(component, torch.bfloat16).dtype == torch.bfloat16
    assert 0 < float((low - values(full(*inputs))).norm() / values(full(*inputs)).norm()) < 0.05


def test_the_two_stages_run_from_noise_to_a_mesh(folder: Path) -> None:
    bundle, generator = load_bundle(folder), torch.Generator().manual_seed(3)
    cond = torch.randn(1, 5, 24, generator=generator)
    guided = dict(cond=cond, neg_cond=torch.zeros_like(cond))
    noise = torch.randn(1, 8, 4, 4, 4, generator=generator)
    settings = bundle.manifest.sampling
    latent = flow_euler_sample(bundle.network("structure_flow"), noise, **settings["structure"], **guided).samples
    coords = occupied_coords(bundle.network("structure_decoder")(latent))[:150]
    assert len(coords) == 150
    slat = flow_euler_sample(
        bundle.network("slat_flow"), slat_noise(coords, 8, 16, generator=generator), **settings["slat"], **guided
    ).samples
    raw = bundle.network("slat_decoder_mesh")(denormalize_slat(slat, *vars(bundle.slat_normalization).values()))
    assert (raw.resolution, raw.feats.shape) == (64, (150 * 64, 101))
    mesh = features_to_mesh(raw.coords[:, 1:], raw.feats, 64)
    assert len(mesh.faces) > 1000 and mesh.vertices.isfinite().all() and mesh.vertex_attrs.shape[1] == 6


def test_the_pipeline_states_frame_sampling_and_normalization(folder: Path) -> None:
    bundle = load_bundle(str(folder))
    assert type(bundle) is PublishedBundle and bundle.name == "small"
    assert (bundle.manifest.up, bundle.manifest.front, bundle.image_cond_model) == ("+Z", "-Y", "dinov2_vitl14_reg")
    settings = dict(steps=3, guidance=5.0, guidance_interval=(0.5, 1.0), rescale_t=3.0, sigma_min=1e-5)
    assert bundle.manifest.sampling == {"structure": settings, "slat": settings}
    assert bundle.slat_normalization is not None
    assert (bundle.slat_normalization.mean, bundle.slat_normalization.std) == (tuple(MEAN), tuple(STD))
    assert set(bundle.components) == set(SMALL) and not bundle.has("text_encoder")
    facts = bundle.component("slat_flow")
    file = folder / facts.file
    assert (facts.class_name, facts.bytes, facts.dtype) == ("SLatFlowModel", file.stat().st_size, "float16+float32")
    assert facts.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(TriptychError, match="small has no 'text_encoder', only structure_flow, "):
        bundle.network("text_encoder")


def test_networks_are_loaded_on_demand_kept_and_released_one_by_one(folder: Path) -> None:
    bundle = load_bundle(folder)
    decoder, encoder = bundle.network("structure_decoder"), bundle.network("structure_encoder")
    assert bundle.network("structure_decoder") is decoder
    bundle.release("structure_decoder")
    assert bundle.network("structure_decoder") is not decoder and bundle.network("structure_encoder") is encoder
    bundle.release()
    assert bundle.network("structure_encoder") is not encoder


def test_building_draws_and_allocates_nothing() -> None:
    before = torch.random.get_rng_state()
    network = weightless("SparseStructureFlowModel", PUBLISHED["SparseStructureFlowModel"][0])
    assert torch.equal(torch.random.get_rng_state(), before)
    real = [name for name, value in network.state_dict().items() if not value.is_meta and value.numel() > 1024]
    assert real == ["pos_emb"]


@pytest.fixture()
def small(tmp_path: Path) -> Path:
    return write_published_folder(tmp_path / "small", components=("structure_decoder", "structure_encoder"))


WEIGHTS, CONFIG = "ckpts/ss_dec_conv3d_16l8_fp16.safetensors", "ckpts/ss_dec_conv3d_16l8_fp16.json"


def test_only_what_is_asked_for_is_read(small: Path) -> None:
    (small / WEIGHTS).write_bytes(b"broken")
    assert load_bundle(small).network("structure_encoder") is not None
    assert set(json.loads((small / hub.LOCAL_RECORD).read_text())["commits"][""]) == {
        "pipeline.json", "ckpts/ss_enc_conv3d_16l8_fp16.json", "ckpts/ss_enc_conv3d_16l8_fp16.safetensors",
    }  # fmt: skip


def test_a_file_that_changed_after_its_first_use_is_refused(small: Path) -> None:
    load_bundle(small).verify()
    content = bytearray((small / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (small / WEIGHTS).write_bytes(content)
    for use in (lambda: load_bundle(small).network("structure_decoder"), load_bundle(small).verify):
        with pytest.raises(
            TriptychError, match=r"ss_dec_conv3d_16l8_fp16\.safetensors was changed .* since it was first"
        ):
            use()
    (small / hub.LOCAL_RECORD).unlink()
    assert load_bundle(small).network("structure_decoder") is not None
    (small / CONFIG).write_text((small / CONFIG).read_text() + " ")
    with pytest.raises(TriptychError, match=r"ss_dec_conv3d_16l8_fp16\.json has \d+ bytes instead of \d+ since it was"):
        load_bundle(small).network("structure_decoder")


def test_a_truncated_local_file_is_refused_and_not_recorded(small: Path) -> None:
    whole = (small / WEIGHTS).read_bytes()
    for length in (0, 7, 2000, len(whole) - 1):
        (small / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(TriptychError, match=r"safetensors is not a whole safetensors file .*: fetch it again"):
            load_bundle(small).network("structure_decoder")
    (small / WEIGHTS).write_bytes(whole)
    assert load_bundle(small).network("structure_decoder") is not None


class _Boom:
    def __reduce__(self):
        return (open, ("ran.txt", "w"))


def test_a_pickle_is_refused_and_never_run(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (small / WEIGHTS).write_bytes(pickle.dumps(_Boom()))
    with pytest.raises(TriptychError, match="is not a whole safetensors file"):
        load_bundle(small).network("structure_decoder")
    assert not (tmp_path / "ran.txt").exists()


TENSORS = {
    "shape": (
        lambda s: s | {"out_layer.2.bias": torch.zeros(2)},
        r"tensor out_layer\.2\.bias is \[2\], .* needs \[1\]",
    ),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "input_layer.bias"}, r"lacks tensor input_layer\.bias"),
    "unknown": (lambda s: s | {"extra": torch.zeros(1)}, "has the unknown tensor extra"),
    "kind": (lambda s: s | {"out_layer.2.bias": torch.zeros(1, dtype=torch.int64)}, r"out_layer\.2\.bias is int64"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_one_wrong_tensor_is_named(what: str, small: Path) -> None:
    change, sentence = TENSORS[what]
    save_file(change(load_file(small / WEIGHTS)), small / WEIGHTS)
    with pytest.raises(TriptychError, match=sentence):
        load_bundle(small).network("structure_decoder")


CONFIGS = {
    "unknown class": ({"name": "torch.nn.Linear", "args": {}}, r"network class 'torch\.nn\.Linear', known are"),
    "another class": (
        {"name": "SparseStructureEncoder", "args": SMALL["structure_encoder"][3]},
        "has to be a SparseSt",
    ),
    "unknown argument": (
        {"name": "SparseStructureDecoder", "args": {"no_such": 1}},
        "config does not fit SparseStruct",
    ),
    "no class": ({"args": {}}, "is damaged .it has no name and args"),
    "args of a list": ({"name": "SparseStructureDecoder", "args": [1]}, "is damaged .it has no name and args"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_wrong_config_is_refused(what: str, small: Path) -> None:
    content, sentence = CONFIGS[what]
    (small / CONFIG).write_text(json.dumps(content))
    with pytest.raises(TriptychError, match=sentence):
        load_bundle(small).network("structure_decoder")


def test_the_elastic_classes_of_training_configs_are_the_plain_ones(small: Path) -> None:
    config = json.loads((small / CONFIG).read_text())
    (small / CONFIG).write_text(json.dumps(config | {"name": f"Elastic{config['name']}"}))
    assert load_bundle(small).network("structure_decoder") is not None


def set_args(**changes) -> dict:
    data = pipeline_json()
    return data | {"args": {k: v for k, v in (data["args"] | changes).items() if v is not None}}


PIPELINES = {
    "another pipeline": (pipeline_json() | {"name": "Trellis2Pipeline"}, "is of a 'Trellis2Pipeline', only Trellis"),
    "outside": (set_args(models={"sparse_structure_decoder": "../../x"}), r"'\.\./\.\./x' outside of its folder"),
    "absolute": (set_args(models={"sparse_structure_decoder": "/etc/x"}), "'/etc/x' outside of its folder"),
    "sampler": (set_args(slat_sampler={"name": "eval", "args": {}, "params": {}}), "the sampler 'eval', known are"),
    "no models": (set_args(models=None), "is damaged .KeyError: 'models'"),
    "deviation": (set_args(slat_normalization={"mean": [0.0], "std": [0.0]}), "is damaged .ValueError: slat_normal"),
    "lengths": (set_args(slat_normalization={"mean": [0.0], "std": [1.0, 1.0]}), "has 1 means and 2 deviations"),
    "conditioning": (set_args(image_cond_model=None), "is damaged .KeyError: 'image_cond_model'"),
    "list": ([1], "is damaged .it holds no object"),
}


@pytest.mark.parametrize("what", PIPELINES)
def test_a_wrong_pipeline_is_refused(what: str, tmp_path: Path) -> None:
    content, sentence = PIPELINES[what]
    (tmp_path / "pipeline.json").write_text(json.dumps(content))
    with pytest.raises(TriptychError, match=sentence):
        load_bundle(tmp_path)


def test_damaged_json_and_records_are_sentences(small: Path) -> None:
    for file, sentence in ((hub.LOCAL_RECORD, "delete it"), ("pipeline.json", "fetch it again")):
        for content in ("{", "[" * 100_000, '{"commits": {"": {"a": {"no": 1}}}}' if file == hub.LOCAL_RECORD else "3"):
            kept = (small / file).read_text() if (small / file).exists() else None
            (small / file).write_text(content)
            with pytest.raises(TriptychError, match=rf"{file} is damaged .*{sentence}"):
                load_bundle(small)
            (small / file).unlink() if kept is None else (small / file).write_text(kept)


def test_a_folder_that_cannot_be_written_is_used_with_a_warning(small: Path, monkeypatch) -> None:
    def full(folder: Path, files: dict) -> None:
        raise TriptychError(f"cannot write {', '.join(files)} into {folder} (read-only)")

    monkeypatch.setattr(hub, "write_files", full)
    with pytest.warns(UserWarning, match="later changes of these files will not be noticed: .*read-only") as heard:
        assert load_bundle(small).network("structure_decoder") is not None
    assert len(heard) == 1


# ---- a repository


class FakeHub:
    """The endpoints of the Hugging Face Hub that a download uses, on this machine; counts what it serves."""

    def __init__(self, folder: Path, repository: str = "owner/small") -> None:
        self.folder, self.repository = folder, repository
        self.commit = "a" * 40
        self.requests: list[tuple[str, str, str | None]] = []  # method, path in the repository or "api", Range
        self.cut: dict[str, int] = {}  # file -> bytes after which the connection ends, and the file is unavailable
        self.down: set[str] = set()
        self.refused: tuple[int, str | None] | None = None  # status and error code of every file, as a gated one has
        self.hidden = False  # the listing is refused too, as of a private or missing repository
        self.held: dict[str, tuple[int, threading.Event]] = {}  # file -> bytes after which it waits for the event
        self.served: dict[str, int] = {}
        self.endpoint = ""

    def files(self) -> dict[str, bytes]:
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def listing(self) -> bytes:
        siblings = []
        for name, content in self.files().items():
            entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return json.dumps({"id": self.repository, "sha": self.commit, "siblings": siblings, "tags": []}).encode()

    def gets(self, ending: str = "") -> list[str]:
        return [name for method, name, _ in self.requests if method == "GET" and name.endswith(ending)]


def _handler(fake: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            api = re.fullmatch(rf"/api/models/{fake.repository}/revision/(\w+)", self.path.partition("?")[0])
            found = re.fullmatch(rf"/{fake.repository}/resolve/{fake.commit}/(.*)", self.path)
            if api and fake.hidden:
                self._reply(401, b"", {}, send)
            elif api and api[1] in ("main", fake.commit):
                fake.requests.append(("GET", "api", None))
                self._reply(200, fake.listing(), {}, send)
            elif found and found[1] in fake.files():
                fake.requests.append((self.command, found[1], self.headers.get("Range")))
                self._file(found[1], send)
            else:
                self._reply(404, b"", {"X-Error-Code": "RepoNotFound"}, send)

        def _file(self, name: str, send: bool) -> None:
            if fake.refused:
                status, code = fake.refused
                return self._reply(status, b"", {"X-Error-Code": code} if code else {}, send)
            if send and name in fake.down:
                return self._reply(503, b"", {}, send)
            content = fake.files()[name]
            etag = hashlib.sha256(content).hexdigest()
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            facts = {"ETag": f'"{etag}"', "X-Repo-Commit": fake.commit, "Accept-Ranges": "bytes"}
            if start:
                facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._reply(206 if start else 200, content[start:], facts, send, name)

        def _reply(self, status: int, body: bytes, facts: dict, send: bool, name: str = "") -> None:
            self.send_response(status)
            for key, value in {**facts, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if not send:
                return
            cut = fake.cut.pop(name, None)
            if name in fake.held:
                count, go_on = fake.held[name]
                self.wfile.write(body[:count])
                go_on.wait(60)
                body = body[count:]
            fake.served[name] = fake.served.get(name, 0) + len(body[:cut])
            self.wfile.write(body[:cut])
            if cut is not None:
                fake.down.add(name)
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture()
def fake(small: Path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_RESUMED_BYTES", 10_000)
    served = FakeHub(small)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture()
def opened(fake: FakeHub, tmp_path: Path, monkeypatch):
    """load_bundle on the fake Hub, with a cache of its own."""

    def remote(repository: str, revision: str | None = None) -> HubFolder:
        return HubFolder(repository, revision, endpoint=fake.endpoint, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(hub, "HubFolder", remote)
    monkeypatch.chdir(tmp_path)
    return lambda name="owner/small", **told: load_bundle(name, **told)


def record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "cache" / "models--owner--small" / hub.HUB_RECORD).read_text())


def test_a_repository_opens_with_one_small_file_and_fetches_the_rest_on_demand(opened, fake, small: Path) -> None:
    bundle = opened()
    assert bundle.name == "owner/small" and fake.gets() == ["api", "pipeline.json"]
    assert bundle.has("structure_decoder") and bundle.manifest.provenance["revision"] == fake.commit
    network = bundle.network("structure_decoder")
    assert fake.gets() == ["api", "pipeline.json", CONFIG, WEIGHTS]
    expected = load_file(small / WEIGHTS)
    assert all(torch.equal(value, expected[name].float()) for name, value in network.state_dict().items())
    bundle.verify()
    assert len(fake.gets()) == 4  # nothing is fetched only to be verified


def test_what_is_here_opens_without_a_network_at_the_commit_that_was_first_resolved(opened, fake, tmp_path) -> None:
    first = opened()
    first.network("structure_decoder")
    before, fake.commit, fake.requests = fake.commit, "b" * 40, []
    again = opened()
    again.network("structure_decoder")
    assert fake.requests == [] and again.manifest.provenance["revision"] == before
    assert record(tmp_path)["pins"] == {"main": before}
    assert opened(f"owner/small@{'b' * 40}").manifest.provenance["revision"] == "b" * 40
    assert opened().manifest.provenance["revision"] == before


def test_an_interrupted_download_goes_on_where_it_stopped(opened, fake, small: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # of which a begun one is lost
    bundle, size = opened(), (small / WEIGHTS).stat().st_size
    fake.cut[WEIGHTS] = 80_500
    with pytest.raises(
        TriptychError, match=rf"{WEIGHTS} of owner/small at aaaaaaaaaaaa could not be fetched .*try again"
    ):
        bundle.network("structure_decoder")
    fake.down.clear()
    assert opened().network("structure_decoder") is not None  # as a new process would
    ranges = [wanted for method, name, wanted in fake.requests if (method, name) == ("GET", WEIGHTS)]
    assert ranges[0] is None and ranges[-1] == "bytes=80000-"
    assert fake.served[WEIGHTS] == size + 500


def test_a_download_tells_how_far_it_is_and_one_that_is_cancelled_goes_on_later(opened, fake, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    parts, shares = ("structure_decoder", "structure_encoder"), []

    def told(stage: str, share: float) -> None:
        assert stage == "fetch"
        shares.append(share)

    bundle = opened()
    with pytest.raises(Cancelled, match="stopped while owner/small at aaaaaaaaaaaa was fetched"):
        bundle.fetch(parts, told, lambda: len(shares) > 40)
    assert len(shares) == 41 and 0 < shares[-1] < 0.5 and shares == sorted(shares)
    stopped_at = shares[-1]
    shares.clear()
    bundle.fetch(parts, told)
    ranges = [wanted for method, name, wanted in fake.requests if (method, name) == ("GET", WEIGHTS)]
    assert ranges[0] is None and ranges[1].startswith("bytes=")
    later = [share for share in shares if share > stopped_at]
    assert len(shares) - len(later) <= 3 and later == sorted(later) and later[-1] == 1.0 and len(later) > 60
    before = len(fake.requests)
    assert bundle.network("structure_decoder") is not None and len(fake.requests) == before
    with pytest.raises(TriptychError, match="has no 'text_encoder'"):
        bundle.fetch(("text_encoder",))


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_file_in_the_cache_is_fetched_again(damage: str, opened, fake, tmp_path: Path) -> None:
    opened().network("structure_decoder")
    for name in (WEIGHTS, CONFIG):
        cached = tmp_path / "cache" / "models--owner--small" / "snapshots" / fake.commit / name
        content = bytearray(cached.read_bytes())
        content[len(content) // 2] ^= 1
        cached.resolve().write_bytes(content[:-1] if damage == "truncated" else content)
        fake.requests = []
        with pytest.warns(UserWarning, match=f"{Path(name).name} .*it is fetched again"):
            assert opened().network("structure_decoder") is not None
        assert fake.gets() == [name]


def test_a_hub_that_serves_another_file_than_it_states_is_refused(opened, fake, small: Path) -> None:
    bundle = opened()
    content = bytearray((small / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (small / WEIGHTS).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TriptychError, match=r"was changed .*, also when fetched again: report it to its publisher"):
            bundle.network("structure_decoder")


def test_hashes_that_the_hub_does_not_state_are_recorded(opened, fake, small: Path, tmp_path: Path) -> None:
    opened().network("structure_decoder")
    files = record(tmp_path)["commits"][fake.commit]
    for name in ("pipeline.json", CONFIG, WEIGHTS):
        assert files[name]["sha256"] == hashlib.sha256((small / name).read_bytes()).hexdigest()


def test_a_repository_of_our_own_format_is_fetched_and_verified_too(opened, fake, tmp_path: Path) -> None:
    fake.folder = tmp_path / "own"
    make_tiny_bundle(fake.folder)
    (fake.folder / "code.py").write_text("raise SystemExit")
    shares: list[float] = []
    bundle = opened(progress=lambda stage, share: shares.append(share), cancel=lambda: False)
    assert type(bundle) is Bundle and bundle.name == "tiny-random" and shares[0] == 0 and shares[-1] == 1
    assert set(fake.gets()) == {"api", "bundle.json", "structure_decoder.safetensors", "structure_flow.safetensors"}
    bundle.verify()
    fake.requests = []
    assert opened().network("structure_decoder") is not None and fake.requests == []


def test_a_repository_of_neither_format_is_a_sentence(opened, fake) -> None:
    (fake.folder / "pipeline.json").unlink()
    with pytest.raises(TriptychError, match=r"owner/small at aaaaaaaaaaaa has no file bundle\.json: choose another"):
        opened()


@pytest.mark.parametrize("refused", [(401, "GatedRepo"), (403, "GatedRepo"), (401, None), (403, None)])
def test_a_gated_repository_says_where_to_accept_its_licence(refused, opened, fake) -> None:
    bundle = opened()
    fake.refused = refused
    for use in (lambda: bundle.network("structure_decoder"), lambda: bundle.fetch(("structure_encoder",))):
        with pytest.raises(
            TriptychError, match="could not be fetched .*: it is gated, so accept its licence at "
        ) as told:
            use()
        assert "huggingface.co/owner/small and sign in with `hf auth login` (or set HF_TOKEN" in str(told.value)
        assert "try again" not in str(told.value) and "\n" not in str(told.value)


def test_a_hub_that_hides_a_repository_names_both_reasons(opened, fake) -> None:
    fake.hidden = True
    with pytest.raises(TriptychError, match="check the name, and if it is gated accept its licence at .*hf auth login"):
        opened()


def test_a_link_that_has_expired_is_tried_again_and_is_no_matter_of_licences() -> None:
    from types import SimpleNamespace

    expired = OSError("403 Client Error")
    expired.response = SimpleNamespace(status_code=403, request=SimpleNamespace(url="https://cdn.test/aa/bb?sign=1"))
    assert refusal(expired, "owner/small") is None
    expired.response.request.url = "https://hub.test/owner/small/resolve/main/model.safetensors"
    assert refusal(expired, "owner/small") == 403


def test_repositories_that_are_not_there_and_no_network_are_sentences(opened, fake, tmp_path: Path) -> None:
    with pytest.raises(TriptychError, match="no local bundle 'owner/other', and none could be fetched by that name"):
        opened("owner/other")
    with pytest.raises(TriptychError, match="no local bundle 'owner/small', and none could be fetched"):
        opened("owner/small@nosuchbranch")
    with pytest.raises(TriptychError, match="no local bundle 'owner/small', and none could be fetched"):
        opened("owner/small@refs/pr/1")  # a revision with slashes is asked for as well
    with pytest.raises(TriptychError, match="no bundle './nowhere' found"):  # a path that is not there is no repository
        opened("./nowhere")
    fake.endpoint = "http://127.0.0.1:9"
    with pytest.raises(TriptychError, match="no local bundle 'owner/small', and none could be fetched by that name"):
        opened()
    assert not (tmp_path / "cache" / "models--owner--small").exists()
