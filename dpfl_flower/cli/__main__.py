"""``python -m dpfl_flower.cli`` is ``dpfl``."""

from dpfl_flower.cli import main

if __name__ == "__main__":
    main()
