"""What keeps the class as it is without class pictures: the base model as the teacher, direct consistency, a penalty.

Each equals a plain loop in test_reference_families, and resumes exactly in test_exactness.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import Recorder
from pack.trainer.core.errors import SettingsError, suggest
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.models.objective import consistency_loss
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pack.trainer.training.preservation import TRAJECTORY_LENGTH, BaseTeacher, chosen_prior
from worlds import KINDS, PROMPT, World, assert_same_end, noisy_pictures, perturb, predicted

pytestmark = pytest.mark.usefixtures("quick")

TEACHER: dict[str, Any] = {"prior": "model", "precision": "fp32"}


@pytest.fixture(scope="module")
def known(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Pictures of which it is known what they show without the rare word."""
    folder = noisy_pictures(tmp_path_factory.mktemp("known") / "subject", 3, 0)
    return replace(world, subject=load_pictures(folder, PROMPT, Recorder(), AnnotationOptions(token="sks")))


def test_what_a_picture_shows_without_the_rare_word_is_known(known: World) -> None:
    assert [picture.class_captions for picture in known.subject] == [("a photo of a dog",)] * 3


@pytest.mark.parametrize(
    ("captions", "options", "shown"),
    [
        (["a photo of sks dog", "sks dog, asleep"], {"token": "sks"}, ("a photo of a dog", "dog, asleep")),
        (["a photo of sks dog", "a photo of sks dog"], {"token": "sks"}, ("a photo of a dog",)),
        (["a photo of sks dog", "a photo of a dog"], {"token": "sks"}, ()),  # the second would be unlearned
        (["rex on a chair"], {"token": "sks"}, ()),
        (
            ["rex on a chair"],
            {"token": "sks", "class_prompt": "a dog | a photo of a dog"},
            ("a dog", "a photo of a dog"),
        ),
        (["a photo of sks dog"], {"token": None}, ()),
    ],
)
def test_class_captions(captions: list[str], options: dict[str, Any], shown: tuple[str, ...]) -> None:
    assert AnnotationOptions(**options).class_captions(captions) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_without_what_is_trained_the_base_predicts(kind: str, world: World, tmp_path: Path) -> None:
    settings = {**KINDS[kind], "text_encoder_lr": 1e-2}
    session = world.prepared(tmp_path, **settings).session
    conditioning = {"text": torch.randn((1, 32, session.model.denoiser.config.cross_attention_dim))}
    base = predicted(world.base.family.build(world.base), conditioning)["prediction"]
    assert isinstance(session.trainable, TrainableAdapter)
    perturb(session.trainable)
    trained = predicted(session.model, conditioning)["prediction"]
    assert not torch.allclose(trained, base, atol=1e-3)
    with session.trainable.untrained():
        assert torch.equal(predicted(session.model, conditioning)["prediction"], base)
    assert torch.equal(predicted(session.model, conditioning)["prediction"], trained)
    assert all(parameter.requires_grad for parameter in session.trainable.parameters())


def test_without_what_is_trained_a_tuned_model_is_the_base(known: World, tmp_path: Path) -> None:
    session = known.prepared(tmp_path, **TEACHER, adapter="full", targets="all").session
    conditioning = {"text": torch.randn((1, 32, session.model.denoiser.config.cross_attention_dim))}
    base = predicted(known.base.family.build(known.base), conditioning)["prediction"]
    with torch.no_grad():
        for parameter in session.trainable.parameters():
            parameter.add_(0.01)
    trained = predicted(session.model, conditioning)["prediction"]
    assert not torch.allclose(trained, base, atol=1e-3)
    with session.trainable.untrained():
        assert torch.equal(predicted(session.model, conditioning)["prediction"], base)
    assert torch.equal(predicted(session.model, conditioning)["prediction"], trained)


