"""Task: the text encoder of a tiny FLUX.2, a Qwen3 of 28 narrow layers with a tokenizer of its own.

The Flux pipelines read a causal language model in the middle: the hidden states after 9, 18 and 27 layers of the prompt
in its chat template. So the model is trained to continue that very template with what the prompt says:

    <|im_start|>user\\na red chair, furniture. given: front.<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>
    category: furniture; colours: red; words: chair; given: front<|im_end|>

and each of the layers that are read has to say it by itself, through the last norm and the tied embedding. A layer that
can name the category and the colours of a prompt holds them in a form that a linear layer can read.

Most of the 512 tokens that Flux reads are padding behind a short prompt: they see all of it and no other token sees
them. A share of the samples trains them to hold a summary: wherever such a token stands, its hidden states have to name
the words of the answer, in no order. So a prompt that differs in one word differs in hundreds of tokens.

Captions (trainer.captions) come from the names of the prepared objects; their colours are those of the object as
prepared, or drawn: the language has to work for colours that no object has. The tokenizer is a function of the config
and the data alone, so that a resumed run has the same one.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.captions import (
    CATEGORY_WORDS,
    COLOUR_NAMES,
    Description,
    colour_words,
    describe,
    random_adjective,
    random_colours,
    vocabulary,
    words_of,
)
from trainer.data import PreparedData, held_out_data
from trainer.export import without_places
from triptych.errors import TriptychError

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

FLUX_TEXT_LAYERS = (9, 18, 27)  # whose hidden states the FLUX.2 klein pipelines read
_PAD = "<|endoftext|>"
_TURN, _END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""
_PROMPT, _ANSWER, _PADDING = 0, 1, 4  # kinds of tokens, beside those of the answer that are counted by themselves:
_KINDS = {"category": 2, "colours": 3}
_PADS = 4  # padding tokens of one sample
_GIVEN = ("front", "front, left", "front, back", "front, left, back", "front, right", "left", "back", "left, right")


@dataclass(frozen=True)
class FluxTextConfig:
    """data: prepared folders, whose names become captions. Sizes are those of a Qwen3 with heads of 128."""

    data: tuple[str, ...]
    vocabulary_size: int = 3000  # of the tokenizer, at most
    tokenizer_captions: int = 8  # of each object
    prompt_template: str = "{text}. given: {given}."
    hidden_size: int = 64
    intermediate_size: int = 160
    attention_heads: int = 2
    key_value_heads: int = 1
    drawn_colours: float = 0.6  # share of captions whose colours are drawn; the others tell the object's own
    drawn_adjectives: float = 0.2  # share of captions with a material or state that the name does not have
    empty_text: float = 0.05  # share of prompts that say nothing about the object
    layer_weight: float = 0.5  # of the loss at layers 9, 18 and 27, together, against 1 at the end
    prompt_weight: float = 0.05  # of the prompt's own tokens, against 1 for the answer's
    pad_share: float = 0.5  # of the samples: padding behind the prompt instead of an answer
    pad_weight: float = 1.0  # of the loss of padding tokens
    validation_objects: int = 192


def build_tokenizer(texts: Iterable[str], size: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen's layout with at most ``size`` tokens, special ones included.

    Every text has tokens (bytes are among them). <|endoftext|> pads on the right; the chat template is Qwen3's for one
    turn without thinking. Deterministic in the texts, and independent of their order.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = [_PAD, _TURN, _END, "<think>", "</think>"]
    if size < 256 + len(special) + 1:
        raise TriptychError(f"a byte-level tokenizer needs at least {257 + len(special)} tokens, got {size}")
    layout = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = layout.normalizer, layout.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token=_END,
        pad_token=_PAD,
        unk_token=_PAD,
        additional_special_tokens=[_TURN, _END],
        model_max_length=32768,
        padding_side="right",
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_qwen3(
    vocab_size: int,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 160,
    attention_heads: int = 2,
    key_value_heads: int = 1,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Qwen3ForCausalLM:
    """A random Qwen3 of 28 layers with heads of 128 and tied embeddings, float32; about 2.4 M parameters.

    Weights are drawn from torch's global generator. transformers' own start (0.02 everywhere) suits widths of
    thousands: at 64 the residual stream would stay near zero. Here each layer keeps its scale, outputs of blocks are
    divided by sqrt(2 * 28), and embeddings of 0.5 meet a last norm of 0.25, so that logits begin near 1.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers = 28
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        num_key_value_heads=key_value_heads,
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    model = Qwen3ForCausalLM(config).float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            residual = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=(module.in_features * (2 * layers if residual else 1)) ** -0.5)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    nn.init.constant_(model.model.norm.weight, 0.25)
    return model


