"""The report of a run: figures (`metrics.py`, `changes.py`, `gather.py`) and their drawing (`svg.py`, `page.py`)."""
