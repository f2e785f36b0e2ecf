"""vlmtune: supervised fine-tuning of vision-language models that shows its evidence."""

__version__ = "0.1.0"