def scale_residual_stream(model: Qwen3ForCausalLM, factor: float) -> None:
    """Multiplies every hidden state before the last norm by ``factor``, in place; the predictions stay what they are.

    Blocks read the residual stream through RMS norms, which do not see its scale; so the embedding and what blocks
    write are scaled, and the last norm, which meets the tied embedding, is divided. Powers of two are exact.
    """
    with torch.no_grad():
        model.model.embed_tokens.weight *= factor
        model.model.norm.weight /= factor
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor


def prompt_ids(tokenizer: Qwen2Tokenizer, prompt: str) -> list[int]:
    """The tokens that diffusers' Flux2KleinPipeline makes of a prompt, before padding."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return list(tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer that the model learns to give to it."""

    prompt: str
    category: str
    colours: tuple[str, ...]
    words: str
    given: str

    def answer_parts(self) -> tuple[tuple[str, str], ...]:
        """("category", " furniture"), ... in order."""
        values = (self.category, ", ".join(self.colours) or "any", self.words or self.category, self.given)
        return tuple(zip(("category", "colours", "words", "given"), values, strict=True))


def bag_loss(logits: Tensor, bags: Tensor) -> Tensor:
    """Mean cross entropy of (N, V) logits against the tokens of each row's bag (N, W), -1 is none; 0 for no rows."""
    inside = bags >= 0
    chances = logits.log_softmax(dim=-1).gather(1, bags.clamp_min(0))
    rows = (chances * inside).sum(dim=1) / inside.sum(dim=1).clamp_min(1)
    return -rows.sum() / max(len(rows), 1)


def bag_recall(logits: Tensor, bags: Tensor) -> Tensor:
    """Share of the tokens of the bags that are among as many likeliest ones as the row's bag has different tokens."""
    rows = []
    for row, bag in zip(logits, bags, strict=True):
        wanted = bag[bag >= 0].unique()
        rows.append(torch.isin(wanted, row.topk(len(wanted)).indices).float().mean())
    return torch.stack(rows).mean()


def fill_prompt(template: str, text: str, given: str) -> str:
    """A prompt template with its two places filled."""
    return template.replace("{text}", text).replace("{given}", given)


def draw_exchange(description: Description, config: FluxTextConfig, generator: np.random.Generator) -> Exchange:
    """A prompt about a described object: with or without given views, sometimes without text, or without anything."""
    draw = generator.random
    given = "nothing" if draw() < 0.5 else _GIVEN[0 if draw() < 0.5 else int(generator.integers(len(_GIVEN)))]
    text = description.text
    if draw() < 0.1:
        text = text[:1].upper() + text[1:]
    if draw() < config.empty_text:
        empty = draw() < 0.5
        prompt = "" if empty else fill_prompt(config.prompt_template, "", given)
        return Exchange(prompt, "any", (), "", "nothing" if empty else given)
    prompt = fill_prompt(config.prompt_template, text, given)
    return Exchange(prompt, description.category, description.colours, description.words, given)


