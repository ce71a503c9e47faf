"""`nanochat bench`: how fast everything is, beside what else one would take.

worker.py runs one contestant in a process of its own, runner.py lets contestants take turns. ours.py and peers.py make the
contestants, groups.py says which race against which, growth.py how cost grows, machine.py what this machine can do at most, and
report.py writes it down.
"""
