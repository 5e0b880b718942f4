"""``python -m mono_quant`` is the command ``monoquant``."""

from mono_quant.cli.main import main

if __name__ == "__main__":
    main()