@pytest.mark.parametrize("changes", [{}, {"text_encoder_lr": 1e-2}, {"adapter": "loha", "targets": "all"}])
def test_what_has_not_learned_has_nothing_to_preserve(changes: dict[str, Any], known: World, tmp_path: Path) -> None:
    """At the first step the model is its own teacher: that part of the loss is 0."""
    recipe = known.prepared(tmp_path, **TEACHER, **changes, batch_size=2)
    [subject] = recipe.batches(0)
    [preserved] = recipe.session.teacher.batches(0, 0)
    assert [subject.subject, len(subject.latents), len(preserved.noisy)] == [2, 2, 2]
    # text encoders that are trained encode the prompts of a batch, others all prompts together: summed in another order
    assert float(recipe.preservation_loss(preserved, 0).detach()) == pytest.approx(0, abs=1e-9)
    trainable = recipe.session.trainable
    assert isinstance(trainable, TrainableAdapter)
    perturb(trainable)
    assert float(recipe.preservation_loss(preserved, 0).detach()) > 1e-6


def test_the_base_is_asked_every_few_steps(known: World, tmp_path: Path) -> None:
    recipe = known.prepared(tmp_path, **TEACHER, prior_every=3, prior_weight=0.5)
    weights = [[batch.weight for batch in recipe.session.teacher.batches(step, 0)] for step in range(5)]
    assert weights == [[3.0], [], [], [3.0], []]  # twice λ, for three steps


def test_what_is_preserved_lies_where_the_base_samples(known: World, tmp_path: Path) -> None:
    """From noise to what diffusers' DDIM gives for the class's prompt, whatever has been trained meanwhile."""
    recipe = known.prepared(tmp_path, **TEACHER, prior_every=1, batch_size=2)
    session = recipe.session
    way = [session.teacher.batches(step, 0)[0] for step in range(TRAJECTORY_LENGTH + 1)]
    first, last = way[0], way[-2]
    assert torch.all(first.timesteps >= 875)
    assert torch.all(last.timesteps < 125)
    alphas = session.objective.alphas_cumprod  # type: ignore[attr-defined]
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    scheduler = DDIMScheduler(trained_betas=betas.numpy(), clip_sample=False)
    scheduler.num_inference_steps = TRAJECTORY_LENGTH
    for here, following in itertools.pairwise(way[:-1]):
        assert torch.equal(here.captions, first.captions)
        for row in range(2):
            sample = scheduler.step(here.target[[row]], int(here.timesteps[row]), here.noisy[[row]]).prev_sample
            assert torch.allclose(following.noisy[[row]], sample, rtol=1e-4, atol=1e-4)
    again = way[-1]  # another way begins at other noise
    assert torch.all(again.timesteps >= 875)
    assert not torch.allclose(again.noisy, first.noisy)


def test_a_way_that_was_left_is_gone_again(known: World, tmp_path: Path) -> None:
    """A run that is resumed amid one is taught what it would have been taught."""
    settings = {**TEACHER, "prior_every": 2, "gradient_accumulation": 2, "batch_size": 2}
    recipe = known.prepared(tmp_path, **settings)
    straight = [recipe.session.teacher.batches(step, 1) for step in range(22)]
    recipe.clean_up()
    recipe.prepare()
    for step in (12, 6, 20):
        [again] = recipe.session.teacher.batches(step, 1)
        [expected] = straight[step]
        assert torch.equal(again.noisy, expected.noisy)
        assert torch.equal(again.target, expected.target)


