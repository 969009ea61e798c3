"""Small random Flux models in diffusers layout, made in a second or two: the same modules as the real ones.

`klein_folder(size)` and `kontext_folder()` return folders that are made once per process; do not change them, copy them
with `copied`. Sizes: "tiny" has the shape of the embedded model, "mini" the smallest that still has every kind of
module (one double and one single block; its sheets are the noise of random weights like all others here).
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "a red green blue wooden round tall chair table car sphere cube given front left back right nothing view . : ,"

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 2, "double": 2, "single": 6, "vae": (32, 64, 96, 96), "hidden": 64, "head_dim": 128},
    "mini": {"heads": 1, "double": 1, "single": 1, "vae": (32, 32, 32, 32), "hidden": 32, "head_dim": 128},
}


@functools.cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flux_tiny_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, to))


def klein_folder(size: str = "mini", *, distilled: bool = False, card: bool = False) -> Path:
    """A random FLUX.2 klein. card: with a views.json like the tiny model's (else a plain diffusers folder)."""
    return _klein_folder(size, distilled, card)


@functools.cache  # knows arguments by their form too, so that it is only called with all of them, in order
def _klein_folder(size: str, distilled: bool, card: bool) -> Path:
    folder = _root() / f"klein-{size}-{distilled}{'-card' * card}"
    if card:
        write_klein_card(copied(klein_folder(size, distilled=distilled), folder))
    else:
        klein_pipeline(size, distilled=distilled).save_pretrained(folder)
    return folder


def write_klein_card(folder: Path, **changes: Any):
    """A views.json for a random folder, of klein unless changed; panel_size 64 and 64 tokens of text, so that tests
    are quick."""
    from triptych.flux.card import ViewsCard, write_card

    facts: dict[str, Any] = {
        "name": "random klein",
        "licence": "Apache-2.0",
        "architecture": "flux2-klein",
        "prompt_template": "{text}. given: {given}.",
        "panel_size": 64,
        "background": (1.0, 0.0, 1.0),
        "max_sequence_length": 64,
        "steps": 2,
        "guidance": 2.0,
        "vocabulary": tuple(word for word in WORDS.split() if word.isalpha()),
    }
    return write_card(folder, ViewsCard(**facts | changes))


def klein_pipeline(size: str = "mini", *, distilled: bool = False, seed: int = 0):
    """The pipeline itself, float32 on the CPU."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    facts = SIZES[size]
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=facts["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=32,
    )
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=_qwen(len(tokenizer), facts["hidden"], facts["head_dim"]),
        tokenizer=tokenizer,
        transformer=klein_transformer(size),
        is_distilled=distilled,
    )


def klein_transformer(size: str = "mini"):
    """Random, but not the nothing that zero-initialised output layers would make of it."""
    from diffusers import Flux2Transformer2DModel

    facts = SIZES[size]
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        out_channels=128,
        num_layers=facts["double"],
        num_single_layers=facts["single"],
        attention_head_dim=128,
        num_attention_heads=facts["heads"],
        joint_attention_dim=3 * facts["hidden"],
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds=False,
    ).eval()


def _qwen(vocabulary: int, hidden: int, head_dim: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=28,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=False,
        )
    ).eval()


def qwen_tokenizer():
    """Byte-level BPE: knows any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([WORDS] * 4, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Qwen2TokenizerFast(vocab=model["vocab"], merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def kontext_folder(*, text_only: bool = False, card: bool = False) -> Path:
    """A random FLUX.1 Kontext, or FLUX.1 dev when text_only; CLIP and T5 as text encoders, 16 latent channels."""
    architecture = "flux1-dev" if text_only else "flux1-kontext"
    if card:
        folder = copied(kontext_folder(text_only=text_only), _root() / f"{architecture}-card")
        write_klein_card(folder, architecture=architecture, guidance=2.5, vocabulary=None)
        return folder
    folder = _root() / architecture
    kontext_pipeline(text_only=text_only).save_pretrained(folder)
    return folder


def kontext_pipeline(*, text_only: bool = False, seed: int = 0):
    """The pipeline itself, float32 on the CPU."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )
    clip, clip_tokenizer = _clip()
    t5, t5_tokenizer = _t5()
    return (FluxPipeline if text_only else FluxKontextPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


def _clip():
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=32,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
        pad_token_id=len(names) - 1,
    )
    return CLIPTextModel(config).eval(), tokenizer


def _t5():
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,:-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=32, d_ff=64, num_layers=2, num_heads=1, is_encoder_decoder=False
    )
    return T5EncoderModel(config).eval(), tokenizer
