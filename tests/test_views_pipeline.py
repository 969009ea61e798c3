"""views_from_prompt: a sentence or some pictures in, a whole view set out."""

import re

import numpy as np
import pytest
import torch
from fake_views import MAGENTA, WHITE, FakeViews, blank, card, shifted, truth
from PIL import Image, ImageDraw

from triptych.errors import TriptychError
from triptych.flux.card import read_card
from triptych.geometry.cameras import VIEW_NAMES
from triptych.images.foreground import alpha_box
from triptych.images.sheets import split_sheet
from triptych.images.views import prepare_views
from triptych.pipelines.drawn_views import (
    contradicts,
    in_known_colours,
    in_mirrored_outline,
    put_together,
    sheet_frame,
)
from triptych.pipelines.views import ViewSettings, views_from_prompt
from triptych.sampling.flow_euler import Cancelled


def low(view):
    return shifted(view, 30)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def photo(name, size=300, background="white"):
    """The sample object's view off the middle of a picture."""
    picture = Image.new("RGB", (size, size + 40), background)
    view = Image.fromarray((truth(256)[name] * 255).round().astype(np.uint8), "RGBA")
    picture.paste(view, (5, 30), view)
    return picture


def test_a_sentence_gives_all_four_views_at_the_wanted_size():
    model = FakeViews()
    made = views_from_prompt("a Red robot", model=model, settings=ViewSettings(seed=5, size=192))
    assert made.generated == VIEW_NAMES and tuple(made.views) == VIEW_NAMES
    assert (made.seed, made.rerolls, made.warnings) == (5, 0, ())
    assert made.prompt == "a red robot. given: nothing."
    (call,) = model.calls
    assert call == {"prompt": made.prompt, "references": [], "seed": 5, "steps": 3, "guidance": 2.0}
    assert model.unloaded == 0
    assert made.view_set.images.shape == (4, 4, 192, 192) and made.view_set.azimuths_deg == (0, 90, 180, 270)
    expected = prepare_views(dict(truth().items()), size=192)
    for name, image, other in zip(VIEW_NAMES, made.view_set.images.numpy(), expected.images.numpy(), strict=True):
        assert np.array_equal(made.views[name], image.transpose(1, 2, 0))
        assert iou(image[3] > 0.5, other[3] > 0.5) > 0.97
        solid = other[3] > 0.99
        assert np.abs(image[:3] - other[:3])[:, solid].mean() < 0.02
    assert made.drawn.shape == (256, 256, 3) and np.allclose(made.drawn[0, 0], MAGENTA)
    cells = split_sheet(made.sheet)
    assert all(np.array_equal(cells[name], made.views[name]) for name in VIEW_NAMES)
    assert set(made.timings_s) == {"prepare", "load", "generate", "fit"}
    again = views_from_prompt("a Red robot", model=model, settings=ViewSettings(seed=5, size=192))
    assert torch.equal(again.view_set.images, made.view_set.images)


@pytest.mark.parametrize("given", [("front",), ("left",), ("back", "front"), ("right", "left", "front")])
def test_given_views_stay_what_they_are_and_the_others_are_added_at_their_scale(given):
    model = FakeViews()
    made = views_from_prompt(images={name: photo(name) for name in given}, model=model)
    names = tuple(name for name in VIEW_NAMES if name in given)
    assert made.generated == tuple(name for name in VIEW_NAMES if name not in given)
    assert set(made.view_set.seen.names) == set(given) and len(made.view_set.generated) == 4 - len(given)
    (call,) = model.calls
    assert call["prompt"] == f". given: {', '.join(names)}."
    assert len(call["references"]) == len(given)
    for name, reference in zip(names, call["references"], strict=True):
        assert reference.shape == (3, 128, 128) and reference.dtype == torch.float32
        assert reference[:, 0, 0].tolist() == list(MAGENTA)
        object_there = (reference - torch.tensor(MAGENTA)[:, None, None]).abs().amax(0) > 0.3
        own = prepare_views({name: photo(name)}, size=128).images[0, 3] > 0.5
        assert iou(object_there.numpy(), own.numpy()) > 0.9
    everything = prepare_views({name: photo(name) for name in VIEW_NAMES}, size=256)
    for name, image in zip(VIEW_NAMES, everything.images.numpy(), strict=True):
        mine = made.views[name].transpose(2, 0, 1)
        assert iou(mine[3] > 0.5, image[3] > 0.5) > (0.985 if name in given else 0.96)
        if name in given:
            assert np.abs(mine[:3] - image[:3])[:, image[3] > 0.99].mean() < 0.004


