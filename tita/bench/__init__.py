"""The benchmark: ask endpoints questions with images; say how good, fast and dear they are."""
