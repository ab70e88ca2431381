"""`python -m hf_gptq_cli`, for torchrun."""

from . import main

if __name__ == "__main__":
    main()