def test_processes_share_the_samples_of_one(known: World, tmp_path: Path) -> None:
    settings = {**TEACHER, "prior_every": 1, "gradient_accumulation": 2}
    alone = known.prepared(tmp_path / "alone", **settings, batch_size=2)
    recipe = known.prepared(tmp_path / "two", **settings)
    session = recipe.session
    teachers = [
        BaseTeacher(
            session.cache, recipe.settings, session.objective, recipe.base_prediction, recipe.device, (process, 2)
        )
        for process in range(2)
    ]
    for step in (0, 3, 9):
        [expected] = alone.session.teacher.batches(step, 1)
        shares = [teacher.batches(step, 1)[0] for teacher in teachers]
        for name in ("noisy", "timesteps", "captions", "target"):
            together = torch.cat([getattr(share, name) for share in shares])
            # a batch of two is summed in another order than two of one
            torch.testing.assert_close(together, getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_micro_batches_are_at_different_noise(known: World, tmp_path: Path) -> None:
    recipe = known.prepared(tmp_path, **TEACHER, prior_every=1, gradient_accumulation=2)
    timesteps = [int(recipe.session.teacher.batches(0, micro)[0].timesteps) for micro in range(2)]
    assert [timestep // 500 for timestep in timesteps] == [1, 0]


def test_the_prompts_of_the_class_are_encoded_by_the_untrained_text_encoder(known: World, tmp_path: Path) -> None:
    recipe = known.prepared(tmp_path, **TEACHER, text_encoder_lr=1e-2)
    text = recipe.session.text
    [row] = recipe.session.cache.preserved[0].tolist()
    before = text.base_rows(torch.tensor([row]))["text"]
    assert torch.allclose(text.rows(torch.tensor([row]))["text"], before, atol=1e-5)
    trainable = recipe.session.trainable
    assert isinstance(trainable, TrainableAdapter)
    perturb(trainable)
    assert torch.equal(text.base_rows(torch.tensor([row]))["text"], before)
    assert not torch.allclose(text.rows(torch.tensor([row]))["text"], before, atol=1e-3)
    text.freeze()
    assert torch.equal(text.base_rows(torch.tensor([row]))["text"], before)


def test_consistency_becomes_the_loss_itself() -> None:
    """At the base's own loss in value and gradient, and everywhere as β goes to 0."""
    loss = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    base = loss.detach().clone()
    consistent = consistency_loss(loss, base, 1000.0)
    assert torch.allclose(consistent, base)
    [gradient] = torch.autograd.grad(consistent.sum(), loss)
    assert gradient.tolist() == pytest.approx([1.0, 1.0])
    assert torch.allclose(consistency_loss(loss, base + 0.1, 1e-6), loss, atol=1e-6)
    # a sample that is learned already counts less, one that got worse up to twice as much
    [gradient] = torch.autograd.grad(consistency_loss(loss, torch.tensor([0.4, 0.1]), 100.0).sum(), loss)
    assert gradient[0] < 1e-3
    assert gradient[1] == pytest.approx(2.0, abs=1e-3)


def test_class_pictures_are_not_compared_with_the_base(known: World, tmp_path: Path) -> None:
    """Direct consistency is for the subject's samples: those of the class have the same loss with and without it."""
    world = known.with_priors(tmp_path / "class")
    sums = []
    for number, beta in enumerate((0.0, 500.0)):
        recipe = world.prepared(tmp_path / str(number), dco_beta=beta, precision="fp32")
        perturb(recipe.session.trainable, by=0.5)  # type: ignore[arg-type]
        [batch] = recipe.batches(0)
        parts = [
            float(recipe.batch_loss(replace(batch, weights=torch.tensor(weights)), 0).detach())
            for weights in ([1.0, 0], [0, 1.0])
        ]
        sums.append(parts)
    assert sums[0][0] != pytest.approx(sums[1][0], rel=1e-3)
    assert sums[0][1] == pytest.approx(sums[1][1], rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("DoRA", "OFT", "BOFT")])  # see weight_penalty
def test_the_change_is_that_of_the_weights(kind: str, world: World, tmp_path: Path) -> None:
    session = world.prepared(tmp_path, **KINDS[kind]).session
    trainable = session.trainable
    assert isinstance(trainable, TrainableAdapter)
    [gradient] = torch.autograd.grad(trainable.squared_change(("unet",)), trainable.parameters()[:1])
    assert torch.isfinite(gradient).all()
    perturb(trainable)
    deltas = [layer.delta().double() for layer in trainable.adapter().layers.values()]
    expected = sum(float(delta.square().sum()) for delta in deltas)
    assert float(trainable.squared_change(("unet",)).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_change_of_a_tuned_model(world: World, tmp_path: Path) -> None:
    changes = {"adapter": "full", "targets": "all", "weight_penalty": 0.1, "text_encoder_lr": 1e-3}
    trainable = world.prepared(tmp_path, **changes).session.trainable
    assert float(trainable.squared_change(("unet", "text_encoder")).detach()) == 0
    parameter = trainable.groups()["unet"][0]
    with torch.no_grad():
        parameter.add_(0.5)
    assert float(trainable.squared_change(("unet",)).detach()) == pytest.approx(0.25 * parameter.numel(), rel=1e-4)
    assert float(trainable.squared_change(("text_encoder",)).detach()) == 0


def test_a_penalty_keeps_the_weights_nearer(world: World, tmp_path: Path) -> None:
    changes = {"steps": 6, "weight_decay": 0.0}
    norms = [
        sum(
            float(layer.delta().square().sum())
            for layer in world.train(tmp_path / str(penalty), weight_penalty=penalty, **changes).adapter.layers.values()
        )
        for penalty in (0.0, 10.0)
    ]
    assert norms[1] < 0.5 * norms[0]


def test_class_pictures_are_left_alone_if_they_are_not_wanted(known: World, tmp_path: Path) -> None:
    """The run is the one without them, and is found by the same fingerprint."""
    with_pictures = known.with_priors(tmp_path / "class")

    def fingerprint(world: World, prior: str) -> str:
        return world.recipe(tmp_path, prior=prior).fingerprint

    for prior in ("none", "model"):
        assert fingerprint(with_pictures, prior) == fingerprint(known, prior)
    assert fingerprint(with_pictures, "class-pictures") == fingerprint(with_pictures, "auto")
    assert fingerprint(known, "auto") == fingerprint(known, "model")
    assert fingerprint(known, "model") != fingerprint(known, "none")
    recipe = with_pictures.prepared(tmp_path, **TEACHER)
    assert recipe.session.cache.prior is None


@pytest.mark.parametrize(
    ("is_known", "has_class_pictures", "chosen"),
    [(True, False, "model"), (True, True, "class-pictures"), (False, False, "none"), (False, True, "class-pictures")],
)
def test_what_is_chosen_if_it_is_left_open(
    is_known: bool, has_class_pictures: bool, chosen: str, known: World, world: World
) -> None:
    pictures = known.subject if is_known else [*known.subject, *world.subject]
    assert chosen_prior(TrainSettings(), pictures, has_class_pictures=has_class_pictures) == chosen
    for prior in ("none", "class-pictures", "model"):
        assert chosen_prior(TrainSettings(prior=prior), pictures, has_class_pictures=has_class_pictures) == prior


def test_all_weights_have_no_teacher_unless_it_is_asked_for(known: World) -> None:
    """Beside them it takes as much memory as they do."""
    for prior, chosen in (("auto", "none"), ("model", "model")):
        settings = TrainSettings(adapter="full", prior=prior)
        assert chosen_prior(settings, known.subject, has_class_pictures=False) == chosen


def test_a_run_that_preserves_nothing_says_so_unless_it_is_meant(world: World, known: World, tmp_path: Path) -> None:
    told = []
    for number, (one, changes) in enumerate(
        [
            (world, {}),
            (world, {"prior": "none"}),
            (known, {}),
            (known, {"adapter": "full", "targets": "all"}),
        ]
    ):
        listener = Recorder()
        one.train(tmp_path / str(number), listener, steps=1, **changes)
        told.append([note for note in listener.notes if "Nothing preserves the class" in note])
    assert [len(notes) for notes in told] == [1, 0, 0, 1]
    assert suggest("class_prompt", "a photo of a dog") in told[0][0]
    assert "rare word" not in told[3][0]


def test_a_run_that_was_begun_without_preservation_goes_on_without(known: World, tmp_path: Path) -> None:
    """As versions did that knew no other; whoever asks for the base as the teacher gets a new run."""
    straight = known.train(tmp_path / "straight", prior="none")
    known.stop_after(2, tmp_path / "begun", prior="none")
    listener = Recorder()
    result = known.train(tmp_path / "begun", listener)
    assert result.started_from == 2
    assert any("started without class preservation" in note for note in listener.notes)
    assert_same_end(result, straight)
    other = known.train(tmp_path / "begun", prior="model")
    assert (other.started_from, other.run != result.run) == (0, True)


def as_other(picture: Picture) -> Picture:
    return replace(picture, class_captions=("a photo of an animal",))


def test_what_the_pictures_show_is_part_of_the_run(known: World, tmp_path: Path) -> None:
    other = replace(known, subject=[as_other(picture) for picture in known.subject])
    assert other.recipe(tmp_path, prior="model").fingerprint != known.recipe(tmp_path, prior="model").fingerprint
    assert other.recipe(tmp_path, prior="none").fingerprint == known.recipe(tmp_path, prior="none").fingerprint


def test_what_is_not_known_is_told_before_any_work(world: World, known: World, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not contain the rare word"):
        world.train(tmp_path, **TEACHER)
    with pytest.raises(SettingsError, match="there are no class pictures"):
        known.train(tmp_path, prior="class-pictures")
    assert not (tmp_path / "runs").exists()
