"""dayzero: any Hugging Face causal language model, fine-tuned, evaluated and served as one reproducible workflow."""

__version__ = "0.1.0"
