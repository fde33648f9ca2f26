"""The program: `ckptfix`, and `python -m ckptfix`."""

import gc

gc.disable()  # before the imports: a command makes no garbage to speak of, and trees are large

from ckptfix.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
