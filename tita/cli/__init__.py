"""The commands. Every heavy import stands inside a command's body, so that help comes at once."""
