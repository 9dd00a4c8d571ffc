"""Ours: what the paper does not have. README.md says under "The files" what each module is for."""
