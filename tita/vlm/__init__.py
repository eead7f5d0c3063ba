"""Vision-language models: loading, prompts, images and model inputs."""