def test_all_four_given_need_no_model():
    pictures = {name: photo(name) for name in VIEW_NAMES}
    made = views_from_prompt("a robot", images=pictures, model="/no/such/model")
    assert made.generated == () and made.drawn is None and made.rerolls == 0
    assert torch.equal(made.view_set.images, prepare_views(pictures, size=256).images)
    assert made.warnings == ("all four views are given, so nothing was generated and the prompt is not used",)
    assert views_from_prompt(images=pictures, model="/no/such/model").warnings == ()


def test_a_drawn_view_takes_the_mirrored_outline_of_the_given_opposite_one():
    back = truth(128)["back"]
    worn = back.copy()
    worn[60:] = 0  # the model forgot the lower half
    filled = in_mirrored_outline(worn, truth(128)["front"])
    assert np.array_equal(filled[..., 3], truth(128)["front"][:, ::-1, 3])
    solid = worn[..., 3] > 0.5
    assert np.array_equal(filled[solid, :3], worn[solid, :3]) and filled[70:90][back[70:90, :, 3] > 0.5, :3].max() > 0.1
    nothing = np.zeros_like(back)
    assert in_mirrored_outline(nothing, truth(128)["front"]) is nothing
    made = views_from_prompt(images={"front": photo("front"), "left": photo("left")}, model=FakeViews())
    assert np.array_equal(made.views["back"][..., 3], made.views["front"][:, ::-1, 3])
    assert np.array_equal(made.views["right"][..., 3], made.views["left"][:, ::-1, 3])
    lone = views_from_prompt(images={"front": photo("front")}, model=FakeViews())
    assert not np.array_equal(lone.views["right"][..., 3], lone.views["left"][:, ::-1, 3])


