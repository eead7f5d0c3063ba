"""The job `build-pairs`: preference pairs from the base model's own answers (arXiv 2404.10501)."""
