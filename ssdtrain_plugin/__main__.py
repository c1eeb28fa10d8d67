"""``python -m ssdtrain_plugin`` is ``ssdtrain``."""

from ssdtrain_plugin.cli import main

if __name__ == "__main__":
    main()
