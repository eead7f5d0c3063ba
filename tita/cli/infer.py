"""`tita infer`: aligned answers, to one question at once or to many into a file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tita.cli.app import app
from tita.records import DEFAULT_WEIGHT
from tita.terminal import Output


class Dtype(StrEnum):
    """Numbers that weights are loaded as."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ImageAspect(StrEnum):
    """How images that are not square are shown to models."""

    AUTO = "auto"
    PAD = "pad"
    KEEP = "keep"


AspectOption = Annotated[
    ImageAspect,
    typer.Option(help="Images with bars, or as they are; auto as the checkpoint was trained."),
]


@app.command()
def infer(
    base: Annotated[
        str, typer.Option(help="Base model: a path, a hub name or a tree in the store.")
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="The image, repeatable; or a folder, to ask about each in it."),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="The question; - for standard input.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="JSONL file of questions instead; - for standard input.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the questions' images; the file's if not given.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File of answers, carried on if it is there; standard output if none."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers written at once.", min=1)] = 8,
    model_id: Annotated[
        str | None, typer.Option(help="The model's name in the answers; --base if not given.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model, named as the base.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The reward model before DPO, for --form dpo.")
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(help=f"Guidance weight; 0 is the base alone.  [default: {DEFAULT_WEIGHT}]"),
    ] = None,
    form: Annotated[str, typer.Option(help="Guidance form: tita, genarm or dpo.")] = "tita",
    plausibility: Annotated[
        float,
        typer.Option(help="Least share of the base's best token's chance; 0 is off.", min=0, max=1),
    ] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="The base's answer beside it.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what the reward model did to each token.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of the likeliest; 0 is all.", min=0)] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.", min=0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", min=0)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this; repeatable.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Numbers of the weights.")] = Dtype.AUTO,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads the base over all GPUs.")
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    output: Annotated[
        Output, typer.Option("-o", "--output", help="Form of one question's result.")
    ] = Output.TABLE,
) -> None:
    """Answer questions about images, guided by the reward model."""
    from tita.align import Sampling
    from tita.infer.asking import Asking

    how = _mode(image or [], question, questions, images=images, out=out, compare=compare)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        repetition_penalty=repetition_penalty, seed=seed, stops=tuple(stop or ()),
    )  # fmt: skip
    asking = Asking(
        base=base, reward=reward, reference=reference, form=form, weight=weight,
        plausibility=plausibility, sampling=sampling, explain=explain, dtype=dtype.value,
        device_map=device_map, image_aspect=image_aspect.value,
    )  # fmt: skip
    if how == "one":
        _one(_read(question), image or [], asking, compare=compare, output=output)
        return
    from tita.infer.many import answer_all
    from tita.infer.questions import images_in, questions_of

    if how == "folder":
        assert image is not None
        asked = images_in(image[0], question=_read(question))
    else:
        assert questions is not None
        asked = questions_of(questions, images=images)
    answer_all(asked, asking, out=out, batch_size=batch_size, model_id=model_id)


def _mode(
    image: list[Path],
    question: str | None,
    questions: str | None,
    *,
    images: Path | None,
    out: Path | None,
    compare: bool,
) -> str:
    """Whether `one` question is asked, one about a `folder`, or a `file` of them.

    Raises:
        TitaError: the options contradict each other.
    """
    from tita.errors import TitaError

    if (question is None) == (questions is None):
        what = "no question" if question is None else "--question beside --questions"
        raise TitaError(what, remedy="give one of --question and --questions")
    if questions is not None and image:
        raise TitaError("--image beside --questions", remedy="name images in the file")
    folders = [path for path in image if path.is_dir()]
    if folders and len(image) > 1:
        raise TitaError(
            "a folder beside other images", where=str(folders[0]), remedy="give it alone"
        )
    how = "file" if questions is not None else "folder" if folders else "one"
    if images is not None and how != "file":
        raise TitaError("--images without --questions", remedy="give --image")
    if out is not None and how == "one":
        raise TitaError("--out for one question", remedy="use -o json, or --questions")
    if compare and how != "one":
        raise TitaError("--compare for many questions", remedy="run twice, with --weight 0 once")
    return how


def _one(question: str, image: list[Path], asking: Any, *, compare: bool, output: Output) -> None:
    from tita.errors import TitaError
    from tita.infer.one import answer_one
    from tita.vlm import open_image

    if compare and not asking.guidance.weight:
        raise TitaError("--compare without guidance", remedy="give --reward and a --weight over 0")
    # Before the models are loaded, which takes longer than to see that an image is missing.
    opened = [open_image(path) for path in image]
    answer_one(question, opened, asking, compare=compare, output=output)


def _read(question: str | None) -> str:
    import sys

    from tita.errors import TitaError

    text = sys.stdin.read().strip() if question == "-" else question
    if not text or not text.strip():
        raise TitaError("the question is empty", remedy="write --question 'What is this?'")
    return text
