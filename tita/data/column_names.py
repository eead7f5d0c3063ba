"""The column names that dataset rows may have, by field.

A column that is in none of these lists is unknown: a row that has a value in it is refused, because
the value may change what the row means.
"""

import re

ID = (
    "id",
    "question_id",
    "qid",
    "questionId",
    "pid",
    "uid",
    "sample_id",
    "data_id",
    "idx",
    "index",
)
"""A row may have several ids, such as one of its own and one of its source; the first is used."""

QUESTION = ("question", "text", "prompt", "query")
CONVERSATION = ("conversations", "messages")
SYSTEM = ("system", "system_prompt")
REFERENCES = (
    *("references", "reference", "answers", "answer", "label", "ground_truth"),
    "multiple_choice_answer",
)
REJECTED = ("rejected", "reject")
REJECTED_IMAGE = ("rejected_image", "reject_image")
CHOICES = ("choices", "options")

IMAGE = (
    *("image", "images", "image_path", "img_path", "image_file", "file_name", "filename"),
    *("image_name", "img", "decoded_image"),
)
"""Images, or the names of their files."""
IMAGE_ID = ("image_id", "imageId", "img_id")
"""Ids of images: COCO's numbers, or file names with or without a suffix."""
NUMBERED_IMAGE = re.compile(r"(?:image|img)_?\d+")
"""One column per image, as in MMMU."""

_LETTERS = "ABCDEFGHIJ"
LETTERED_CHOICES = (
    tuple(_LETTERS),
    tuple(f"choice_{letter.lower()}" for letter in _LETTERS),
    tuple(f"option_{letter.lower()}" for letter in _LETTERS),
)
"""One column per option of a multiple-choice question, as in MMBench and SEED-Bench."""

BENCHMARK = ("metric", "suite", "category", "group")

IMAGE_SOURCES = frozenset(
    ("url", "coco_url", "flickr_url", "flickr_original_url", "flickr_300k_url")
)
"""Where the image of a row is from; without the image itself they are not ignored."""

METADATA = frozenset(
    {
        # where a row is from
        *("ds_name", "origin_dataset", "origin_split", "source", "dataset", "dataset_name"),
        *("data_source", "data_type", "datasource", "image_source", "set_name", "split", "domain"),
        *("data_split", "subset", "task", "version", "license", "__index_level_0__", "Unnamed: 0"),
        # other ids
        *("docId", "ucsf_document_id", "ucsf_document_page_no", "segment", "row_id", "chosen_id"),
        *("annotation_id", "video_id", "answer_id", "model_id", "model", "models", "rejected_id"),
        # kinds of questions
        *("question_type", "question_types", "answer_type", "question_type_id", "capability"),
        *("type", "types", "subfield", "img_type", "topic_difficulty", "difficulty", "grade"),
        *("subject", "topic", "skill", "l2-category", "l2_category", "semantic", "structural"),
        *("comment", "comments", "metadata", "meta", "tags", "tag", "language", "lang"),
        # annotations that repeat or describe what is in the row
        *("question_tokens", "image_width", "image_height", "width", "height", "image_classes"),
        *("answerable", "answer_confidence", "isBalanced", "groups", "entailed", "equivalent"),
        *("semanticStr", "fullAnswer", "full_answer", "explanation", "solution"),
        *("precision", "unit", "score", "scores", "chosen_score", "rejected_score", "margin"),
        *("score_chosen", "score_rejected", "chosen_rating", "rejected_rating", "chosen-rating"),
        *("rejected-rating", "chosen_model", "rejected_model", "chosen-model", "rejected-model"),
        *("rating", "ratings", "timestamp", "created", "annotator", "human_or_machine"),
        "hallucination",
    }
    | IMAGE_SOURCES
)
"""Columns that describe a row without changing its question, images or answers."""
