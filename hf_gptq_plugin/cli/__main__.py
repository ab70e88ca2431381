"""`python -m hf_gptq_plugin.cli`, for torchrun."""

from . import main

if __name__ == "__main__":
    main()