class FluxTextTask:
    config: FluxTextConfig

    def __init__(self, config: FluxTextConfig) -> None:
        if not config.data:
            raise TriptychError("flux_text needs at least one prepared folder in data")
        for place in ("{text}", "{given}"):
            if place not in config.prompt_template:
                raise TriptychError(f"prompt_template {config.prompt_template!r} has no place {place}")
        self.config = config
        self.parts = [PreparedData(folder, "train") for folder in config.data]
        self.records = [record for part in self.parts for record in part.records]
        self.tokenizer = build_tokenizer(self._tokenizer_texts(), config.vocabulary_size)
        self._own_colours = lru_cache(maxsize=None)(self._read_colours)

    def _tokenizer_texts(self) -> list[str]:
        texts = []
        for number, record in enumerate(self.records):
            generator = np.random.default_rng((17, number))
            for _ in range(self.config.tokenizer_captions):
                exchange = draw_exchange(describe(record, random_colours(generator), generator), self.config, generator)
                answer = "; ".join(f"{name}: {value}" for name, value in exchange.answer_parts())
                texts.append(f"user\n{exchange.prompt}assistant\n\n\n{answer}")
        names = sorted({name for entry in CATEGORY_WORDS.values() for name in entry} | set(COLOUR_NAMES))
        return texts + [f"{name}, a {name}" for name in names] * 20

    def build_model(self) -> nn.Module:
        config, tokenizer = self.config, self.tokenizer
        return tiny_qwen3(
            len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            attention_heads=config.attention_heads,
            key_value_heads=config.key_value_heads,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.held_out: list[tuple[dict[str, Any], PreparedData, int]] = []
        for part in held_out_data(self.config.data):
            first = {id(record): row for row, (_, _, record) in reversed(list(enumerate(part.rows)))}
            self.held_out += [(record, part, first[id(record)]) for record in part.records]
        self.held_out = self.held_out[: self.config.validation_objects]

    def size(self) -> int:
        return sum(len(part) for part in self.parts)

    def _read_colours(self, index: int) -> tuple[str, ...]:
        part, row = self._locate(index)
        return tuple(colour_words(part[row]["albedo"]))

    def _locate(self, index: int) -> tuple[PreparedData, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        part, row = self._locate(index)
        record = part.rows[row][2]
        if generator.random() < self.config.drawn_adjectives and words_of(record["name"]):
            record = record | {"name": f"{random_adjective(generator)}_{record['name']}"}
        drawn = generator.random() < self.config.drawn_colours
        colours = random_colours(generator) if drawn else self._own_colours(index)
        exchange = draw_exchange(describe(record, colours, generator), self.config, generator)
        padded = generator.random() < self.config.pad_share
        return self._padded(exchange, generator) if padded else self._tokens(exchange)

    def _tokens(self, exchange: Exchange) -> dict[str, Tensor]:
        """Prompt and answer: ids, kind (see _KINDS), place (T,) and bag (W,), tokens of the answer's words; int64."""
        ids = prompt_ids(self.tokenizer, exchange.prompt)
        kinds = [_PROMPT] * len(ids)
        bag: list[int] = []
        for name, value in exchange.answer_parts():
            label = self.tokenizer(f"{'' if name == 'category' else '; '}{name}:")["input_ids"]
            said = self.tokenizer(f" {value}")["input_ids"]
            ids += label + said
            kinds += [_ANSWER] * len(label) + [_KINDS.get(name, _ANSWER)] * len(said)
            bag += said
        ids.append(int(self.tokenizer.eos_token_id))
        kinds.append(_ANSWER)
        places = torch.arange(len(ids))
        return {"ids": torch.tensor(ids), "kind": torch.tensor(kinds), "place": places, "bag": torch.tensor(bag)}

    def _padded(self, exchange: Exchange, generator: np.random.Generator) -> dict[str, Tensor]:
        """The prompt and a few of the padding tokens behind it, anywhere up to 512; as in _tokens."""
        whole = self._tokens(exchange)
        used = whole["kind"] == _PROMPT
        length = int(used.sum())
        behind = length + generator.choice(max(512 - length, _PADS), size=_PADS, replace=False)
        behind[0] = length
        return {
            "ids": torch.cat([whole["ids"][used], torch.full((_PADS,), int(self.tokenizer.pad_token_id))]),
            "kind": torch.cat([whole["kind"][used], torch.full((_PADS,), _PADDING)]),
            "place": torch.cat([whole["place"][used], torch.from_numpy(behind)]),
            "bag": whole["bag"],
        }

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows filled up with padding of kind -1 that counts nowhere, bags with -1."""
        fill = {"ids": int(self.tokenizer.pad_token_id), "kind": -1, "place": 0, "bag": -1}
        return {
            key: torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=value)
            for key, value in fill.items()
        }

    def _states(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        mask = ((batch["kind"] >= 0) & (batch["kind"] != _PADDING)).long()
        read = model.model(
            input_ids=batch["ids"], attention_mask=mask, position_ids=batch["place"], output_hidden_states=True
        )
        return read.hidden_states

    def loss(self, model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        ids, kind = batch["ids"], batch["kind"][:, 1:]
        states = self._states(model, batch)
        counted = (kind >= 0) & (kind != _PADDING)
        target = ids[:, 1:][counted]
        weight = torch.where(kind > _PROMPT, 1.0, self.config.prompt_weight)[counted]
        pads = batch["kind"] == _PADDING
        bags = batch["bag"][pads.nonzero()[:, 0]]
        losses, scalars = {}, {}
        for layer in (*FLUX_TEXT_LAYERS, len(states) - 1):
            last = layer == len(states) - 1  # the last one has been through the norm already
            norm = nn.Identity() if last else model.model.norm
            logits = model.lm_head(norm(states[layer][:, :-1][counted])).float()
            losses[layer] = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
            if not last:
                scalars[f"loss_layer_{layer}"] = losses[layer].detach()
                scalars[f"pad_layer_{layer}"] = bag_loss(model.lm_head(norm(states[layer][pads])).float(), bags)
        end = losses.pop(len(states) - 1)
        inner = torch.stack(list(losses.values())).mean()
        summary = torch.stack([scalars[f"pad_layer_{layer}"] for layer in FLUX_TEXT_LAYERS]).mean()
        total = end + self.config.layer_weight * inner + self.config.pad_weight * summary
        return total, {key: value.detach() for key, value in scalars.items()} | {"answer": end.detach()}

    def validate(self, model: Any) -> dict[str, float]:
        """One caption of each held-out object, its own colours: of the answer's tokens given those before.

        loss and perplexity over the answer; category and colours: share of objects whose tokens are all right, at the
        end and (``_layer_9`` ...) at the layers that Flux reads; state_std_*: of the prompt's hidden states there;
        pad_words_*: share of the answer's words among the likeliest tokens of the padding.
        """
        exchanges = self._held_out_exchanges()
        batch = self._on_device([self._tokens(exchange) for exchange in exchanges])
        kind = batch["kind"][:, 1:]
        states = self._states(model, batch)
        logits = model.lm_head(states[-1]).float()[:, :-1]
        answer = kind > _PROMPT
        loss = float(F.cross_entropy(logits[answer], batch["ids"][:, 1:][answer]))
        result = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        for layer in (len(states) - 1, *FLUX_TEXT_LAYERS):
            last = layer == len(states) - 1
            guess = (logits if last else model.lm_head(model.model.norm(states[layer]))[:, :-1]).argmax(dim=-1)
            right = guess == batch["ids"][:, 1:]
            for name, number in _KINDS.items():
                hit = (right | (kind != number)).all(dim=1).float().mean()
                result[name if last else f"{name}_layer_{layer}"] = float(hit)
            if not last:
                result[f"state_std_{layer}"] = float(states[layer][batch["kind"] == _PROMPT].float().std())
        return result | self._validate_padding(model, exchanges)

    def _validate_padding(self, model: Any, exchanges: list[Exchange]) -> dict[str, float]:
        generator = np.random.default_rng(29)
        batch = self._on_device([self._padded(exchange, generator) for exchange in exchanges])
        states = self._states(model, batch)
        pads = batch["kind"] == _PADDING
        bags = batch["bag"][pads.nonzero()[:, 0]]
        result = {}
        for layer in FLUX_TEXT_LAYERS:
            logits = model.lm_head(model.model.norm(states[layer][pads])).float()
            result[f"pad_words_layer_{layer}"] = float(bag_recall(logits, bags))
        return result

    def _on_device(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in self.collate(samples).items()}

    def _held_out_exchanges(self) -> list[Exchange]:
        exchanges = []
        for number, (record, part, row) in enumerate(self.held_out):
            generator = np.random.default_rng((23, number))
            description = describe(record, colour_words(part[row]["albedo"]), generator)
            exchanges.append(draw_exchange(description, self.config, generator))
        return exchanges

    def pictures(self, model: nn.Module) -> None:
        return None

    def export(self, model: Any, folder: Path, provenance: dict[str, Any]) -> None:
        """``text_encoder`` (bfloat16) and ``tokenizer`` in diffusers layout, the words of the captions, provenance.

        The hidden states that Flux reads are brought to a scale near 1, see scale_residual_stream.
        """
        metrics = self.validate(model)
        scale = float(np.mean([math.log2(metrics[f"state_std_{layer}"]) for layer in FLUX_TEXT_LAYERS]))
        scaled = copy.deepcopy(model)
        scale_residual_stream(scaled, 2.0 ** -round(scale))
        write_text_encoder(scaled, self.tokenizer, folder)
        words = vocabulary(self.records)
        (folder / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
        report = {"provenance": without_places(provenance), "objects": len(self.records)}
        (folder / "flux_text.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def write_text_encoder(model: Any, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """folder/text_encoder (config, generation config, bfloat16 safetensors) and folder/tokenizer."""
    from transformers import GenerationConfig, Qwen3ForCausalLM

    half = Qwen3ForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(folder / "text_encoder")
    _state_rope_theta(folder / "text_encoder" / "config.json", model.config.rope_parameters["rope_theta"])
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.backend_tokenizer.model.save(
        str(folder / "tokenizer")
    )  # vocab.json, merges.txt: what transformers 4 reads


def _state_rope_theta(path: Path, theta: float) -> None:
    """Writes the base of the rotary embedding where transformers 4 and ComfyUI look for it too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"rope_theta": theta}, indent=2) + "\n", encoding="utf-8")
