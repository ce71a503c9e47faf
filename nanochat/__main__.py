"""python -m nanochat"""

from nanochat.cli.main import main

if __name__ == "__main__":
    main()
