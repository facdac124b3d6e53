"""Reload a merged folder with plain transformers and compare its held-out accuracy with that of the run it came from.

python specs/check_merged.py MERGED RUN ACCURACY
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from surgery.runtime.data import load_data
from surgery.runtime.run_folder import load_state


def main() -> None:
    """Print the accuracy; exit with 1 if it is not the expected one."""
    merged, run, expected = Path(sys.argv[1]), load_state(sys.argv[2]), float(sys.argv[3])
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    # Only which rows were held out is taken from the run; they are read with the merged folder's own tokenizer.
    rows = load_data(run.plan, run.folder, AutoTokenizer.from_pretrained(merged)).held_out
    assert rows is not None
    right = 0
    with torch.no_grad():
        for batch in rows.batches(64):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    accuracy = right / len(rows)
    print(f"{type(model).__name__} from {merged}: {right} of {len(rows)} right, accuracy {accuracy:.4f}")
    if accuracy != expected:
        sys.exit(f"the run had {expected:.4f}: merging changed the model")
    print("the same as before merging")


if __name__ == "__main__":
    main()
