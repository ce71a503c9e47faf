"""The commands, one module for each group of them; main.py joins them to `nanochat`."""
