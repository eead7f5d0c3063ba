"""`tita infer`: aligned answers, to one question in the terminal or to many in a file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import IgnoreColumn, app, decoded, read_question
from tita.cli.engine_arguments import (
    EnforceEager,
    EngineChoice,
    EngineOption,
    MaxModelLen,
    MemoryShare,
    PipelineParallel,
    TensorParallel,
    vllm_options,
)
from tita.cli.guidance_options import (
    ContrastOption,
    FormOption,
    NoiseStepOption,
    PlausibilityOption,
    RewardOption,
    WeightOption,
    parse_rewards,
    parse_weights,
)
from tita.errors import TitaError
from tita.imports import without_garbage_collection
from tita.terminal import Output


class Dtype(StrEnum):
    """Weight dtypes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ImageAspect(StrEnum):
    """Ways to show images that are not square to models."""

    AUTO = "auto"
    PAD = "pad"
    KEEP = "keep"


AspectOption = Annotated[
    ImageAspect,
    typer.Option(help="Pad images to a square, or keep their aspect; auto follows the checkpoint."),
]


@app.command()
def infer(
    base: Annotated[str, typer.Option(help="Base model: a path, a hub name or a store tree.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image, repeatable; or one folder of images."),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="Question; - reads it from standard input.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="JSONL file of questions; - reads standard input.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the questions' images; default: the file's folder."),
    ] = None,
    ignore_column: IgnoreColumn = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Answers file; resumed if it exists; default: standard output."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of concurrent answers.", min=1)] = 8,
    model_id: Annotated[
        str | None, typer.Option(help="Model name in the answers; default: --base.")
    ] = None,
    reward: RewardOption = None,
    reference: Annotated[
        str | None, typer.Option(help="Reward model before DPO, for --form dpo.")
    ] = None,
    weight: WeightOption = None,
    form: FormOption = "tita",
    plausibility: PlausibilityOption = None,
    noise_step: NoiseStepOption = None,
    contrast: ContrastOption = None,
    guidance_text: Annotated[
        str, typer.Option(help="Text that --form cfg adds before the question in one view.")
    ] = "",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also show the base model's answer.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the reward model's effect on each token.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens per answer.", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Total probability of the tokens to sample from; 1 is all.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Number of most likely tokens to sample from; 0 is all.", min=0)
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Repetition penalty; 1 is none.", min=0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Sampling seed.", min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Weight dtype.")] = Dtype.AUTO,
    device_map: Annotated[
        str | None,
        typer.Option(help="Device map of the base model; auto spreads it over all GPUs."),
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    engine: EngineOption = EngineChoice.TRANSFORMERS,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    enforce_eager: EnforceEager = False,
    output: Annotated[
        Output, typer.Option("-o", "--output", help="Output format for one question.")
    ] = Output.TABLE,
) -> None:
    """Answer questions about images, guided by a reward model."""
    from tita.align.requests import Sampling
    from tita.infer.options import InferOptions
    from tita.vlm.images import open_image

    paths = image or []
    one = _check_mode(paths, question, questions, images=images, out=out, compare=compare)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        repetition_penalty=repetition_penalty, seed=seed, stops=tuple(map(decoded, stop or ())),
    )  # fmt: skip
    alone, rewards = parse_rewards(reward)
    one_weight, weights = parse_weights(weight)
    options = InferOptions(
        base=base, reward=alone, rewards=rewards, reference=reference, form=form,
        weight=one_weight, weights=weights, plausibility=plausibility, noise_step=noise_step,
        contrast=contrast, text=decoded(guidance_text),
        sampling=sampling, explain=explain, dtype=dtype.value, device_map=device_map,
        image_aspect=image_aspect.value, engine=engine.value,
        vllm=vllm_options(
            engine, dtype=dtype.value, tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size, max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization, enforce_eager=enforce_eager,
        ),
    )  # fmt: skip
    if one:
        text = read_question(question or "")
        if compare and not options.guidance.active:
            raise TitaError(
                "--compare without guidance", remedy="give --reward and a --weight over 0"
            )
        # Before torch and the models are loaded, so that a missing image is reported at once.
        opened = [open_image(path) for path in paths]
        with without_garbage_collection():
            from tita.infer.interactive import answer_one

        answer_one(text, opened, options, compare=compare, output=output)
        return
    with without_garbage_collection():
        from tita.infer.question_files import answer_all, images_in, questions_of

    asked = (
        images_in(paths[0], question=read_question(question or ""))
        if questions is None
        else questions_of(questions, images=images, ignore=ignore_column or ())
    )
    answer_all(asked, options, out=out, batch_size=batch_size, model_id=model_id)


def _check_mode(
    image: list[Path],
    question: str | None,
    questions: str | None,
    *,
    images: Path | None,
    out: Path | None,
    compare: bool,
) -> bool:
    """Check which options are combined; returns whether there is a single question to answer.

    Raises:
        TitaError: the options contradict each other.
    """
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
    one = questions is None and not folders
    if images is not None and questions is None:
        raise TitaError("--images without --questions", remedy="give --image")
    if out is not None and one:
        raise TitaError("--out for one question", remedy="use -o json, or --questions")
    if compare and not one:
        raise TitaError("--compare for many questions", remedy="run twice, with --weight 0 once")
    return one