def slab(width, height, middle=64):
    """A grey rectangle in a panel of 128, its middle in that row."""
    view = np.zeros((128, 128, 4), dtype=np.float32)
    view[middle - height // 2 : middle + height // 2, 64 - width // 2 : 64 + width // 2] = (0.5, 0.5, 0.5, 1.0)
    return view


def boxes_of(views):
    return [alpha_box(image[3].numpy()) for image in views.images]


def test_drawn_views_keep_the_scale_that_the_given_ones_panel_shows():
    """A flat object whose side is drawn a third too high: by its height the side would shrink by a quarter."""
    known = {"front": slab(108, 12)}
    panels = {"front": slab(54, 6), "left": slab(30, 8), "back": slab(54, 6), "right": slab(30, 8)}
    assert sheet_frame(panels, known) == pytest.approx((2.0, 64.0))
    assert sheet_frame(panels | {"front": blank(known["front"])}, known) is None and sheet_frame(panels, {}) is None
    cut = np.roll(known["front"], 20, axis=1)
    assert sheet_frame(panels | {"front": cut}, known) is None, "cut off at the border"
    made, notes = put_together(prepare_views(known, size=128), panels, ("left", "back", "right"), 128)
    widths = [box[2] - box[0] for box in boxes_of(made)]
    assert widths == pytest.approx([108.8, 60.4, 108.8, 60.4], abs=1.5) and notes == []


def test_a_drawn_view_lies_where_it_lies_in_its_sheet_and_given_ones_make_room():
    """A side whose lowest tenth was lost stays where it is; one that is deeper than the front sets the scale."""
    known = {"front": slab(40, 108)}
    panels = {name: slab(20, 54, 60) for name in VIEW_NAMES} | {"left": slab(24, 48, 57)}
    given = prepare_views(known, size=128)
    made, notes = put_together(given, panels, ("left", "back", "right"), 128)
    front, left, _, right = boxes_of(made)
    assert front[3] - front[1] == pytest.approx(108.8, abs=0.5) and right == pytest.approx(front, abs=1)
    assert left[1] == pytest.approx(front[1], abs=1) and left[3] == pytest.approx(front[3] - 12, abs=1.2)
    assert torch.equal(made.images[0], given.images[0]) and notes == []
    deep = panels | {"left": slab(108, 54, 60), "right": slab(108, 54, 60)}
    made, _ = put_together(given, deep, ("left", "back", "right"), 128)
    front, left, *_ = boxes_of(made)
    assert left[2] - left[0] == pytest.approx(108.8, abs=1) and front[3] - front[1] == pytest.approx(54.4, abs=1)


def test_a_drawn_view_that_lacks_what_the_given_ones_show_is_left_out():
    """Legs that were too thin to be drawn: a reconstruction would carve them away."""
    known = {"front": slab(40, 108)}
    panels = {name: slab(20, 54, 60) for name in VIEW_NAMES} | {"left": slab(24, 20, 43), "right": slab(24, 90, 62)}
    assert contradicts("left", panels, known) and contradicts("right", panels, known)
    assert not contradicts("back", panels, known)
    made, notes = put_together(prepare_views(known, size=128), panels, ("left", "back", "right"), 128)
    assert made.names == ("front", "back") and made.generated == (180.0,)
    assert notes == ["the left and right panel lay at other heights than the given views: the set goes on without it"]


def test_drawn_colours_are_moved_as_the_given_view_shows():
    """A model that mixes a fifth of magenta into everything it draws."""
    views = {name: truth(96)[name].copy() for name in VIEW_NAMES}
    tinted = {name: view.copy() for name, view in views.items()}
    for view in tinted.values():
        view[..., :3] = 0.8 * view[..., :3] + 0.2 * np.array([1.0, 0.0, 1.0])
    mended = in_known_colours(tinted, {"front": views["front"]})
    for name in ("left", "back", "right"):
        solid = views[name][..., 3] > 0.9
        before, after = (np.abs(x[name] - views[name])[solid].mean() for x in (tinted, mended))
        assert after < 0.1 * before
        assert np.array_equal(mended[name][..., 3], tinted[name][..., 3])
    assert in_known_colours(tinted, {}) is tinted
    assert in_known_colours({"left": tinted["left"]}, {"front": views["front"]})["left"] is tinted["left"]


def test_azimuths_name_views_too_and_others_are_refused():
    made = views_from_prompt(images={90: photo("left")}, model=FakeViews())
    assert made.generated == ("front", "back", "right")
    with pytest.raises(TriptychError, match="a picture from azimuth 45 cannot guide the model"):
        views_from_prompt(images={45: photo("left")}, model=FakeViews())
    with pytest.raises(TriptychError, match="the left view is given twice"):
        views_from_prompt(images={90: photo("left"), "left": photo("left")}, model=FakeViews())


def test_faulty_sheets_are_drawn_again_with_the_next_seed_and_it_is_told():
    model = FakeViews(faults={7: [("back", blank)], 8: [("left", low)]})
    made = views_from_prompt("robot", model=model, settings=ViewSettings(seed=7))
    assert [call["seed"] for call in model.calls] == [7, 8, 9]
    assert (made.seed, made.rerolls) == (9, 2)
    (told,) = made.warnings
    assert told.startswith(
        "the views were drawn again 2 times and those of seed 9 kept (seed 7: the back panel is empty;"
    )
    assert "seed 8: the left panel: the object touches the bottom border, so it is cut off" in told


def test_the_best_of_faulty_sheets_is_kept_and_its_faults_are_told():
    both, one = [("back", blank), ("left", low)], [("left", low)]
    model = FakeViews(faults={0: both, 1: one, 2: one, 3: both})
    made = views_from_prompt("robot", model=model, settings=ViewSettings(rerolls=3))
    assert (made.seed, made.rerolls, len(model.calls)) == (1, 3, 4)
    assert made.warnings[0].startswith("the views were drawn again 3 times and those of seed 1 kept")
    assert made.warnings[1].startswith("the generated views (seed 1) are faulty: the left panel: the object touches")
    assert made.warnings[1].endswith("try another seed, more rerolls or another prompt")
    assert made.view_set.names == VIEW_NAMES


def test_a_fault_in_a_panel_that_is_given_does_not_matter():
    model = FakeViews(faults={0: [("front", blank)]})
    made = views_from_prompt(images={"front": photo("front")}, model=model)
    assert (made.rerolls, made.warnings) == (0, ())
    assert iou(made.views["front"][..., 3] > 0.5, prepare_views({0: photo("front")}).images[0, 3].numpy() > 0.5) > 0.98


def test_a_panel_that_stays_empty_is_left_out_and_four_are_an_error():
    always = FakeViews(faults={0: [("back", blank)]})
    made = views_from_prompt(images={"front": photo("front")}, model=always, settings=ViewSettings(rerolls=0))
    assert made.view_set.names == ("front", "left", "right") and made.generated == ("left", "right")
    assert made.warnings[-1] == "the back panel stayed empty: the set goes on without it"
    assert split_sheet(made.sheet)["back"].max() == 0
    nothing = FakeViews(faults={0: [(name, blank) for name in VIEW_NAMES]})
    with pytest.raises(TriptychError, match="the model drew nothing in any panel: try another seed"):
        views_from_prompt("robot", model=nothing, settings=ViewSettings(rerolls=0))


def test_a_model_with_a_white_background_and_another_panel_size():
    model = FakeViews(card(background=WHITE, panel_size=192, vocabulary=None))
    made = views_from_prompt("一个机器人", images={"front": photo("front")}, model=model)
    assert made.warnings == () and made.prompt == "一个机器人. given: front."
    assert model.calls[0]["references"][0].shape == (3, 192, 192)
    assert model.calls[0]["references"][0][:, 0, 0].tolist() == [1, 1, 1]
    for name in VIEW_NAMES:
        assert iou(made.views[name][..., 3] > 0.5, prepare_views(dict(truth(192).items()), size=256)
                   .images[VIEW_NAMES.index(name), 3].numpy() > 0.5) > 0.96  # fmt: skip


def test_progress_rises_to_one_and_previews_come_with_every_step():
    shown, pictures = [], []
    model = FakeViews(faults={0: [("back", blank)]})
    views_from_prompt(
        "robot",
        model=model,
        settings=ViewSettings(steps=4),
        progress=lambda stage, fraction: shown.append((stage, fraction)),
        preview=pictures.append,
    )
    fractions = [fraction for _, fraction in shown]
    assert fractions == sorted(fractions) and (fractions[0], fractions[-1]) == (0, 1)
    assert list(dict.fromkeys(stage for stage, _ in shown)) == ["prepare", "load", "generate", "fit"]
    assert len(pictures) == 8 and all(picture.shape == (3, 256, 256) for picture in pictures)


@pytest.mark.parametrize("answers", range(7))
def test_cancel_stops_before_the_next_step(answers):
    asked = []

    def cancel():
        asked.append(True)
        return len(asked) > answers

    model = FakeViews()
    with pytest.raises(Cancelled, match="stopped"):
        views_from_prompt("robot", model=lambda: model, cancel=cancel)
    assert len(asked) == answers + 1
    assert model.unloaded == (1 if answers >= 2 else 0)


def test_what_is_wrong_is_said_before_a_model_is_loaded():
    def load():
        raise AssertionError("loaded")

    for settings, sentence in (
        (ViewSettings(seed=-1), "seed must be"),
        (ViewSettings(steps=0), "steps of the views must be 1-1000, got 0"),
        (ViewSettings(guidance=101.0), "guidance of the views must be 0-100, got 101"),
        (ViewSettings(guidance=float("nan")), "guidance of the views must be 0-100, got nan"),
        (ViewSettings(rerolls=101), "rerolls must be 0-100, got 101"),
        (ViewSettings(size=8), "size of a view must be 16-4096 pixels, got 8"),
    ):
        with pytest.raises(TriptychError, match=sentence):
            views_from_prompt("robot", model=load, settings=settings)
    with pytest.raises(TriptychError, match="the prompt is empty and no picture is given"):
        views_from_prompt(" \n", model=load)
    with pytest.raises(TriptychError, match="no object was found in the front view"):
        views_from_prompt("robot", images={"front": Image.new("RGB", (200, 200), "white")}, model=load)


def test_warnings_about_given_pictures_and_words_reach_the_user():
    several = Image.new("RGB", (300, 200), "white")
    draw = ImageDraw.Draw(several)
    draw.rectangle((20, 40, 110, 160), fill="navy")
    draw.rectangle((180, 40, 270, 160), fill="darkred")
    cut = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(cut).rectangle((60, 50, 130, 199), fill="navy")
    made = views_from_prompt("red dragon", images={"front": several, "left": cut}, model=FakeViews())
    assert made.warnings == made.view_set.warnings
    assert len(made.warnings) == len(set(made.warnings))
    for sentence in (
        "the front view: 2 separate objects found and all kept",
        "the left view: the object touches the bottom border and may be cut off there",
        "the small model fake does not know: dragon",
    ):
        assert [warning for warning in made.warnings if warning.startswith(sentence)], sentence


def test_the_given_pictures_are_not_changed():
    picture = np.asarray(photo("front"))
    before = picture.copy()
    views_from_prompt(images={"front": picture}, model=FakeViews())
    assert np.array_equal(picture, before)


def test_a_model_that_wants_mirror_images_gets_each_after_its_picture():
    given = {"left": photo("left"), "front": photo("front")}
    plain, mirrored = FakeViews(), FakeViews(card(mirrored=True))
    for model in (plain, mirrored):
        views_from_prompt(images=given, model=model)
    (front, left), got = plain.calls[0]["references"], mirrored.calls[0]["references"]
    assert not torch.equal(front, front.flip(-1))
    assert all(torch.equal(*pair) for pair in zip(got, [front, front.flip(-1), left, left.flip(-1)], strict=True))


def test_a_card_may_have_steps_and_guidance_of_its_own_for_given_views():
    model = FakeViews(card(photo_steps=1, photo_guidance=1.0))
    views_from_prompt("a robot", model=model)
    views_from_prompt("a robot", images={"left": photo("left")}, model=model)
    views_from_prompt(images={"left": photo("left")}, model=model, settings=ViewSettings(steps=5, guidance=4.0))
    assert [(c["steps"], c["guidance"]) for c in model.calls] == [(3, 2.0), (1, 1.0), (5, 4.0)]


def test_an_object_in_the_colour_of_the_models_background_is_told():
    picture = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(picture).rectangle((60, 40, 140, 160), fill="teal")
    ImageDraw.Draw(picture).rectangle((60, 40, 140, 63), fill=(240, 20, 220))
    (told,) = views_from_prompt(images={"front": picture}, model=FakeViews()).warnings
    assert re.match("the front view: (19|20|21)% of the object has nearly the colour of the model's background", told)
    white = FakeViews(card(background=WHITE))
    assert views_from_prompt(images={"front": picture}, model=white).warnings == ()
    ImageDraw.Draw(picture).rectangle((60, 40, 140, 160), fill="purple")  # has half of the key's colour, and is kept
    assert views_from_prompt(images={"front": picture}, model=FakeViews()).warnings == ()


def test_what_the_model_says_about_its_loading_and_settings_reaches_the_user():
    model = FakeViews()
    model.warnings = ("half of it runs on the CPU",)
    model.notes = lambda *, guidance, references: (f"{references} references, guidance {guidance}",)
    made = views_from_prompt(images={"left": photo("left")}, model=model, settings=ViewSettings(guidance=3.0))
    assert made.warnings == ("half of it runs on the CPU", "1 references, guidance 3.0")


def test_a_real_network_of_random_weights_runs_through():
    from flux_tiny import klein_folder
    from transformers import AutoTokenizer

    folder = klein_folder("mini", card=True)
    shown, pictures = [], []
    made = views_from_prompt(
        "a red chair, a dragon",
        images={"left": photo("left")},
        model=str(folder),
        settings=ViewSettings(seed=3, rerolls=1, size=128),
        progress=lambda stage, fraction: shown.append(fraction),
        preview=pictures.append,
    )
    assert made.prompt == "a red chair, a dragon. given: left." and made.drawn.shape == (128, 128, 3)
    assert "does not know: dragon; it knows about 19 words" in made.warnings[0]
    # noise without any background is drawn again, and told
    assert made.rerolls == 1 and "so it is cut off" in made.warnings[1] and made.generated == ("front", "back", "right")
    assert "the front, back and right panels: the object touches the border all around" in made.warnings[2]
    assert shown == sorted(shown) and len(pictures) == 4 and pictures[0].shape == (3, 128, 128)
    own = prepare_views({"left": photo("left")}, size=128).images[0, 3] > 0.5
    assert iou(made.views["left"][..., 3] > 0.5, own.numpy()) > 0.97
    again = views_from_prompt(
        "a red chair, a dragon", {"left": photo("left")}, str(folder), ViewSettings(seed=3, rerolls=1, size=128)
    )
    assert torch.equal(made.view_set.images, again.view_set.images)
    long = views_from_prompt("chair " * 2000, None, str(folder), ViewSettings(rerolls=0))
    told = long.warnings[0]
    limit = read_card(folder).max_sequence_length
    assert f"has 11,999 characters, more than the {limit} tokens that random klein reads: only the first" in told
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    framed = tokenizer.apply_chat_template(
        [{"role": "user", "content": long.prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert 0.7 * limit < len(tokenizer(framed).input_ids) <= limit
