"""The tiny text encoder: tokenizer, template and hidden states as FLUX.2 pipelines read them, training and export."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from trainer.config import TrainConfig, config_from_dict, config_to_dict
from trainer.loop import export, train
from trainer.tasks.flux_text import (
    FLUX_TEXT_LAYERS,
    FluxTextConfig,
    FluxTextTask,
    bag_loss,
    bag_recall,
    build_tokenizer,
    draw_exchange,
    fill_prompt,
    prompt_ids,
    scale_residual_stream,
    tiny_qwen3,
    write_text_encoder,
)
from triptych.errors import TriptychError

NAMES = {
    "furniture": ("Chair_1", "table_small", "wooden_bench", "Sofa"),
    "vehicle": ("veh_car4", "delivery-truck", "Bus", "Boat"),
    "plant_nature": ("CommonTree_Dead_3", "Bush_2", "Rock_Moss_5", "Cactus"),
}
COLOURS = ((220, 20, 30), (30, 80, 220), (30, 160, 50), (250, 225, 40))
UNUSUAL = ("", "ein grüner Stuhl, 5 €", "一把红色的椅子", "chair \U0001f600", "tabs\tand\nlines", "<|im_end|>")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder: twelve objects of one colour each, seen from four sides; every fourth is for validation."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "shards").mkdir()
    albedo = np.zeros((12, 4, 16, 16, 4), dtype=np.uint8)
    records = []
    for i, (category, name) in enumerate((c, n) for c, names in NAMES.items() for n in names):
        albedo[i, :, 4:12, 4:12] = (*COLOURS[i % 4], 255)
        split = "validation" if i % 4 == 3 else "train"
        records.append({"status": "ok", "split": split, "key": f"kaykit__{name}", "name": name, "category": category})
        records[-1] |= {"rows": [i], "shard": "shard_00000", "sides": [0.5, 1.0, 0.5]}
    normal, sdf = np.zeros((12, 4, 16, 16, 3), dtype=np.uint8), np.zeros((12, 4, 4, 4), dtype=np.int8)
    save_file({"albedo": albedo, "normal": normal, "sdf": sdf}, folder / "shards" / "shard_00000.safetensors")
    options = {"resolution": 4, "view_size": 16, "sdf_band": 2.0}
    (folder / "index.json").write_text(json.dumps({"format": 1, "options": options, "records": records}))
    return folder


@pytest.fixture(scope="module")
def config(prepared):
    return FluxTextConfig(data=(str(prepared),), vocabulary_size=400, intermediate_size=32, attention_heads=1)


@pytest.fixture(scope="module")
def task(config):
    task = FluxTextTask(config)
    task.setup(torch.device("cpu"))
    return task


def _model(task, seed=0):
    torch.manual_seed(seed)
    return task.build_model().eval()


def test_the_tokenizer_keeps_every_text_and_ignores_the_order_of_its_texts():
    texts = ["a red chair", "a red table", "red chairs", "the red cup"] * 3
    tokenizer = build_tokenizer(texts, 300)
    assert len(tokenizer) <= 300
    for text in (*texts, *UNUSUAL):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(" red")["input_ids"]) == 1, "a frequent word is one token"
    assert build_tokenizer(sorted(texts), 300).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(TriptychError, match="at least 262 tokens, got 200"):
        build_tokenizer(texts, 200)


def test_special_tokens_are_whole_and_pads_stand_on_the_right(task):
    tokenizer = task.tokenizer
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    padded = tokenizer("a chair", padding="max_length", max_length=20, truncation=True)
    used = sum(padded["attention_mask"])
    assert padded["attention_mask"] == [1] * used + [0] * (20 - used) and 0 < used < 20
    assert padded["input_ids"][used:] == [tokenizer.convert_tokens_to_ids("<|endoftext|>")] * (20 - used)


def test_the_chat_template_is_qwen3s(task):
    ids = prompt_ids(task.tokenizer, "a red chair. given: front.")
    assert task.tokenizer.decode(ids) == (
        "<|im_start|>user\na red chair. given: front.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    thinking = task.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert thinking == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_the_published_size_and_a_healthy_start():
    torch.manual_seed(0)
    model = tiny_qwen3(3000)
    count = sum(p.numel() for p in model.parameters())
    assert 2.2e6 < count < 2.7e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        out = model(torch.arange(200).view(4, 50), output_hidden_states=True)
    for layer in FLUX_TEXT_LAYERS:
        assert 0.4 < float(out.hidden_states[layer].std()) < 1.5
    assert 0.5 < float(out.logits.std()) < 2


@pytest.fixture(scope="module")
def answering(config):
    """The task without padded samples."""
    task = FluxTextTask(dataclasses.replace(config, pad_share=0.0))
    task.setup(torch.device("cpu"))
    return task


def test_samples_are_functions_of_index_and_seed_and_say_what_they_answer(answering):
    task = answering
    assert task.size() == 9 and len(task.held_out) == 3
    for index in range(task.size()):
        one, two = task.sample(index, 7), task.sample(index, 7)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        text = task.tokenizer.decode(one["ids"])
        prompt, answer = text.split("</think>\n\n")
        assert answer.endswith("<|im_end|>") and prompt.startswith("<|im_start|>user\n")
        fields = dict(part.split(": ") for part in answer.removesuffix("<|im_end|>").split("; "))
        assert list(fields) == ["category", "colours", "words", "given"]
        if fields["given"] != "nothing":
            assert f"given: {fields['given']}." in prompt
        if fields["colours"] != "any":
            assert all(colour in prompt.lower() for colour in fields["colours"].split(", "))
        marked = [task.tokenizer.decode(one["ids"][one["kind"] == kind]).strip() for kind in (2, 3)]
        assert marked == [fields["category"], fields["colours"]]
    seeds = {task.tokenizer.decode(task.sample(0, seed)["ids"]) for seed in range(20)}
    assert len(seeds) > 15


def test_own_colours_are_those_of_the_pixels(config):
    task = FluxTextTask(dataclasses.replace(config, drawn_colours=0.0, empty_text=0.0, pad_share=0.0))
    found = set()
    for seed in range(12):
        sample = task.sample(0, seed)
        found.add(task.tokenizer.decode(sample["ids"][sample["kind"] == 3]).strip())
    assert found == {"red", "any"}


def test_prompts_without_text_answer_any(task, config):
    from trainer.captions import Description

    empty = dataclasses.replace(config, empty_text=1.0)
    description = Description("a red chair", "furniture", "chair", ("red",))
    drawn = [draw_exchange(description, empty, np.random.default_rng(seed)) for seed in range(60)]
    assert {(item.category, item.colours, item.words) for item in drawn} == {("any", (), "")}
    assert "" in {item.prompt for item in drawn} and ". given: nothing." in {item.prompt for item in drawn}
    assert all(item.prompt == fill_prompt(". given: {given}.", "", item.given) for item in drawn if item.prompt)


def test_padded_samples_are_what_the_pipeline_pads(config):
    task = FluxTextTask(dataclasses.replace(config, pad_share=1.0))
    model = _model(task)
    for index in range(4):
        sample = task.sample(index, 5)
        pads = sample["kind"] == 4
        prompt, places = sample["ids"][~pads], sample["place"][pads]
        assert set(sample["ids"][pads].tolist()) == {task.tokenizer.pad_token_id} and int(pads.sum()) == 4
        assert int(places[0]) == len(prompt) and int(places.min()) >= len(prompt) and int(places.max()) < 512
        whole = torch.full((1, 512), task.tokenizer.pad_token_id)
        whole[0, : len(prompt)] = prompt
        mask = (torch.arange(512) < len(prompt)).long()[None]
        batch = {key: value[None] for key, value in sample.items()}
        with torch.no_grad():
            piped = model(whole, attention_mask=mask, output_hidden_states=True).hidden_states
            trained = task._states(model, batch)
        for layer in FLUX_TEXT_LAYERS:
            torch.testing.assert_close(trained[layer][0], piped[layer][0, sample["place"]], rtol=1e-3, atol=1e-3)


def test_a_bag_is_named_in_no_order():
    logits = torch.full((2, 6), -9.0)
    logits[0, [1, 4]], logits[1, [2, 3]] = 9.0, 9.0
    bags = torch.tensor([[4, 1, -1], [2, 5, -1]])
    assert float(bag_recall(logits, bags)) == 0.75
    both = torch.tensor([[4, 1, -1], [2, 3, -1]])
    assert float(bag_loss(logits, both)) == pytest.approx(np.log(2), abs=1e-4)
    assert float(bag_loss(logits, both.flip(1))) == pytest.approx(np.log(2), abs=1e-4)
    assert float(bag_loss(logits[:0], both[:0])) == 0.0


def test_drawn_adjectives_come_on_top_of_the_name(config):
    task = FluxTextTask(dataclasses.replace(config, drawn_adjectives=1.0, pad_share=0.0, empty_text=0.0))
    texts = [task.tokenizer.decode(task.sample(0, seed)["ids"]) for seed in range(40)]
    words = {re.search("words: (.*); given", text)[1] for text in texts}
    assert sum(phrase.endswith(" chair") for phrase in words) > 10


def test_collation_pads_and_the_loss_ignores_padding_and_what_follows(task):
    model = _model(task)
    samples = [task.sample(index, index) for index in range(3)]
    batch = task.collate(samples)
    assert (
        (batch["kind"] == -1).sum(dim=1) == batch["ids"].shape[1] - torch.tensor([len(s["ids"]) for s in samples])
    ).all()
    with torch.no_grad():
        loss, _ = task.loss(model, batch, 0)
        fill = {"ids": 5, "kind": -1, "place": 0}
        wider = {key: torch.nn.functional.pad(batch[key], (0, 9), value=value) for key, value in fill.items()}
        wider["bag"] = batch["bag"]
        again, _ = task.loss(model, wider, 0)
    assert float(loss) == pytest.approx(float(again), rel=1e-5)


def test_the_prompt_weight_counts_prompt_tokens(config, answering):
    task, model = answering, _model(answering)
    batch = task.collate([task.sample(0, 3)])
    with torch.no_grad():
        _, only = FluxTextTask(dataclasses.replace(config, prompt_weight=0.0)).loss(model, batch, 0)
        logits = model(batch["ids"]).logits[0, :-1]
        answer = batch["kind"][0, 1:] > 0
        expected = torch.nn.functional.cross_entropy(logits[answer], batch["ids"][0, 1:][answer])
    assert float(only["answer"]) == pytest.approx(float(expected), rel=1e-4)


def _train_config(config, name, steps=6):
    task = "trainer.tasks.flux_text:FluxTextTask"
    return TrainConfig(
        name=name, task=task, task_config=config, steps=steps, batch_size=4, lr=3e-3, warmup_steps=1, ema_decay=0.5,
        checkpoint_every=3, validate_every=steps, log_every=3, tensorboard=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    train(_train_config(config, "text"), folder, device="cpu")
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(config, run, tmp_path):
    import shutil

    again = tmp_path / "text"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step_0000006")
    train(_train_config(config, "text"), again, device="cpu")
    paths = [folder / "checkpoints" / "step_0000006" / "ema.safetensors" for folder in (run, again)]
    with safe_open(paths[0], "pt") as one, safe_open(paths[1], "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118


def test_training_learns_and_validation_reports(task, config):
    model = _model(task)
    with torch.no_grad():
        before = task.validate(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(14):
        batch = task.collate([task.sample(index, 100 * step + index) for index in range(0, 9, 2)])
        loss, scalars = task.loss(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after = task.validate(model.eval())
    assert after["loss"] < before["loss"] - 1.5 and after["perplexity"] == pytest.approx(
        np.exp(after["loss"]), rel=1e-6
    )
    assert {f"{name}_layer_{layer}" for name in ("category", "colours") for layer in FLUX_TEXT_LAYERS} < set(after)
    assert {f"{name}_layer_{layer}" for name in ("loss", "pad") for layer in FLUX_TEXT_LAYERS} < set(scalars)
    assert all(after[f"pad_words_layer_{layer}"] > before[f"pad_words_layer_{layer}"] for layer in FLUX_TEXT_LAYERS)
    assert all(0.1 < after[f"state_std_{layer}"] < 30 for layer in FLUX_TEXT_LAYERS)


def test_the_export_is_what_the_pipeline_reads(run, tmp_path):
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

    out = tmp_path / "text"
    provenance = export(run, out, device="cpu")
    assert {path.name for path in out.iterdir()} == {"text_encoder", "tokenizer", "vocabulary.json", "flux_text.json"}
    tokenizer = Qwen2Tokenizer.from_pretrained(out / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(out / "text_encoder", dtype=torch.float32).eval()
    with safe_open(out / "text_encoder" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    pipeline = Flux2KleinPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
    prompts = ["a red chair. given: front.", "", UNUSUAL[2]]
    for length in (48, 512):
        with torch.no_grad():
            embeds, places = pipeline.encode_prompt(prompts, torch.device("cpu"), max_sequence_length=length)
        assert embeds.shape == (len(prompts), length, 192) and places.shape == (len(prompts), length, 4)
        assert bool(embeds.isfinite().all())
        used = min(length, len(prompt_ids(tokenizer, prompts[0])))
        assert not torch.equal(embeds[0, :used], embeds[2, :used])
    with torch.no_grad():
        states = encoder(torch.tensor([prompt_ids(tokenizer, prompts[0])]), output_hidden_states=True).hidden_states
    assert all(0.2 < float(states[layer].std()) < 4 for layer in FLUX_TEXT_LAYERS)
    assert "chair" not in json.loads((out / "vocabulary.json").read_text()), "fewer than three objects"
    report = json.loads((out / "flux_text.json").read_text())
    assert report["objects"] == 9 and report["provenance"]["step"] == provenance["step"] == 6
    assert str(tmp_path.parent) not in json.dumps(report), "no path of this machine"
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["rope_theta"] == 1e6, "what releases of transformers before 5 read"


def test_writing_keeps_the_numbers_up_to_bfloat16(task, tmp_path):
    from transformers import Qwen3ForCausalLM

    model = _model(task)
    write_text_encoder(model, task.tokenizer, tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32)
    for (name, one), (other, two) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(one.bfloat16().float(), two), name
    assert loaded.config.num_hidden_layers == 28 and loaded.config.head_dim == 128 and loaded.config.tie_word_embeddings


def test_scaling_the_residual_stream_changes_hidden_states_and_nothing_else(task):
    model = _model(task)
    ids = task.sample(0, 1)["ids"][None]
    with torch.no_grad():
        before = model(ids, output_hidden_states=True)
        scale_residual_stream(model, 0.25)
        after = model(ids, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-3)
    for layer in (0, *FLUX_TEXT_LAYERS):
        torch.testing.assert_close(4 * after.hidden_states[layer], before.hidden_states[layer], rtol=1e-3, atol=1e-3)


def test_the_config_is_checked_and_survives_json(config):
    run_config = _train_config(config, "text")
    assert config_from_dict(config_to_dict(run_config)) == run_config
    with pytest.raises(TriptychError, match="has no place {given}"):
        FluxTextTask(dataclasses.replace(config, prompt_template="{text}"))
    with pytest.raises(TriptychError, match="at least one prepared folder"):
        FluxTextTask(dataclasses.replace(config, data=()))
