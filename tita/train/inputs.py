"""What a run reads, found and checked before anything expensive begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tita.data import open_dataset
from tita.errors import TitaError
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe
from tita.records import Pair, Question
from tita.storage import Store, resolve
from tita.vlm import Aspect, aspect_of, locate_model, open_image, telling_load_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads, on this machine."""

    model: str
    """A local folder or a hub name."""
    model_name: str
    """What it is called elsewhere too: as the recipe names it, or a tree in the store."""
    image_aspect: Aspect
    """How the model is shown images, in the warm-up and after."""
    pairs: tuple[Pair, ...]
    pairs_path: Path
    answers: tuple[Question, ...]
    """What the warm-up learns: the first reference of each is the answer."""
    images: Path


def read_inputs(recipe: TrainRecipe, *, store: Store) -> Inputs:
    """Find and read everything a run reads; images are looked for, and opened later.

    Raises:
        TitaError: something is missing or broken; nothing was started.
    """
    deepspeed_config(recipe.deepspeed)
    model = locate_model(recipe.model, store=store)
    path = resolve(recipe.pairs, store=store)
    source = open_dataset(path, images=_images_of(recipe, store=store))
    pairs = tuple(source.pairs())
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="build some with `tita build-pairs`")
    answers = _read_answers(recipe, pairs=pairs, images=source.images, store=store)
    shown = {p.image for p in pairs} | {str(q.image) for q in answers}
    _look_for_images(shown, images=source.images)
    return Inputs(
        model=model,
        model_name=recipe.model,
        image_aspect=_aspect_of(recipe, model=model),
        pairs=pairs,
        pairs_path=path,
        answers=answers,
        images=source.images,
    )


def _aspect_of(recipe: TrainRecipe, *, model: str) -> Aspect:
    from transformers import AutoConfig

    with telling_load_errors(recipe.model):
        config = AutoConfig.from_pretrained(model)
    return aspect_of(config, wanted=recipe.image_aspect)


def _images_of(recipe: TrainRecipe, *, store: Store) -> Path | None:
    return None if recipe.images is None else resolve(recipe.images, store=store)


def _read_answers(
    recipe: TrainRecipe, *, pairs: Sequence[Pair], images: Path, store: Store
) -> tuple[Question, ...]:
    if recipe.sft is None:
        return ()
    if recipe.sft.answers is None:
        return tuple(
            Question(id=pair.id, text=pair.question, image=pair.image, references=(pair.chosen,))
            for pair in pairs
        )
    path = resolve(recipe.sft.answers, store=store)
    source = open_dataset(path, images=_images_of(recipe, store=store))
    answers = tuple(source.questions())
    if not answers:
        raise TitaError("no answers", where=str(path), remedy="leave out sft.answers")
    if source.images != images:
        raise TitaError(
            "its images lie elsewhere than those of the pairs",
            where=str(path),
            remedy="name one folder for both in `images`, or keep those of both inside the rows",
        )
    for question in answers:
        if not (question.references and question.image):
            raise TitaError(
                f"question {question.id!r} lacks an answer or an image",
                where=str(path),
                remedy="give it both or drop it",
            )
    return answers


def _look_for_images(names: set[str], *, images: Path) -> None:
    """Preflight opens every image; that one is missing can be told at once."""
    for name in sorted(names):
        if not (images / name).is_file():
            open_image(images / name)
