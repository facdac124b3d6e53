"""From the rows of a file to batches: the same ones on every machine and after every resume.

files.py, hub.py (rows) -> fields.py (columns) -> forms.py, chat.py (tokens, and which of them are learnt) ->
reader.py, load.py (what a run reads) -> examples.py, packing.py (rows of a batch) -> stream.py (batches by their step).
sample.py is what the plan says of it.
"""

from surgery.runtime.data.examples import IGNORED as IGNORED
from surgery.runtime.data.examples import Examples as Examples
from surgery.runtime.data.load import Data as Data
from surgery.runtime.data.load import load_data as load_data
from surgery.runtime.data.load import load_evaluation as load_evaluation
from surgery.runtime.data.packing import Packed as Packed
from surgery.runtime.data.stream import Stream as Stream
from surgery.runtime.data.stream import block_of as block_of
from surgery.runtime.data.stream import lengths_of as lengths_of
from surgery.runtime.data.stream import seeded as seeded
from surgery.runtime.data.stream import streams_of as streams_of
