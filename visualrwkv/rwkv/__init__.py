"""The language models: one file reads like its paper."""
