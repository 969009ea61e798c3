"""Image encoders against a plain reference of DINOv2's own steps, TRELLIS's picture preparation, what is refused."""

import builtins
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from triptych.errors import TriptychError
from triptych.images.published import on_black, published_pictures, published_pictures_of
from triptych.images.views import prepare_views
from triptych.models.image_conditioning import (
    ENCODERS,
    MEAN,
    STD,
    ImageEncoder,
    encoder_info,
    load_image_encoder,
    negative_condition,
)
from triptych.pipelines.memory_plan import plan_memory


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: the image encoders need it")


@pytest.fixture(scope="module")
def vit_folder(transformers, tmp_path_factory):
    """A random DINOv2 with registers, 4 x 4 patches, with a final norm that would be noticed."""
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14, mlp_ratio=2
    )
    vit = transformers.Dinov2WithRegistersModel(config)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("vit")
    vit.save_pretrained(folder)
    return folder


def x_prenorm(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """The tokens before the final norm, step by step as DINOv2's own network takes them.

    Positions are added to class token and patches before the registers come in between.
    """

    def find(*words: str) -> torch.Tensor:
        (key,) = (key for key in state if all(word in key for word in words))
        return state[key]

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    kernel, bias = find("patch_embeddings", "weight"), find("patch_embeddings", "bias")
    patches = F.conv2d((images - mean) / std, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = find("cls_token").expand(len(images), -1, -1)
    x = torch.cat([first, patches], dim=1) + find("position_embeddings")
    x = torch.cat([x[:, :1], find("register_tokens").expand(len(images), -1, -1), x[:, 1:]], dim=1)
    width = x.shape[-1]
    layers = 1 + max(int(key.split("layer")[1].lstrip("s.").split(".")[0]) for key in state if "norm1.weight" in key)
    for layer in range(layers):
        inside = {key: value for key, value in state.items() if f".{layer}." in key}

        def part(*words: str, inside=inside) -> torch.Tensor:
            (key,) = (key for key in inside if all(word in key for word in words))
            return inside[key]

        h = F.layer_norm(x, (width,), part("norm1", "weight"), part("norm1", "bias"), 1e-6)
        q, k, v = (
            F.linear(h, part(*name, "weight"), part(*name, "bias")).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in (("query",), ("key",), ("value",))
        )
        mixed = torch.softmax(q @ k.mT / (width // heads) ** 0.5, dim=-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = F.linear(mixed, part("attention", "output", "weight"), part("attention", "output", "bias"))
        x = x + mixed * part("layer_scale1")
        h = F.layer_norm(x, (width,), part("norm2", "weight"), part("norm2", "bias"), 1e-6)
        h = F.gelu(F.linear(h, part("fc1", "weight"), part("fc1", "bias")))
        x = x + F.linear(h, part("fc2", "weight"), part("fc2", "bias")) * part("layer_scale2")
    return x


def test_the_condition_is_x_prenorm_with_a_plain_layer_norm(vit_folder):
    from safetensors.torch import load_file

    encoder = load_image_encoder(vit_folder)
    pictures = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = encoder(pictures)
        reference = x_prenorm(load_file(vit_folder / "model.safetensors"), pictures, heads=3)
    assert tokens.shape == (2, 1 + 4 + 16, 48)
    assert tokens.shape[1] == encoder.token_count(56)
    torch.testing.assert_close(tokens, F.layer_norm(reference, (48,), eps=1e-5), rtol=1e-4, atol=1e-5)
    assert torch.equal(negative_condition(tokens), torch.zeros(2, 21, 48))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_condition_is_the_hidden_state_before_the_final_norm(transformers, vit_folder):
    vit = transformers.Dinov2WithRegistersModel.from_pretrained(vit_folder).eval()
    pictures = torch.rand(1, 3, 56, 56)
    pixels = (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        before = vit(pixels, output_hidden_states=True).hidden_states[-1]
        after = vit(pixels).last_hidden_state
        tokens = load_image_encoder(vit_folder)(pictures)
    assert torch.equal(tokens, F.layer_norm(before, (48,)))
    assert (tokens - F.layer_norm(after, (48,))).abs().max() > 0.1  # the final norm would make a difference


def test_dinov3_is_treated_alike(transformers):
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64, num_register_tokens=4
    )
    vit = transformers.DINOv3ViTModel(config).eval()
    pictures = torch.rand(1, 3, 64, 64)
    pixels = (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        before = vit(pixels, output_hidden_states=True).hidden_states[-1]
        tokens = ImageEncoder(vit)(pictures)
    assert tokens.shape == (1, 1 + 4 + 16, 48)
    torch.testing.assert_close(tokens, F.layer_norm(before, (48,)))


@pytest.mark.parametrize(("name", "depth", "heads"), [("dinov2_vits14_reg", 12, 6), ("dinov2_vitl14_reg", 24, 16)])
def test_the_table_states_the_networks_sizes(transformers, name, depth, heads):
    info = ENCODERS[name]
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=info.channels, num_hidden_layers=depth, num_attention_heads=heads, image_size=518, patch_size=14
    )
    with torch.device("meta"):
        vit = transformers.Dinov2WithRegistersModel(config)
    assert sum(parameter.numel() for parameter in vit.parameters()) == info.parameters
    assert info.tokens == 1374
    assert plan_memory(encoder=name)["image encoder"].weights == 4 * info.parameters


def test_names_and_repositories_name_the_same_encoder():
    assert encoder_info("facebook/dinov2-with-registers-large") is ENCODERS["dinov2_vitl14_reg"]
    assert encoder_info("dinov3_vith16plus").gated
    assert encoder_info("some/other") is None
    assert {info.tokens for info in ENCODERS.values()} == {1374, 1029}


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    ordinary = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TriptychError, match=r"needs the package transformers .* pip install transformers"):
        load_image_encoder()


def test_encoders_that_cannot_be_had(transformers, vit_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        TriptychError, match=r"it is gated, so accept its licence at huggingface.co/facebook/dinov3-vits"
    ):
        load_image_encoder("dinov3_vits16", local_files_only=True)
    gated = OSError("You are trying to access a gated repo.")
    url = "https://hub.test/owner/own-encoder/resolve/main/config.json"
    gated.response = SimpleNamespace(status_code=401, request=SimpleNamespace(url=url))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PretrainedConfig, "get_config_dict", Mock(side_effect=gated))
        with pytest.raises(TriptychError, match=r"it is gated, so accept its licence at huggingface.co/owner/own-enc"):
            load_image_encoder("owner/own-encoder")
    with pytest.raises(TriptychError, match="no image encoder 'dinov9': give a local folder"):
        load_image_encoder("dinov9")
    other = tmp_path / "other"
    transformers.BertConfig().save_pretrained(other)
    with pytest.raises(TriptychError, match="holds a 'bert' network: only dinov2,"):
        load_image_encoder(other)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((vit_folder / "config.json").read_bytes())
    with pytest.raises(TriptychError, match="is no usable image encoder .*model.safetensors"):
        load_image_encoder(cut)
    (cut / "model.safetensors").write_bytes((vit_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(TriptychError, match="is no usable image encoder"):
        load_image_encoder(cut)


def test_missing_weights_are_not_made_up(transformers, vit_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(vit_folder / "model.safetensors")
    (key,) = (key for key in state if "register_tokens" in key)
    del state[key]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((vit_folder / "config.json").read_bytes())
    with pytest.raises(TriptychError, match="lacks the weights of .*register_tokens and 0 more"):
        load_image_encoder(tmp_path)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 60, 60), "60 pixels do not divide into patches of 14 .*: use 56"),
        ((1, 4, 56, 56), r"pictures must be \(V, 3, S, S\)"),
        ((1, 3, 56, 70), r"pictures must be \(V, 3, S, S\)"),
    ],
)
def test_pictures_of_a_wrong_shape_are_refused(vit_folder, shape, sentence):
    with pytest.raises(TriptychError, match=sentence):
        load_image_encoder(vit_folder)(torch.zeros(shape))


# ---- pictures


def ellipse(width: int, height: int, box: tuple[int, int, int, int], soft: bool = False) -> Image.Image:
    """A coloured ellipse with alpha; box: left, top, right, bottom."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    left, top, right, bottom = box
    u, v = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
    radius = np.hypot(u, v)
    alpha = np.clip((1 - radius) * 6, 0, 1) if soft else (radius <= 1).astype(float)
    rgb = np.stack([0.9 + 0 * x, 0.2 + 0.6 * x / width, 0.1 + 0.7 * y / height], axis=-1)
    return Image.fromarray(np.rint(np.concatenate([rgb, alpha[..., None]], -1) * 255).astype(np.uint8), "RGBA")


def published(picture: Image.Image, size: int) -> np.ndarray:
    """The preparation of 1.1 of the research notes, written down plainly, in 8 bits."""
    alpha = np.array(picture)[:, :, 3]
    places = np.argwhere(alpha > 0.8 * 255)
    box = places[:, 1].min(), places[:, 0].min(), places[:, 1].max(), places[:, 0].max()
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    side = int(max(box[2] - box[0], box[3] - box[1]) * 1.2)
    cut = picture.crop((x - side // 2, y - side // 2, x + side // 2, y + side // 2))
    values = np.array(cut.resize((size, size), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    return (values[:, :, :3] * values[:, :, 3:4] * 255).astype(np.uint8)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("box", [(40, 30, 161, 100), (-20, 10, 60, 111), (5, 5, 60, 199)], ids=str)
def test_a_picture_with_alpha_becomes_the_published_one(box, soft):
    picture = ellipse(200, 210, box, soft)
    found, notes = published_pictures([picture], size=98)
    assert notes == ()
    assert found.shape == (1, 3, 98, 98)
    values = np.rint(found[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    assert np.array_equal(values, published(picture, 98))
    assert values.max() > 200  # there is an object in it


def test_the_object_fills_the_square_and_the_rest_is_black():
    found = on_black(ellipse(400, 300, (100, 50, 300, 250)), 120)
    seen = (found.sum(dim=0) > 0.5).nonzero()  # not the ripples of the kernel
    low, high = seen.min(dim=0).values, seen.max(dim=0).values
    assert ((high - low + 1) / 120 - 1 / 1.2).abs().max() < 0.02
    assert torch.equal(found[:, 0, 0], torch.zeros(3))


def test_a_picture_without_alpha_is_cut_out_first():
    cut_out = ellipse(300, 300, (60, 60, 241, 241))
    plain = Image.new("RGBA", cut_out.size, (255, 255, 255, 255))
    plain.alpha_composite(cut_out)
    (found, _), (wanted, _) = (
        published_pictures([plain.convert("RGB")], size=98),
        published_pictures([cut_out], size=98),
    )
    assert (found - wanted).abs().mean() < 0.01


def test_prepared_views_become_pictures_too():
    views = prepare_views({"front": ellipse(300, 300, (60, 60, 241, 241))}, size=256)
    (wanted, _) = published_pictures([ellipse(300, 300, (60, 60, 241, 241))], size=98)
    assert (published_pictures_of(views, 98) - wanted).abs().mean() < 0.02


def test_pictures_that_cannot_be_used():
    with pytest.raises(TriptychError, match="0 pictures were given"):
        published_pictures([])
    with pytest.raises(TriptychError, match="5 pictures were given: give one to 4"):
        published_pictures([ellipse(40, 40, (5, 5, 35, 35))] * 5)
    with pytest.raises(TriptychError, match="picture 2 has no solid pixel"):
        empty = Image.new("RGBA", (50, 50), (255, 0, 0, 150))
        published_pictures([ellipse(60, 60, (5, 5, 55, 55)), empty], foreground="alpha")
    with pytest.raises(TriptychError, match="is 9 pixels large"):
        published_pictures([ellipse(60, 60, (5, 5, 13, 13))])
