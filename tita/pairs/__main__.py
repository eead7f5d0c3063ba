"""Entry point of a `build-pairs` worker: `python -m tita.pairs`, under torchrun or alone."""

import sys
from dataclasses import replace
from typing import Any

from tita.imports import without_garbage_collection

with without_garbage_collection():
    import torch

    from tita.activity import enter_stage, mark_progress
    from tita.engine.start import require_engine
    from tita.errors import ExitCode, TitaError, from_os_error
    from tita.gang import WATCHDOG, record_exit_code
    from tita.pairs.build import PairBatch, PairBuilder, PairsRun, prepare_run
    from tita.pairs.finish import wait_for_batches, write_tree
    from tita.pairs.implicit_reward import ImplicitRewardRanker
    from tita.pairs.ranking import RankedPairBuilder, Ranker
    from tita.pairs.taught import TaughtPairBuilder, Teacher
    from tita.pairs.workers import digest_models, load_base, start_base_engine, this_worker
    from tita.recipe_sources import parse_recipe_variable
    from tita.recipes import PairsRecipe, validate_recipe
    from tita.settings import settings
    from tita.storage import Store, is_done, open_store
    from tita.terminal import configure_logging, progress, say
    from tita.vlm.loading import load_vlm


def main() -> None:
    """Build this worker's batches; worker 0 then waits for the others and writes the tree."""
    environment = settings()
    configure_logging(environment.log_level)
    recipe = validate_recipe(PairsRecipe, parse_recipe_variable(environment.recipe))
    # Worker 0 gives up on the others after the same time.
    WATCHDOG.start("build-pairs", timeout_s=recipe.peer_timeout_s)
    name = environment.run or "pairs"
    store = open_store()
    require_engine(recipe.engine)
    worker = this_worker(recipe)
    if worker is None:
        return
    enter_stage("reading the questions")
    run = prepare_run(recipe, name=name, store=store)
    # List the batches before looking for the tree: they are deleted after the tree is written.
    missing = run.missing_batches(store)
    if is_done(run.out, recipe=recipe, store=store):
        if worker.number == 0:
            run.check_questions(store)
            run.delete_batches(store)
            say(f"{run.out} already exists")
        return
    enter_stage("checking the models")
    numbers = range(worker.number, run.num_batches, worker.total)
    has_missing = not set(numbers).isdisjoint(missing)
    run = replace(
        run,
        models=digest_models(recipe, store=store),
        endpoint=endpoint_identity(recipe, required=has_missing),
    )
    finished = sorted(set(numbers).difference(missing))
    if outdated := run.outdated_batches(store, finished):
        say(
            f"{len(outdated)} of {len(finished)} finished batches were built with other models or "
            "images and are built again"
        )
    own = sorted({*outdated, *missing}.intersection(numbers))
    if not own and worker.number != 0:
        return
    enter_stage("loading the model")
    # A missing API key fails before the base model is loaded. Worker 0 without batches of its own
    # only writes the tree.
    ranked = recipe.strategy == "judge" and own
    ranker = load_ranker(run, store=store) if ranked else None
    teacher = load_teacher(run, store=store) if recipe.strategy == "teacher" and own else None
    base = load_base(recipe, store=store)
    if own:
        engine = start_base_engine(base, recipe, store=store)
        builder: PairBuilder | RankedPairBuilder | TaughtPairBuilder
        if ranker is not None:
            builder = RankedPairBuilder(run, engine=engine, ranker=ranker)
        elif recipe.strategy in ("contrast", "teacher"):
            builder = TaughtPairBuilder(run, base=base, engine=engine, teacher=teacher)
        else:
            builder = PairBuilder(run, base=base, engine=engine)
        with progress("building pairs", total=len(own), unit="batches") as advance:
            for number in own:
                inputs_sha256 = run.inputs_digest(run.image_digests(number))
                steps = []
                for questions in run.steps(number):
                    steps.append(builder.build(questions))
                    mark_progress()
                batch = replace(
                    PairBatch.join(steps), inputs_sha256=inputs_sha256, endpoint=run.endpoint
                )
                store.put(run.batch_key(number), batch.to_json())
                advance()
        engine.close()
    if worker.number == 0:
        wait_for_batches(run, store=store)
        enter_stage("uploading the pairs")
        write_tree(run, name=name, base=base, store=store)


def endpoint_identity(recipe: PairsRecipe, *, required: bool) -> dict[str, Any]:
    """What the endpoint of judge or teacher tells of its model; empty if there is none.

    Args:
        recipe: of the run.
        required: whether this worker will ask it; otherwise one that does not answer tells nothing.

    Raises:
        TitaError: it does not answer, or the API key is missing.
    """
    asked = {"endpoint": recipe.endpoint, "teacher.endpoint": recipe.teacher.endpoint}
    for where, endpoint in asked.items():
        if endpoint is None:
            continue
        from tita.pairs.endpoint import Endpoint

        try:
            return Endpoint(endpoint, where=where).identity()
        except TitaError:
            if required:
                raise
    return {}


def load_ranker(run: PairsRun, *, store: Store) -> Ranker:
    """The ranker that a recipe with `strategy=judge` names.

    Raises:
        TitaError: a model cannot be loaded, or the API key is missing.
    """
    recipe = run.recipe
    if recipe.endpoint is not None:
        # The client takes a second to import.
        from tita.pairs.endpoint import EndpointRanker

        digest = run.endpoint.get("digest")
        return EndpointRanker(recipe.endpoint, seed=recipe.seed, digest=digest)
    assert recipe.reward is not None
    model, reference = (
        load_vlm(name, store=store, dtype=recipe.dtype)
        for name in (recipe.reward.model, recipe.reward.reference)
    )
    return ImplicitRewardRanker(model=model, reference=reference)


def load_teacher(run: PairsRun, *, store: Store) -> Teacher:
    """The teacher that a recipe with `strategy=teacher` names.

    Raises:
        TitaError: the model cannot be loaded, or the API key is missing.
    """
    # The client of endpoints takes a second to import.
    from tita.pairs.teacher import EndpointTeacher, ModelTeacher

    recipe = run.recipe
    if recipe.teacher.endpoint is not None:
        return EndpointTeacher(run, recipe.teacher.endpoint)
    assert recipe.teacher.model is not None
    model = load_vlm(recipe.teacher.model, store=store, dtype=recipe.dtype)
    return ModelTeacher(run, model=model)


def _report_error(error: Exception) -> int:
    """Report an error in one line; return its exit code, or 0 if it needs a traceback."""
    if isinstance(error, OSError):
        error = from_os_error(error) or error
    if isinstance(error, TitaError):
        say(f"build-pairs: {error}")
        return error.exit_code
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        first_line = (str(error).splitlines() or ["out of memory"])[0]
        say(f"build-pairs: {first_line}; lower batch_size or max_new_tokens")
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.OK


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        code = _report_error(error)
        if not code:
            raise
        record_exit_code(code)
        sys.exit(code)
