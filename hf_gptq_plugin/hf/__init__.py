"""Transformers and PEFT: the quantizer, and what a saved checkpoint says about itself."""
